"""Finds where a denoiser combines rows of the picture, but for its sites, by its calls on the whole and on patches.

A dimension of a tensor has rows in it if its size on a patch is another than on the whole picture. A function that is
given such a dimension and whose result has none has summed over the rows; one whose result has more of them than any
argument has compared rows with each other; and some work along a dimension that they keep. Pure.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .sites import KINDS, SUMS

SUMS_UP = "sums over rows of the picture"
# They move or choose values, whatever shapes result.
_MOVES = {
    "__get__", "__getitem__", "__setitem__", "chunk", "split", "tensor_split", "split_with_sizes", "unbind", "narrow",
    "select", "index_select", "gather", "take", "take_along_dim", "masked_select", "nonzero", "view", "view_as",
    "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "movedim", "squeeze", "unsqueeze",
    "expand", "expand_as", "repeat", "repeat_interleave", "cat", "concat", "stack", "as_strided", "swapaxes", "t",
    "tile", "size", "stride", "dim", "unfold", "pad", "contiguous", "clone", "new_zeros", "new_ones",
    "new_empty", "new_full",
    "new_tensor", "broadcast_to", "meshgrid", "index_add", "index_add_", "index_copy", "scatter", "scatter_add",
    "pixel_shuffle", "pixel_unshuffle", "rearrange", "squeeze_", "unsqueeze_", "transpose_", "numel", "is_contiguous",
    "interpolate", "hsplit", "vsplit", "dsplit", "swapdims", "view_as_complex", "view_as_real", "zeros_like", "storage",
    "untyped_storage", "data_ptr", "element_size", "storage_offset", "type", "is_complex", "is_floating_point",
}  # fmt: skip
# They work along `dim`, of which they keep all or some: {name: (place of the argument, what it is if it is not given)}.
_ALONG = {
    "softmax": (1, None), "log_softmax": (1, None), "cumsum": (1, None), "cumprod": (1, None),
    "logcumsumexp": (1, None), "cummax": (1, None), "cummin": (1, None), "sort": (1, -1), "argsort": (1, -1),
    "flip": (1, None), "roll": (2, None), "normalize": (2, 1), "softmin": (1, None),
    "diff": (2, -1), "gumbel_softmax": (4, -1), "msort": (9, 0), "renorm": (2, None),
    "topk": (2, -1), "kthvalue": (2, -1),
}  # fmt: skip
# Of whole numbers they say which tokens go together, to an expert, say; whether rows are mixed then, results tell.
_GROUPS = {"sort", "argsort", "bincount"}
# They work along all of a picture but its batch (and channels).
_WHOLE = {"instance_norm", "multi_head_attention_forward", "_native_multi_head_attention", "cdist", "trapezoid"}


@dataclass(frozen=True)
class Mixed:
    """One call that combines rows. `how` in words; `whole`, `part`: the `Called` on the picture and on a patch."""

    whole: object
    part: object
    how: str

    @property
    def sums(self):
        """True if patches can add up what each of them makes."""
        call = self.whole
        if self.how != SUMS_UP or call.func not in SUMS:
            return False
        if call.func is F.adaptive_avg_pool2d:
            return call.made[0][-2:] == (1, 1)
        order = call.kwargs.get("p", call.kwargs.get("ord", (*call.args, None, None)[1]))
        return SUMS[call.func] != "norm" or order in (None, 2, "fro")

    def __str__(self):
        name = getattr(self.whole.func, "__name__", str(self.whole.func)).strip("_")
        return f"{self.whole.module or 'its own forward'} {self.how} ({name} of {list(self.whole.given[0])})"


def mixed(whole, patch):
    """[`Mixed`] of one forward on the whole picture and one on a patch, each a list of `Called`.

    Where the two go different ways there is nothing to compare, and the rest is left to the check of the result.
    """
    found = []
    for a, b in zip(whole, patch, strict=False):
        if a.func is not b.func or len(a.given) != len(b.given):
            break
        how = None if a.func in KINDS else _how(a, b)
        if how is not None:
            found.append(Mixed(a, b, how))
    return found


def varying(a, b):
    """Dimensions in which two shapes of one tensor differ; None if they are not of one kind."""
    if len(a) != len(b):
        return None
    return {d for d, (m, n) in enumerate(zip(a, b, strict=True)) if m != n}


def _how(a, b):
    name = getattr(a.func, "__name__", "")
    given = [varying(m, n) for m, n in zip(a.given, b.given, strict=True)]
    made = [varying(m, n) for m, n in zip(a.made, b.made, strict=False)]
    if None in given or None in made or not any(given) or not made or (a.whole and name in _GROUPS):
        return None
    if name in _ALONG or name in _WHOLE or name in ("layer_norm", "rms_norm") or name.startswith("fft_"):
        dims = _dims(name, a)
        return "works along rows of the picture" if dims & given[0] else None
    if name in _MOVES:
        return None
    if not any(made):
        return SUMS_UP
    if max(map(len, made)) > max(map(len, given)):
        return "compares rows of the picture with each other"
    return None


def _dims(name, call):
    """The dimensions along which a call works, not negative."""
    rank = len(call.given[0])
    if name in _WHOLE or name == "instance_norm":
        return set(range(rank))
    if name in ("layer_norm", "rms_norm"):
        shape = call.args[1] if len(call.args) > 1 else call.kwargs.get("normalized_shape", ())
        return set(range(rank - len(shape), rank)) if isinstance(shape, tuple | list | torch.Size) else set()
    if name.startswith("fft_"):
        last = {"fft_fft2": 2, "fft_ifft2": 2, "fft_rfft2": 2, "fft_irfft2": 2}.get(name, 1)
        default = tuple(range(rank)) if name.endswith("n") else tuple(range(-last, 0))
        dims = call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else default)
        dims = default if dims is None else dims
    else:
        place, default = _ALONG[name]
        given = call.args[place:] if name == "flip" else call.args[place : place + 1]
        given = given[0] if len(given) == 1 else given
        dims = call.kwargs.get("dim", call.kwargs.get("dims", given if given != () else default))
    if dims is None:
        return set(range(rank))
    dims = dims if isinstance(dims, tuple | list) else (dims,)
    return {d % rank for d in dims if isinstance(d, int)}
