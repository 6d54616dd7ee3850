"""GroupNorm of a patch, or of a whole image, with what surrounds it in a residual block: the op that callers use.

Three passes: `group_norm_stats` (read), `group_norm_merge` (a few kilobytes), `group_norm_apply` (read and write);
small groups take one launch, `group_norm_small`. A norm whose input was made by `residual_partials` needs no reading
pass of its own. To merge in the programs that write spares a launch, but was slower at every size measured on an H200,
by 2 to 6 µs where chunks are few.
"""

from asyncdiff_fast.kernels import pixels, tuning
from asyncdiff_fast.kernels.group_norm_apply import group_norm_apply
from asyncdiff_fast.kernels.group_norm_merge import group_norm_merge
from asyncdiff_fast.kernels.group_norm_small import group_norm_small
from asyncdiff_fast.kernels.group_norm_stats import group_norm_partials, residual_partials

__all__ = ["group_norm", "group_norm_apply", "group_norm_merge", "group_norm_partials", "residual_partials"]


def group_norm(
    x, weight, bias, num_groups, eps, *, act="none", conv_bias=None, temb=None, scale=None, shift=None,
    mode="local", parts=None, own=0, shares=None, bessel=False,
    halo=(0, 0), above=None, below=None, top=None, bottom=None, upsample=1, tokens=False, partials=None, out=None,
):  # fmt: skip
    """Normalise a patch with the statistics of the whole image, ready for the next convolution.

    Args:
        x: (n, c, *spatial), 1 to 3 spatial sizes, float32, float16 or bfloat16; contiguous, channels_last, or any
            view with dense rows. Its rows are this patch's, without halo.
        weight, bias, num_groups, eps: as in torch; weight and bias (c,) or None.
        conv_bias, temb, scale, shift, mode, parts, own, shares, bessel: see `group_norm_merge`.
        act, halo, above, below, top, bottom, upsample, tokens, out: see `group_norm_apply`.
        partials: of `x`, if they are known already.
    Returns: (y, stats): y as `group_norm_apply` says; the own fresh mean and biased variance (n, num_groups, 2)
        float32, of `x` with `conv_bias` and `temb` added: what the other patches need as their part.
    Raises: ValueError for shapes, dtypes, strides or modes that do not fit together.
    Source: Y. Wu, K. He, "Group Normalization", ECCV 2018; for `mode`, see `group_norm_merge`.
    """
    merge = dict(conv_bias=conv_bias, temb=temb, scale=scale, shift=shift)
    merge |= dict(mode=mode, parts=parts, own=own, shares=shares, bessel=bessel)
    write = dict(act=act, halo=halo, above=above, below=below, top=top, bottom=bottom)
    write |= dict(upsample=upsample, tokens=tokens, out=out)
    group_bytes = x.numel() * x.element_size() // (x.shape[0] * num_groups)
    if partials is None and group_bytes <= tuning.GROUP_NORM_SMALL_BYTES[pixels.channels_inner(x)]:
        return group_norm_small(x, weight, bias, num_groups, eps, **merge, **write)
    if partials is None:
        partials = group_norm_partials(x)
    affine, stats = group_norm_merge(partials, x.shape[2:], weight, bias, num_groups, eps, **merge)
    return group_norm_apply(x, affine, **write), stats
