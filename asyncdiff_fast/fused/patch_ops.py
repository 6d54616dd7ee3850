"""The ops of one patch, beside those of `ops`: GroupNorm with the other patches' statistics, rows of its neighbours.

The norm writes its result between the neighbours' rows, where the next convolution reads it, and packs the own border
rows for sending in the same pass. `kernel` "torch" runs the reference, in fp32 as the kernels do. `attention` over all
patches' keys and values is `attention_ops.attention`, whose one segment is the view of a ring.
"""

import torch

from ..kernels import pixels
from .registry import op


def _fake_patch_statistics(x, num_groups, *_):
    partials = x.new_empty((x.shape[0], pixels.num_chunks(x.shape[2:]), 2, x.shape[1]), dtype=torch.float32)
    return partials, x.new_empty((x.shape[0], num_groups, 2), dtype=torch.float32)


@op(_fake_patch_statistics)
def patch_statistics(
    x: torch.Tensor, num_groups: int, conv_bias: torch.Tensor | None, temb: torch.Tensor | None, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a synchronous norm sends before it can begin.

    Args: as in `patch_group_norm`.
    Returns: partials of `x`, for `patch_group_norm`; mean and biased variance (n, num_groups, 2) fp32 of
        x + conv_bias + temb, to be sent.
    """
    if kernel == "triton":
        from ..kernels.group_norm import group_norm_merge as merge
        from ..kernels.group_norm import group_norm_partials as read
    else:
        from ..kernels.reference import group_norm_merge_reference as merge
        from ..kernels.reference import group_norm_partials_reference as read
    partials = read(x)
    return partials, merge(partials, x.shape[2:], None, None, num_groups, 0.0, conv_bias=conv_bias, temb=temb)[1]


def _fake_patch_group_norm(x, weight, bias, num_groups, eps, kernel, halo=None, upsample=1, *_, **__):
    y = pixels.new_output(x, halo or (0, 0), upsample, False)[1]
    return y, x.new_empty((x.shape[0], num_groups, 2), dtype=torch.float32)


@op(_fake_patch_group_norm, writes=("top", "bottom"))
def patch_group_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_groups: int,
    eps: float,
    kernel: str,
    halo: list[int] | None = None,
    upsample: int = 1,
    silu: bool = False,
    conv_bias: torch.Tensor | None = None,
    temb: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    combine: str = "local",
    parts: torch.Tensor | None = None,
    own: int = 0,
    shares: torch.Tensor | None = None,
    bessel: bool = False,
    partials: torch.Tensor | None = None,
    above: torch.Tensor | None = None,
    below: torch.Tensor | None = None,
    top: torch.Tensor | None = None,
    bottom: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU (or not) of GroupNorm(x + conv_bias + temb) * (1 + scale) + shift with the image's statistics, halo around.

    Args:
        x: (n, c, *spatial), fp32, fp16 or bf16: this patch, all its rows its own.
        halo: numbers of rows to add above and below, where x is (n, c, h, w).
        upsample: 2 for nearest; the border tensors then have the source's rows, ⌈halo / 2⌉ of them.
        conv_bias: (c,); temb, scale, shift: (n, c); each may be None, scale and shift both or none.
        combine: "local" without `parts`; "sync" and "stale" take the own part fresh, whatever `parts` has for it;
            "corrected" adds the own part's change since `parts`. Where the variance comes out negative it is the own.
            (The kernels' `mode`: torch keeps that name for itself in ops.)
        parts: (patches, n, num_groups, 2) fp32, contiguous: mean and biased variance of each. own: this one's place.
        shares: (patches,) fp32, each patch's share of the rows; None: equal. bessel: the published n / (n − 1).
        partials: what `patch_statistics` or `ops.residual_add` gave with `x`, or None.
        above, below: (n, c, rows, w), the neighbours' rows of the halo; None: zeros, the image's border.
        top, bottom: (n, c, any rows, w), written: the result's first and last own rows, for the neighbours.
    Returns: (n, c, halo[0] + upsample * h + halo[1], upsample * w) in the memory format of `x`; the own fresh mean and
        biased variance (n, num_groups, 2) fp32, to be sent.
    Raises: ValueError for shapes, dtypes, strides or modes that do not fit together.
    """
    if kernel == "triton":
        from ..kernels.group_norm import group_norm as norm
    else:
        from ..kernels.reference import group_norm_reference as norm
    return norm(
        x, weight, bias, num_groups, eps, act="silu" if silu else "none", conv_bias=conv_bias, temb=temb, scale=scale,
        shift=shift, mode=combine, parts=parts, own=own, shares=shares, bessel=bessel, partials=partials,
        halo=tuple(halo or (0, 0)), above=above, below=below, top=top, bottom=bottom, upsample=upsample,
    )  # fmt: skip


def _fake_patch_rows(x, halo, above, below, top, bottom, upsample, kernel):
    return pixels.new_output(x, halo, upsample, False)[1]


@op(_fake_patch_rows, writes=("top", "bottom"))
def patch_rows(
    x: torch.Tensor,
    halo: list[int],
    above: torch.Tensor | None,
    below: torch.Tensor | None,
    top: torch.Tensor | None,
    bottom: torch.Tensor | None,
    upsample: int,
    kernel: str,
) -> torch.Tensor:
    """`patch_group_norm` without a norm, for convolutions that read no norm's result; x, args and returns as there."""
    if kernel == "triton":
        from ..kernels.halo import pad_rows as pad
    else:
        from ..kernels.reference import pad_rows_reference as pad
    return pad(x, tuple(halo), above=above, below=below, top=top, bottom=bottom, upsample=upsample)
