"""The small fusions at the sizes of SDXL, SD3 and FLUX: one pass each, against torch's ops, eager and compiled.

    python benchmarks/bench_pointwise.py --quick       # 2 minutes on a GPU; without it every shape, for half an hour

Each result is compared with torch's in float32 before it is timed. Rows as in bench_group_norm.py.
"""

import functools
import itertools

import op_bench
import torch

from asyncdiff_fast.exchange.world import World
from asyncdiff_fast.fused import attention_ops, ops
from asyncdiff_fast.fused.choice import KernelChoice

# Rounding of the result, in units of the largest element or 1; torch's own rounds in between too.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def geglu(tokens, columns, made):
    """Feed-forward of SDXL: (arguments, tensors' worth of (tokens, columns) that are moved at least)."""
    return (made(1, tokens, 2 * columns),), 3


def adaln(tokens, columns, made):
    """First norm of a DiT block."""
    return (made(1, tokens, columns), *(made(1, columns) for _ in range(2)), 1e-6), 2


def gate_residual_adaln(tokens, columns, made):
    """Gate, residual sum and second norm of a DiT block."""
    return (*(made(1, tokens, columns) for _ in range(2)), *(made(1, columns) for _ in range(3)), 1e-6), 4


def add_layer_norm(tokens, columns, made):
    """A branch of SDXL's transformers: residual sum and the next norm."""
    return (*(made(1, tokens, columns) for _ in range(2)), *(made(columns) for _ in range(2)), 1e-5), 4


def gelu_beside(tokens, columns, made):
    """FLUX's single block: GELU of four times the columns beside the attention's result."""
    return (made(1, tokens, columns), made(1, tokens, 4 * columns), "tanh"), 10


def joint_qk_norm_rope(tokens, columns, made, head_size, text, rope):
    """Queries, keys and values of text and picture normalised, rotated and put together."""
    heads = columns // head_size
    projected = [[made(1, size, heads, head_size) for size in (text, tokens - text)] for _ in range(3)]
    weights = [[made(head_size) for _ in range(2)] for _ in range(2)]
    tables = [made(tokens, head_size).float() for _ in range(2)] if rope else [None, None]
    return (*projected, *weights, 1e-6, *tables), 6


# What each model has: op, columns, factor between pixels and tokens, tokens of text among them.
LAYERS = {
    "sdxl": (
        (geglu, 2560, 16, 0),
        (geglu, 5120, 32, 0),
        (add_layer_norm, 640, 16, 0),
        (add_layer_norm, 1280, 32, 0),
    ),
    "sd3": (
        (adaln, 1536, 16, 0),
        (gate_residual_adaln, 1536, 16, 0),
        (functools.partial(joint_qk_norm_rope, head_size=64, text=333, rope=False), 1536, 16, 333),
    ),
    "flux": (
        (adaln, 3072, 16, 0),
        (gate_residual_adaln, 3072, 16, 0),
        (gelu_beside, 3072, 16, 512),
        (functools.partial(joint_qk_norm_rope, head_size=128, text=512, rope=True), 3072, 16, 512),
    ),
}
TINY = {
    "tiny": (
        (geglu, 40, 16, 0),
        (adaln, 48, 16, 0),
        (gate_residual_adaln, 48, 16, 0),
        (add_layer_norm, 48, 16, 0),
        (gelu_beside, 24, 16, 3),
        (functools.partial(joint_qk_norm_rope, head_size=16, text=3, rope=True), 48, 16, 3),
    )
}


def cases(device, quick):
    """(model, pixels, patches, layer) of every fusion, the largest pictures first."""
    if device == "cpu":
        yield from (("tiny", 64, 2, layer) for layer in TINY["tiny"])
        return
    for model, layers in LAYERS.items():
        all_px = (3840, 2048, 1024) if model == "sdxl" else (2048, 1024)
        if quick:
            all_px = (all_px[0], 1024)
        yield from itertools.product((model,), all_px, (8, 1) if quick else (8, 4, 2, 1), layers)


def op_of(layer):
    """The op that a layer's function is named for."""
    name = getattr(layer[0], "func", layer[0]).__name__
    return getattr(ops, name, None) or getattr(attention_ops, name)


def inputs(px, patches, layer, dtype, device):
    """(arguments of the op but the kernel, bytes that it moves at least)."""
    make, columns, factor, text = layer
    tokens = text + (px // factor) ** 2 // patches

    def made(*size):
        return torch.randn(size, device=device).to(dtype)

    arguments, times = make(tokens, columns, made)
    return arguments, times * tokens * columns * dtype.itemsize


def check(op, arguments):
    """Raise unless the kernel gives what torch gives in float32."""
    dtype = next(_tensors(arguments)).dtype
    want = op(*_wide(arguments), "torch")
    for mine, right in zip(_tensors(op(*arguments, "triton")), _tensors(want), strict=True):
        error = ((mine.float() - right).abs().max() / right.abs().max().clamp(min=1)).item()
        # NaN is no smaller than anything.
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"{op.__name__} is off by {error:.1e} on {tuple(mine.shape)}")


def _tensors(tree):
    """The tensors of nested tuples and lists, or the one there is."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from _tensors(part)


def _wide(tree):
    """The same arguments in float32."""
    if isinstance(tree, tuple | list):
        return type(tree)(map(_wide, tree))
    return tree.float() if isinstance(tree, torch.Tensor) else tree


def ways(px, patches, layer, dtype, device):
    """{op: (run, bytes, FLOPs)} of one fusion at one size."""
    op, (arguments, moved) = op_of(layer), inputs(px, patches, layer, dtype, device)
    source = next(_tensors(arguments))

    def run(kernel):
        return op(*arguments, kernel)

    made = {"torch": lambda: run("torch"), "copy": lambda: torch.empty_like(source).copy_(source)}
    if device == "cuda":
        check(op, arguments)
        # Anew for each shape: past a number of shapes dynamo would quietly run eagerly.
        torch.compiler.reset()
        compiled = torch.compile(lambda: run("torch"), dynamic=False)
        choice = KernelChoice("auto", World([0], 1.0)).pick(op.__name__, source, (len(arguments),), run)
        made |= {"kernel": lambda: run("triton"), "torch.compile": compiled, "auto": lambda: run(choice)}
    return {name: (call, 2 * source.nbytes if name == "copy" else moved, None) for name, call in made.items()}


def main(argv=None):
    options = op_bench.parse(argv, __doc__.splitlines()[0], "pointwise", 90)
    dtype, found = torch.float32 if options.device == "cpu" else torch.bfloat16, []
    for model, px, patches, layer in cases(options.device, options.quick):
        _, columns, factor, text = layer
        key = {"fusion": op_of(layer).__name__, "model": model, "px": px, "patches": patches, "dtype": str(dtype)}
        key["shape"] = [text + (px // factor) ** 2 // patches, columns]
        found.append((key, functools.partial(ways, px, patches, layer, dtype, options.device)))
    op_bench.add_rows(options, found)


if __name__ == "__main__":
    main()
