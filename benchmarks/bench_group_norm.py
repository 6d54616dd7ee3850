"""GroupNorm + SiLU of an SDXL patch with its halo rows: kernels, their passes and baselines, in one run.

    python benchmarks/bench_group_norm.py --quick       # 4 minutes on a GPU; without it every shape, for an hour or two

Each result is compared with the reference before it is timed. A run that is broken off continues where it was.
"""

import functools
import itertools

import group_norm_baselines as baselines
import op_bench
import torch
from asyncdiff_fast.kernels import reference

GROUPS, EPS = 32, 1e-5
# Norms in SDXL's residual blocks: factor between latent and level → channels → how many. The usual channels come first.
NORMS = {
    1: {320: 7, 640: 2, 960: 1},
    2: {640: 6, 320: 1, 960: 1, 1280: 1, 1920: 1},
    4: {1280: 10, 640: 1, 1920: 1, 2560: 2},
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def shapes(device, quick):
    """(pixels, patches, (n, c, h, w)) of every norm, the largest pictures first."""
    if device == "cpu":
        yield 64, 2, (1, 64, 4, 8)
        return
    for px, patches in itertools.product(
        (3840, 1024) if quick else (3840, 2048, 1024), (8, 1) if quick else (8, 4, 2, 1)
    ):
        for factor, channels in NORMS.items():
            side = px // 8 // factor
            for c in list(channels)[:1] if quick else channels:
                yield px, patches, (1, c, side // patches, side)


class Inputs:
    """One patch's tensors in one layout: activation, parameters, neighbours' rows, parts, and buffers to write."""

    def __init__(self, shape, layout, dtype, device):
        n, c, _, w = shape
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

        def made(*size):
            return torch.randn(size, device=device).to(dtype).contiguous(memory_format=memory_format)

        self.x, self.other = made(*shape), made(*shape)
        self.weight, self.bias, self.conv_bias, temb = (torch.randn(c, device=device).to(dtype) for _ in range(4))
        self.temb = temb.expand(n, c).contiguous()
        self.above, self.below, self.top, self.bottom = (made(n, c, 1, w) for _ in range(4))
        self.parts = torch.stack((torch.randn(8, n, GROUPS), torch.ones(8, n, GROUPS)), dim=3).to(device)
        self.affine = torch.randn(n, 2, c, device=device)
        moments = torch.stack((self.parts[..., 0], self.parts[..., 0].square() + self.parts[..., 1]), dim=1)
        self.stale = moments[..., None, None, None].to(dtype)

    def norm(self):
        """Arguments of a norm with everything folded in, in corrected mode."""
        return (self.x, self.weight, self.bias, GROUPS, EPS), {
            "act": "silu", "conv_bias": self.conv_bias, "temb": self.temb,
            "mode": "corrected", "parts": self.parts, "own": 3,
            "halo": (1, 1), "above": self.above, "below": self.below, "top": self.top, "bottom": self.bottom,
        }  # fmt: skip

    def border_bytes(self):
        """Rows read and packed, and halo rows written."""
        return 6 * self.above.nbytes


def kernel_ops(inputs):
    """Name → (callable, bytes it has to move at least) of the kernels and their passes."""
    from asyncdiff_fast.kernels import group_norm
    from asyncdiff_fast.kernels.group_norm_small import group_norm_small

    arguments, keywords = inputs.norm()
    merge = {name: keywords[name] for name in ("conv_bias", "temb", "mode", "parts", "own")}
    write = {name: keywords[name] for name in ("act", "halo", "above", "below", "top", "bottom")}
    once, rows = inputs.x.nbytes, inputs.border_bytes()
    partials = group_norm.group_norm_partials(inputs.x)

    def three_launches():
        made = group_norm.group_norm_partials(inputs.x)
        affine, stats = group_norm.group_norm_merge(made, inputs.x.shape[2:], *arguments[1:], **merge)
        return group_norm.group_norm_apply(inputs.x, affine, **write), stats

    return {
        "group_norm": (lambda: group_norm.group_norm(*arguments, **keywords), 3 * once + rows),
        "group_norm, three launches": (three_launches, 3 * once + rows),
        "group_norm, one launch": (lambda: group_norm_small(*arguments, **keywords), 3 * once + rows),
        "group_norm, partials known": (
            lambda: group_norm.group_norm(*arguments, **keywords, partials=partials),
            2 * once + rows,
        ),
        "partials": (lambda: group_norm.group_norm_partials(inputs.x), once),
        "merge": (lambda: group_norm.group_norm_merge(partials, inputs.x.shape[2:], *arguments[1:], **merge), None),
        "apply": (lambda: group_norm.group_norm_apply(inputs.x, inputs.affine, **write), 2 * once + rows),
        "residual_partials": (lambda: group_norm.residual_partials(inputs.x, inputs.other), 3 * once),
    }


def baseline_ops(inputs, device):
    """Name → (callable, None) of what the kernels replace."""
    around = (inputs.x, inputs.weight, inputs.bias, GROUPS, EPS, inputs.above, inputs.below)
    ops = {
        "torch": lambda: baselines.torch_ops(*around),
        "DistriFusion's formula": lambda: baselines.distrifusion(*around, inputs.stale, 3),
        "copy of the tensor": lambda: torch.empty_like(inputs.x).copy_(inputs.x),
    }
    if device == "cuda":
        ops["one program per group"] = lambda: baselines.one_program_per_group(*around)
        # Anew for each shape: past a number of shapes dynamo would quietly run eagerly.
        torch.compiler.reset()
        compiled = torch.compile(baselines.torch_ops, dynamic=False)
        ops["torch.compile"] = lambda: compiled(*around)
    moved = {"copy of the tensor": 2 * inputs.x.nbytes}
    return {name: (run, moved.get(name)) for name, run in ops.items()}


def check(inputs, ops):
    """Raise unless the kernels give what the reference gives, border rows included."""
    arguments, keywords = inputs.norm()
    want, stats = reference.group_norm_reference(*arguments, **keywords)
    borders = inputs.top.clone(), inputs.bottom.clone()
    tolerance = TOLERANCE[want.dtype]
    for name in (f"group_norm, {launches}" for launches in ("three launches", "one launch")):
        inputs.top.fill_(torch.nan)
        inputs.bottom.fill_(torch.nan)
        y, own = ops[name][0]()
        for got, right in zip((y, inputs.top, inputs.bottom), (want, *borders), strict=True):
            torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(own, stats, rtol=1e-5, atol=1e-5)


def ways(shape, layout, dtype, device):
    """{op: (run, bytes, FLOPs)} of one norm."""
    inputs = Inputs(shape, layout, dtype, device)
    ops = baseline_ops(inputs, device)
    if device == "cuda":
        kernels = kernel_ops(inputs)
        check(inputs, kernels)
        ops |= kernels
    else:
        arguments, keywords = inputs.norm()
        ops["reference"] = (lambda: reference.group_norm_reference(*arguments, **keywords), None)
    return {name: (run, moved, None) for name, (run, moved) in ops.items()}


def main(argv=None):
    options = op_bench.parse(argv, __doc__.splitlines()[0], "group_norm", 210)
    layouts = ("channels_last", "contiguous")
    dtypes = (torch.bfloat16,) if options.quick or options.device == "cpu" else (torch.bfloat16, torch.float16)
    cases = []
    for (px, patches, shape), layout, dtype in itertools.product(
        shapes(options.device, options.quick), layouts, dtypes
    ):
        key = {"px": px, "patches": patches, "shape": list(shape), "layout": layout, "dtype": str(dtype)}
        cases.append((key, functools.partial(ways, shape, layout, dtype, options.device)))
    op_bench.add_rows(options, cases)


if __name__ == "__main__":
    main()
