"""What the GroupNorm kernels are compared with: each norms, activates and puts a patch between its neighbours' rows."""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def torch_ops(x, weight, bias, num_groups, eps, above, below):
    """The library's norm of the patch alone, SiLU, concatenation; border rows copied for sending."""
    y = F.silu(F.group_norm(x, num_groups, weight, bias, eps))
    return torch.cat((above, y, below), dim=2), torch.cat((y[:, :, :1], y[:, :, -1:]))


def distrifusion(x, weight, bias, num_groups, eps, above, below, stale, own):
    """DistriFusion's corrected asynchronous norm and padded input, in its order of ops and in the dtype of `x`.

    `stale` is (num_parts, 2, n, num_groups, 1, 1, 1): mean and mean square of every patch, a step old.
    """
    n, c, h, w = x.shape
    grouped = x.reshape(n, num_groups, c // num_groups, h, w)
    mean = grouped.mean(dim=(2, 3, 4), keepdim=True)
    square = (grouped**2).mean(dim=(2, 3, 4), keepdim=True)
    fresh = torch.stack((mean, square))
    image_mean, image_square = stale.mean(dim=0) + (fresh - stale[own])
    var = image_square - image_mean**2
    var = torch.where(var < 0, square - mean**2, var)
    count = c // num_groups * h * w
    std = (var * (count / (count - 1)) + eps).sqrt()
    y = ((grouped - image_mean) / std).reshape(n, c, h, w)
    y = F.silu(y * weight.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1))
    borders = torch.stack((y[:, :, :1], y[:, :, -1:]))
    return F.pad(torch.cat((above, y, below), dim=2), (1, 1, 0, 0)), borders


if triton is not None:

    @triton.jit
    def _group_kernel(
        x_ptr, weight_ptr, bias_ptr, y_ptr, stride_n, stride_c, stride_p, num_pixels, eps,
        GROUP_CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        g = tl.program_id(0)
        n = tl.program_id(1).to(tl.int64)
        channel = tl.arange(0, BLOCK_C)
        offs_c = g * GROUP_CHANNELS + channel
        mask_c = channel < GROUP_CHANNELS
        base = n * stride_n + offs_c[None, :].to(tl.int64) * stride_c
        first = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        second = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(0, num_pixels, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            mask = (offs_p < num_pixels)[:, None] & mask_c[None, :]
            offs = base + offs_p[:, None].to(tl.int64) * stride_p
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            first += x
            second += x * x
        count = GROUP_CHANNELS * num_pixels
        mean = tl.sum(tl.sum(first, axis=0), axis=0) / count
        var = tl.sum(tl.sum(second, axis=0), axis=0) / count - mean * mean
        a = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) / tl.sqrt(var + eps)
        b = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) - mean * a
        for start in range(0, num_pixels, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            mask = (offs_p < num_pixels)[:, None] & mask_c[None, :]
            offs = base + offs_p[:, None].to(tl.int64) * stride_p
            y = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) * a[None, :] + b[None, :]
            tl.store(y_ptr + offs, (y * tl.sigmoid(y)).to(y_ptr.dtype.element_ty), mask=mask)


def one_program_per_group(x, weight, bias, num_groups, eps, above, below):
    """Norm and SiLU by one program a group, as usual Triton kernels do it; then concatenation."""
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    block_c = triton.next_power_of_2(c // num_groups)
    _group_kernel[num_groups, n](
        x, weight, bias, y, x.stride(0), x.stride(1), x.stride(3), h * w, eps,
        GROUP_CHANNELS=c // num_groups, BLOCK_P=max(16, 4096 // block_c), BLOCK_C=block_c, num_warps=8,
    )  # fmt: skip
    return torch.cat((above, y, below), dim=2), torch.cat((y[:, :, :1], y[:, :, -1:]))
