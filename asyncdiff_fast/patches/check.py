"""Whether patches together give what the whole picture gives, as far as rounding lets one tell."""

import contextlib
import logging

import torch
from torch.utils._pytree import tree_leaves

from ..exchange.errors import ExchangeError
from .way import Lost

log = logging.getLogger(__name__)

OTHERWISE = "use num_stages or parallel_steps instead"
# Where rows are mixed.
WAY_OUT = f"{OTHERWISE}, or set its attention to a processor that calls scaled_dot_product_attention"
# Results of other kernels may differ by this many times what the rounding of the input changes.
FACTOR = 5
# Units in the last place of the results' size that are always allowed: sums are taken in another order.
LEAST = 2
# The second picture: how late it is, as a part of the timestep, and how far its rows are apart, in deviations.
LATE, SLOPE = 0.1, 2.0
# Blocks of which means are compared, along each dimension.
BLOCKS = 4


class ResultCheck:
    """Compares results of one denoiser's patches with those of the whole picture. Collective.

    What is explained is measured: how far a result moves if its input is changed in the last place of the coarsest
    dtype at work. As a first picture is noise, all of whose rows are alike, and gates may be closed yet, patches must
    be right for a picture of another kind too: late in time, bright at one end and dark at the other.

    Args:
        refusal, way_out: what an error says after the denoiser's name, and in the end.
    """

    def __init__(self, denoiser, signature, world, refusal="cannot be shared out as patches", way_out=WAY_OUT):
        self._refusal, self._signature, self._world = f"{type(denoiser).__name__} {refusal}", signature, world
        self._denoiser, self._way_out = denoiser, way_out

    def expect(self, run, args, kwargs, whole=None):
        """(result of the whole picture, what rounding explains of each distance to it) of one call.

        Args:
            run: `run(args, kwargs)` is that result; `whole` if it is known already.
        """
        whole, ulp = run(args, kwargs) if whole is None else whole, self._ulp(args, kwargs)
        return whole, _explained(run(*self._rounded(args, kwargs, ulp)), whole, ulp)

    def judge(self, joined, expected):
        """Raises: ValueError on every rank if the patches' result is not as expected."""
        whole, explained = expected
        # Results that are no numbers, as of half precision overflowing late in time, tell nothing.
        worst = float((_distance(joined, whole) / explained).nan_to_num(nan=0.0).max())
        if self._world is not None:
            worst = max(self._world.gather(worst, "a result of the patches"))
        if not worst <= 1:
            raise ValueError(
                f"{self._refusal}: together they differ from the whole picture by {worst:.3g} times what rounding "
                "explains, so something in it mixes rows in a way that is neither a convolution, a GroupNorm nor "
                f"scaled_dot_product_attention; {self._way_out}"
            )

    def compare(self, joined, run, whole, args, kwargs, dim):
        """See that patches give what the whole picture gives, and late in time, if it has rows in dimension `dim`.

        Args:
            joined, run: `joined(args, kwargs)` is the result of all patches, `run(args, kwargs)` that of the whole.
            whole: that of this call.
        """
        self.judge(joined(args, kwargs), self.expect(run, args, kwargs, whole))
        if dim is None:
            return
        args, kwargs = self.late(args, kwargs, dim)
        try:
            expected = self.expect(run, args, kwargs)
        except Exception as error:
            # On every rank: it knows the sampler's timesteps only, say.
            log.info("patches are not tried late in time: %s: %s", type(error).__name__, error)
            return
        with self.refusing("late in time it runs on the whole picture, and not on a patch"):
            result = joined(args, kwargs)
        self.judge(result, expected)

    @contextlib.contextmanager
    def refusing(self, why):
        """What a denoiser raises where it should have run is told as a reason not to share it out."""
        try:
            yield
        except (Lost, ExchangeError):
            raise
        except Exception as error:
            raise ValueError(f"{self._refusal}: {why} ({type(error).__name__}: {error}); {OTHERWISE}") from error

    def _ulp(self, args, kwargs):
        """Relative rounding of the coarsest dtype at work."""
        latent = self._signature.latent(args, kwargs)
        kind = latent.device.type
        dtypes = {latent.dtype} | {p.dtype for p in self._denoiser.parameters() if p.dtype.itemsize > 1}
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
        # Statistics of norms are in float32 at best.
        ulp = max(torch.finfo(dtype).eps for dtype in {*dtypes, torch.float32} if dtype.is_floating_point)
        # With TF32, which cuDNN takes unless told otherwise, operands have half precision's ten bits.
        return max(ulp, torch.finfo(torch.float16).eps) if kind == "cuda" and uses_tf32() else ulp

    def _rounded(self, args, kwargs, ulp):
        """The call with its latent changed in the last place."""
        latent = self._signature.latent(args, kwargs)
        signs = torch.randint(0, 2, latent.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return self._signature.with_latent(
            args, kwargs, (latent * (1 + ulp * signs.to(latent.device))).to(latent.dtype)
        )

    def late(self, args, kwargs, dim):
        """(args, kwargs) late in time, with a latent half noise, half a slope along its rows in dimension `dim`."""
        latent, timestep = self._signature.latent(args, kwargs), self._signature.timestep(args, kwargs)
        slope = torch.linspace(SLOPE, -SLOPE, latent.shape[dim], device=latent.device) * latent.float().std()
        slope = slope.view(-1, *(1,) * (latent.dim() - 1 - dim))
        args, kwargs = self._signature.with_latent(args, kwargs, (0.5 * latent + slope).to(latent.dtype))
        if isinstance(timestep, torch.Tensor):
            return self._signature.with_timestep(args, kwargs, (timestep * LATE).to(timestep.dtype))
        if isinstance(timestep, int | float):
            return self._signature.with_timestep(args, kwargs, type(timestep)(timestep * LATE))
        return args, kwargs


def uses_tf32():
    """Whether fp32 operands of convolutions or products of matrices may be rounded to TF32 on CUDA."""
    try:
        return torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        # Set the newer way, for some ops but not for others.
        return True


def _distance(a, b):
    """(4,) fp64: how far results are apart, worst of their tensors, relative to the second's size.

    Root mean square and greatest difference of all elements; then of their means over blocks, in which rounding
    averages out, but not what patches do wrongly.
    """
    found = [torch.zeros(4, dtype=torch.float64)]
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        if isinstance(y, torch.Tensor) and y.numel():
            x, y = ((torch.view_as_real(z) if z.is_complex() else z).double() for z in (x, y))
            apart, means = (x - y).flatten().abs(), _means(x - y).flatten().abs()
            sizes = (y.square().mean().sqrt(), y.abs().amax())
            errors = [d for z in (apart, means) for d in (z.square().mean().sqrt() / sizes[0], z.amax() / sizes[1])]
            found.append(torch.stack(errors).nan_to_num(nan=torch.inf if apart.any() else 0.0).cpu())
    return torch.stack(found).amax(0)


def _means(x):
    """Means over up to four blocks along each dimension but the batch and the channels."""
    channels = 1 if x.dim() > 3 else x.dim() - 1
    for dim in range(1, x.dim()):
        if dim != channels:
            x = torch.cat([part.mean(dim, keepdim=True) for part in x.tensor_split(BLOCKS, dim) if part.numel()], dim)
    return x


def _explained(rounded, whole, ulp):
    """(4,) fp64: what rounding explains of each distance, by how far it moves a result."""
    most = max(x.numel() / _means(x).numel() for x in tree_leaves(whole) if isinstance(x, torch.Tensor) and x.numel())
    least = torch.tensor([1.0, 1.0, most**-0.5, most**-0.5], dtype=torch.float64)
    return _distance(rounded, whole) * FACTOR + LEAST * ulp * least
