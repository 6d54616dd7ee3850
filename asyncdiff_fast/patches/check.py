"""Whether patches together give what the whole picture gives, as far as rounding lets one tell."""

import contextlib

import torch
from torch.utils._pytree import tree_leaves

from .way import Lost

WAY_OUT = (
    "use num_stages or parallel_steps instead, or set its attention to a processor that calls "
    "scaled_dot_product_attention"
)
# Results of other kernels may differ by this many times what the rounding of the input changes.
FACTOR = 5
# Units in the last place of the results' size that are always allowed: sums are taken in another order.
LEAST = 2
# The second picture: how late it is, as a part of the timestep, and how far its rows are apart, in deviations.
LATE, SLOPE = 0.1, 2.0


class ResultCheck:
    """Compares results of one denoiser's patches with those of the whole picture. Collective.

    What is explained is measured: how far a result moves if its input is changed in the last place of the coarsest
    dtype at work. As a first picture is noise, all of whose rows are alike, and gates may be closed yet, patches must
    be right for a picture of another kind too: late in time, bright at one end and dark at the other.
    """

    def __init__(self, denoiser, signature, world):
        self._name, self._signature, self._world = type(denoiser).__name__, signature, world
        self._denoiser, self._explained = denoiser, None

    def learn(self, run, joined, args, kwargs, dim):
        """Measure what rounding explains, on a late picture with a slope, and see that patches are right on it.

        Args:
            run, joined: `run(args, kwargs)` is the result of the whole picture, `joined(args, kwargs)` of the patches.
            dim: of the latent's rows.
        """
        ulp, found = self._ulp(args, kwargs), None
        with contextlib.suppress(Lost):
            late = self._late(args, kwargs, dim)
            found = joined(*late)
            args, kwargs = late
        whole = run(args, kwargs)
        self._explained = _distance(run(*self._rounded(args, kwargs, ulp)), whole) * FACTOR + LEAST * ulp
        if found is not None:
            self.judge(found, whole)

    def judge(self, joined, whole):
        """Raises: ValueError on every rank if the two differ by more than rounding explains."""
        error = _distance(joined, whole) / self._explained
        worst = max(self._world.gather(float(error.max()), "a result of the patches"))
        if not worst <= 1:
            raise ValueError(
                f"{self._name} cannot be shared out as patches: together they differ from the whole picture by "
                f"{worst:.3g} times what rounding explains, so something in it mixes rows in a way that is neither a "
                f"convolution, a GroupNorm nor scaled_dot_product_attention; {WAY_OUT}"
            )

    def _ulp(self, args, kwargs):
        """Relative rounding of the coarsest dtype at work."""
        latent = self._signature.latent(args, kwargs)
        kind = latent.device.type
        dtypes = {latent.dtype} | {p.dtype for p in self._denoiser.parameters() if p.dtype.itemsize > 1}
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
        ulp = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
        tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
        return max(ulp, 2.0**-10) if kind == "cuda" and tf32 else ulp

    def _rounded(self, args, kwargs, ulp):
        """The call with its latent changed in the last place."""
        latent = self._signature.latent(args, kwargs)
        signs = torch.randint(0, 2, latent.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return self._signature.with_latent(
            args, kwargs, (latent * (1 + ulp * signs.to(latent.device))).to(latent.dtype)
        )

    def _late(self, args, kwargs, dim):
        """The call late in time, with a latent half noise, half a slope along its rows."""
        latent, timestep = self._signature.latent(args, kwargs), self._signature.timestep(args, kwargs)
        slope = torch.linspace(SLOPE, -SLOPE, latent.shape[dim], device=latent.device) * latent.float().std()
        slope = slope.view(-1, *(1,) * (latent.dim() - 1 - dim))
        args, kwargs = self._signature.with_latent(args, kwargs, (0.5 * latent + slope).to(latent.dtype))
        if isinstance(timestep, torch.Tensor):
            return self._signature.with_timestep(args, kwargs, (timestep * LATE).to(timestep.dtype))
        if isinstance(timestep, int | float):
            return self._signature.with_timestep(args, kwargs, type(timestep)(timestep * LATE))
        return args, kwargs


def _distance(a, b):
    """(2,) fp64: root mean square and greatest difference, in those of the second, worst of a result's tensors."""
    found = [torch.zeros(2, dtype=torch.float64)]
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        if isinstance(y, torch.Tensor) and y.numel():
            x, y = x.double(), y.double()
            apart = torch.stack((x - y, y)).flatten(1).abs()
            sizes = torch.stack((apart.square().mean(1).sqrt(), apart.amax(1)))
            found.append((sizes[:, 0] / sizes[:, 1].clamp(min=1e-30)).nan_to_num(torch.inf).cpu())
    return torch.stack(found).amax(0)
