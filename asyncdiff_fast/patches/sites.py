"""Sites: the few function calls of a forward that read more than one row, found and replaced where they happen.

Everything else in a denoiser works row by row (token by token), so it runs on a patch as on a smaller picture. A site
is known by its module, the number of the module's call, and its place among that call's watched functions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..calls.signature import copied
from ..exchange import wire
from ..fused.projections import KeptBytes
from .following import Called, Followed

CONV, NORM, ATTENTION, RESIZE, POOL, PAD = "convolution", "norm", "attention", "resize", "pool", "padding"
SUM = "sum"
KINDS = {
    torch.conv1d: CONV,
    torch.conv2d: CONV,
    torch.conv3d: CONV,
    F.group_norm: NORM,
    torch.group_norm: NORM,
    F.scaled_dot_product_attention: ATTENTION,
    F.interpolate: RESIZE,
    F.avg_pool2d: POOL,
    F.max_pool2d: POOL,
    F.pad: PAD,
}
# Functions that may sum over rows, and what they make of them. Of norms, those of order 2; of pools, to one pixel.
SUMS = {
    **dict.fromkeys((torch.sum, torch.Tensor.sum, torch.einsum, torch.bmm, torch.Tensor.bmm), "sum"),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), "sum"),
    **dict.fromkeys((torch.mean, torch.Tensor.mean, F.adaptive_avg_pool2d), "mean"),
    **dict.fromkeys((torch.amax, torch.Tensor.amax), "max"),
    **dict.fromkeys((torch.amin, torch.Tensor.amin), "min"),
    **dict.fromkeys((torch.norm, torch.Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm), "norm"),
}
# Functions that join an activation with a tensor of positions, such as a sine embedding.
JOINS = {
    torch.add, torch.mul, torch.sub, torch.Tensor.add, torch.Tensor.mul, torch.Tensor.sub,
    torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.__sub__,
}  # fmt: skip
# Floating-point inputs of more values than these hold no sizes or masks.
FEW = 4096
_NUMBERS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__,
    torch.Tensor.__index__, torch.equal, torch.allclose,
}  # fmt: skip


@wire.register
@dataclass(frozen=True)
class Seen:
    """One watched call: shapes of its first argument (of the keys, for attention) and result, and its options."""

    kind: str
    shape: tuple[int, ...]
    result: tuple[int, ...]
    options: tuple
    dtype: torch.dtype
    # A few numbers of each key token, by which the picture's tokens are told from others.
    sample: torch.Tensor | None = None


def conv_options(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """((kernel, stride, padding, dilation) by spatial dimension) of a convolution's arguments."""
    n = weight.dim() - 2
    kernel = tuple(weight.shape[2:])
    stride, dilation = ((v,) * n if isinstance(v, int) else tuple(v) * (n // len(v)) for v in (stride, dilation))
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        # An even kernel pads one more after than before, which a symmetric padding cannot say.
        padding = tuple(p // 2 if p % 2 == 0 else None for p in total)
    elif isinstance(padding, int):
        padding = (padding,) * n
    else:
        padding = tuple(padding) * (n // len(padding))
    return tuple(zip(kernel, stride, padding, dilation, strict=True))


def _norm_options(input, num_groups, *_, **__):
    return (num_groups,)


def _resize_options(input, size=None, scale_factor=None, mode="nearest", *_, **__):
    return (mode,)


def _pool_options(input, kernel_size, stride=None, padding=0, *more, **named):
    """As `conv_options`; what is padded, dilated or rounded up has None for its padding."""
    pairs = [(v, v) if isinstance(v, int) else tuple(v) * (2 // len(v)) for v in (kernel_size, stride or kernel_size)]
    plain = padding in (0, (0, 0)) and not any(m is True or m not in (1, (1, 1), False, None) for m in more[:1])
    plain &= not named.get("ceil_mode") and named.get("dilation", 1) in (1, (1, 1))
    return tuple((k, s, 0 if plain else None, 1) for k, s in zip(*pairs, strict=True))


def _pad_options(input, pad, *_, **__):
    """((above, below) in rows,) of a padding: (0, 0) if it adds no rows to a picture."""
    return (tuple(pad[2:4]) if input.dim() >= 4 and len(pad) >= 4 else (0, 0),)


_OPTIONS = {
    CONV: conv_options, NORM: _norm_options, RESIZE: _resize_options, POOL: _pool_options, PAD: _pad_options,
}  # fmt: skip


def sample_of(key):
    """(tokens, 8): a few numbers of each key."""
    return key.detach()[(0,) * (key.dim() - 2)][:, :8].clone()


def seen(kind, args, kwargs, result, sampled=True):
    """The `Seen` of a call; `sampled` keeps a few numbers of each key."""
    first = args[0] if args else next(iter(kwargs.values()))
    if kind == ATTENTION:
        key = args[1] if len(args) > 1 else kwargs["key"]
        sample = sample_of(key) if sampled else None
        value = args[2] if len(args) > 2 else kwargs["value"]
        causal = bool(args[5] if len(args) > 5 else kwargs.get("is_causal", False))
        return Seen(kind, tuple(key.shape), tuple(first.shape), (tuple(value.shape), causal), key.dtype, sample)
    options = _OPTIONS[kind](*args, **kwargs)
    return Seen(kind, tuple(first.shape), tuple(result.shape), options, first.dtype)


class Recorder(TorchFunctionMode):
    """Records one forward on a whole picture: its sites, and which tensors follow from positions alone.

    `sites`: {(module, call): [Seen]}. `order`: (key, place among them) of each, as met. `met`: (module, call, place) of
    these and of what may sum over rows. `calls`: every function call on tensors made of the picture, as `Called`.
    `constants`: {(module, call): result} of modules whose results follow from no input. `joins`: {(module, call):
    [(place, argument, tensor, shape of the result)]} of functions that join an activation with such a tensor. `beside`:
    {(module, call, leaf of its constant result)} that runs along something that is not made of the picture, such as
    text of as many tokens. `steered_by`: modules where a number read from the picture's activations steers Python.
    `reads`: names of other inputs from which numbers are read into Python, which positions may follow from. `tokens`:
    their `TokenOrder`, if it was found. `kept_bytes`: of the projections of the inputs that are made once, see
    `KeptBytes`.
    """

    def __init__(self, latent, inputs, named):
        super().__init__()
        self.sites, self.order, self.constants, self.joins, self.steered_by = {}, [], {}, {}, []
        self.kept_bytes, self.reads, self.calls = 0, set(), []
        self._named = {name: Followed(x) for name, x in named.items()}
        self.met, self.tokens = [], None
        self._inputs, self._picture = Followed(inputs), Followed(latent)
        # {(module, call, leaf): that leaf, and what follows from it and other constants alone}, until it is first used.
        self.beside, self._unused = set(), {}
        self._stack, self._calls, self._joins_met, self._sums_met = [("", 0)], {}, {}, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self._note_use(leaves, result)
        key = self._stack[-1]
        site = self._site(key, func, args, kwargs, result)
        called = Called.of(self._picture, func, args, kwargs, leaves, result, key[0], site)
        from_inputs = self._inputs.pass_on(func, args, leaves, result)
        if self._picture.pass_on(func, args, leaves, result) and called.made:
            self.calls.append(called)
        if func in JOINS:
            self._note_join(key, args, leaves, result)
        elif func in _NUMBERS and self._picture.any(leaves):
            self.steered_by.append(key[0] or "the forward itself")
        elif func in _NUMBERS and from_inputs:
            self.reads |= {name for name, followed in self._named.items() if followed.any(leaves)}
        for followed in self._named.values() if from_inputs else ():
            followed.pass_on(func, args, leaves, result)
        return result

    def _site(self, key, func, args, kwargs, result):
        """(module, call, place) of a watched call, which is noted; None of any other."""
        if func in SUMS:
            place = self._sums_met[key] = self._sums_met.get(key, -1) + 1
            self.met.append((*key, f"sum {place}"))
            return self.met[-1]
        if func not in KINDS:
            return None
        sites = self.sites.setdefault(key, [])
        self.order.append((key, len(sites)))
        sites.append(seen(KINDS[func], args, kwargs, result))
        self.met.append((*key, len(sites) - 1))
        return self.met[-1]

    @property
    def summing(self):
        """Names of the modules that call what may sum over rows."""
        return tuple(sorted({name for name, _ in self._sums_met}))

    def _note_use(self, leaves, result):
        """See whether a constant first meets the picture or something else that it runs along."""
        others = [x for x in leaves if x in self._inputs and not any(x in f for f in self._unused.values())]
        for tag, followed in list(self._unused.items()):
            mine = [x for x in leaves if x in followed]
            if not mine:
                continue
            if not others:
                followed.add(result)
            elif self._picture.any(others) or _along(mine[0], others):
                del self._unused[tag]
                if not self._picture.any(others):
                    self.beside.add(tag)

    def _note_join(self, key, args, leaves, result):
        place = self._joins_met[key] = self._joins_met.get(key, -1) + 1
        if not self._inputs.any(leaves):
            return
        others = [x for x in leaves if x in self._inputs]
        for i, x in enumerate(args[:2]):
            if isinstance(x, torch.Tensor) and x not in self._inputs and x.dim() > 1:
                if not self._picture.any(others) and _along(x, others):
                    continue
                self.joins.setdefault(key, []).append((place, i, x.detach(), tuple(result.shape)))

    def watch(self, denoiser):
        """Follow the calls of every submodule; returns the hooks' handles."""
        handles = []
        for name, module in denoiser.named_modules():
            if not name:
                continue

            def enter(module, args, kwargs, name=name):
                call = self._calls[name] = self._calls.get(name, -1) + 1
                self._stack.append((name, call))

            def leave(module, args, kwargs, output):
                key = self._stack.pop()
                tensors = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
                if tensors and not self._inputs.any(tensors):
                    self.constants[key] = output
                    self._unused |= {(*key, i): Followed(x) for i, x in enumerate(tensors)}
                    # What is made of it needs no care of its own: the module's result will be a patch's.
                    self._inputs.add(output)

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        return handles


def _is_small(tree):
    """True of an argument that may hold sizes and masks: whole numbers, or few of any."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
    return bool(tensors) and all(not x.is_floating_point() or x.numel() <= FEW for x in tensors)


def _along(x, others):
    """True if a tensor has a dimension, other than features, that some of the others have too."""
    sizes = set(x.shape[:-1]) - {1}
    return any(sizes & set(other.shape[:-1]) for other in others)


def record(denoiser, forward, signature, args, kwargs):
    """(result, `Recorder`) of one forward on the whole picture."""
    args, kwargs = copied(args, kwargs)
    latent = signature.latent(args, kwargs)
    others = {n: x for n, x in signature.named(args, kwargs).items() if _is_small(x) and n != signature.timestep_name}
    recorder = Recorder(latent, (args, kwargs), others)
    handles = recorder.watch(denoiser)
    try:
        with torch.no_grad(), KeptBytes((args, kwargs), latent) as kept, recorder:
            result = forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    recorder.kept_bytes = kept.nbytes
    return result, recorder
