"""GroupNorm of a patch written out in float64 with the raw moments of the published code, and inputs to try it on."""

import torch
import torch.nn.functional as F

# Rounding of the result to the dtype, relative to values of order 1 and up; float32 and float64 leave room for sums.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def moments(x, num_groups):
    """Mean and mean square of each group, (n, num_groups) float64."""
    grouped = x.double().reshape(x.shape[0], num_groups, -1)
    return grouped.mean(dim=2), grouped.square().mean(dim=2)


def stats_of(x, num_groups):
    """(n, num_groups, 2) float32: mean and biased variance, the wire format."""
    mean, square = moments(x, num_groups)
    return torch.stack((mean, square - mean.square()), dim=2).float()


def group_norm_oracle(
    x, weight, bias, num_groups, eps, *, act="none", conv_bias=None, temb=None, scale=None, shift=None,
    mode="local", parts=None, own=0, shares=None, bessel=False,
    halo=(0, 0), above=None, below=None, upsample=1,
):  # fmt: skip
    """(padded result, result without halo and upsampling, own stats), all float64."""

    def spread(t):
        return t.double().reshape(*t.shape, *[1] * (x.ndim - 2))

    wide = x.double()
    for term in (conv_bias, temb):
        wide = wide if term is None else wide + spread(term)
    mean, square = moments(wide, num_groups)
    own_var = square - mean.square()
    stats = torch.stack((mean, own_var), dim=2)
    if mode != "local":
        part_mean, part_var = parts.double().unbind(-1)
        part_square = part_var + part_mean.square()
        before = part_mean[own], part_square[own]
        if mode != "corrected":
            part_mean, part_square = part_mean.clone(), part_square.clone()
            part_mean[own], part_square[own] = mean, square
        weights = torch.full((len(parts),), 1 / len(parts)).double() if shares is None else shares.double()
        average = [(weights[:, None, None] * m).sum(dim=0) for m in (part_mean, part_square)]
        if mode == "corrected":
            average = [a + fresh - old for a, fresh, old in zip(average, (mean, square), before, strict=True)]
        mean, square = average
    var = square - mean.square()
    var = torch.where(var < 0, own_var, var)
    if bessel:
        count = x[0].numel() // num_groups
        var = var * count / (count - 1)
    shape = (x.shape[0], num_groups, -1)
    y = (wide.reshape(shape) - mean[..., None]) / (var[..., None] + eps).sqrt()
    y = y.reshape(x.shape)
    if weight is not None:
        y = y * spread(weight)
    if bias is not None:
        y = y + spread(bias)
    if scale is not None:
        y = y * (1 + spread(scale)) + spread(shift)
    if act == "silu":
        y = F.silu(y)
    return padded(y, halo, above, below, upsample), y, stats


def padded(y, halo, above, below, upsample):
    """`y` upsampled between its halo rows, by plain indexing."""
    if not any(halo) and upsample == 1:
        return y
    rows = [y] if above is None else [above.double(), y]
    rows = torch.cat(rows if below is None else [*rows, below.double()], dim=2)
    first = 0 if above is None else above.shape[2]
    wide = rows.repeat_interleave(upsample, dim=2).repeat_interleave(upsample, dim=3)
    top = wide.new_zeros(*wide.shape[:2], halo[0], wide.shape[3])
    bottom = wide.new_zeros(*wide.shape[:2], halo[1], wide.shape[3])
    begin, end = first * upsample, (first + y.shape[2]) * upsample
    if above is not None:
        top = wide[:, :, begin - halo[0] : begin]
    if below is not None:
        bottom = wide[:, :, end : end + halo[1]]
    return torch.cat((top, wide[:, :, begin:end], bottom), dim=2)


def laid_out(x, layout):
    """`x` with the same values: "contiguous", "channels_last", or "frames", (n, c, f, h, w) out of (n, f, c, h, w)."""
    if layout == "frames":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    return x.contiguous()


def affine_inputs(n, c, dtype, generator):
    """Dict of weight, bias, conv_bias, temb, scale and shift, as a residual block has them."""
    scale, shift = torch.randn(n, 2 * c, generator=generator).to(dtype).chunk(2, dim=1)
    vector = [torch.randn(c, generator=generator).to(dtype) for _ in range(3)]
    temb = torch.randn(n, c, generator=generator).to(dtype)
    return {
        "weight": vector[0] + 1,
        "bias": vector[1],
        "conv_bias": vector[2],
        "temb": temb,
        "scale": scale,
        "shift": shift,
    }


def assert_near(y, want, dtype, factor=1.0):
    """Largest difference relative to max(1, |want|), within the dtype's tolerance."""
    assert y.shape == want.shape, (y.shape, want.shape)
    error = ((y.double() - want) / want.abs().clamp(min=1)).abs().max().item()
    assert error <= TOLERANCE[dtype] * factor, error
