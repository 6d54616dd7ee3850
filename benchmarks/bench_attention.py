"""Self-attention of one patch over the keys and values of all: our kernel, and the library with and without `cat`.

    python benchmarks/bench_attention.py --quick       # 3 minutes on a GPU; without it every shape, for an hour or so

The kernel's result is compared with the reference before it is timed. Rows as in bench_group_norm.py.
"""

import functools
import itertools
from dataclasses import dataclass

import op_bench
import torch
import torch.nn.functional as F
from asyncdiff_fast.kernels.reference_attention import attention_reference
from torch.nn.attention import SDPBackend, sdpa_kernel

from asyncdiff_fast.exchange.world import World
from asyncdiff_fast.fused import attention_ops
from asyncdiff_fast.fused.choice import KernelChoice

# Norm of the difference over norm of the reference: rounding of the probabilities and of the result.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Queries that are compared.
CHECKED = 64


@dataclass(frozen=True)
class Shape:
    """One layer: tokens of the whole picture, of which a patch has its part, and of the text; heads and their size."""

    model: str
    px: int
    patches: int
    image: int
    text: int
    heads: int
    head_size: int

    @property
    def queries(self):
        """Tokens that one patch computes."""
        return self.text + self.image // self.patches


def shapes(device, quick):
    """Every layer of SDXL with self-attention, of SD3 and of FLUX, the largest pictures first."""
    if device == "cpu":
        yield from (Shape("tiny", 64, 2, 32, 0, 2, 16), Shape("tiny", 64, 2, 32, 7, 2, 16))
        return
    all_px, all_patches = ((3840, 1024), (8, 1)) if quick else ((3840, 2048, 1024), (8, 4, 2, 1))
    for px, patches in itertools.product(all_px, all_patches):
        for heads, factor in ((10, 16), (20, 32)):
            yield Shape("sdxl", px, patches, (px // factor) ** 2, 0, heads, 64)
    for px, patches in itertools.product((2048, 1024), all_patches):
        for model, text, head_size in (("sd3", 333, 64), ("flux", 512, 128)):
            yield Shape(model, px, patches, (px // 16) ** 2, text, 24, head_size)


class Inputs:
    """Queries of text and patch, apart and joined; keys and values in a ring, and again part by part."""

    def __init__(self, shape, dtype, device):
        own = shape.image // shape.patches
        sizes = [shape.text] * bool(shape.text) + [own] * shape.patches
        ring = torch.randn(sum(sizes), 1, 2, shape.heads, shape.head_size, device=device).to(dtype)
        queries = (shape.text, own) if shape.text else (own,)
        self.queries = tuple(
            torch.randn(1, size, shape.heads, shape.head_size, device=device).to(dtype) for size in queries
        )
        self.query = torch.cat(self.queries, 1)
        self.parts = [tuple(x.clone() for x in key_value(part)) for part in ring.split(sizes)]
        self.whole = [key_value(ring)]
        # As a rank without a ring that spans both would have them.
        text = [key_value(ring[: shape.text])] if shape.text else []
        self.segments = [*text, key_value(ring[shape.text :])]
        self.flops = 4 * shape.heads * shape.head_size * shape.queries * (shape.text + shape.image)


def key_value(tokens):
    """(key, value), each a (b, s, h, d) view of tokens (s, b, 2, h, d), as a patch's ring has them."""
    return tuple(x.transpose(0, 1) for x in tokens.unbind(2))


def kernel_ops(inputs):
    """Name → callable of the kernel: keys divided between programs as `tuning` has it, or not; one view or segments."""
    from asyncdiff_fast.kernels.attention import attention

    made = {"attention, ahead": lambda: attention(inputs.queries, inputs.whole, ahead=True)}
    head_size = inputs.query.shape[-1]
    return (made if head_size & (head_size - 1) == 0 else {}) | {
        "attention": lambda: attention(inputs.queries, inputs.whole),
        "attention, keys undivided": lambda: attention(inputs.queries, inputs.whole, num_splits=1),
        "attention, segments": lambda: attention(inputs.queries, inputs.segments),
    }


def baseline_ops(inputs, device):
    """Name → callable of the library on concatenated parts, as published code has them, and on the ring's view."""

    def joined():
        # Diffusers joins text and picture, DistriFusion the patches.
        query = torch.cat(inputs.queries, 1) if len(inputs.queries) > 1 else inputs.query
        parts = zip(*inputs.parts, strict=True)
        return query, *(torch.cat(x, 1) if len(x) > 1 else x[0] for x in parts)

    def viewed():
        return inputs.query, *inputs.whole[0]

    made = {}
    for source, tensors in (("cat", joined), ("ring", viewed)):
        made[f"{source}, torch"] = lambda tensors=tensors: library(*tensors())
        for name, backend in BACKENDS.items():
            made[f"{source}, {name}"] = lambda tensors=tensors, backend=backend: library(*tensors(), backend)
    if device == "cuda":
        # Anew for each shape: past a number of shapes dynamo would quietly run eagerly.
        torch.compiler.reset()
        made["cat, torch.compile"] = torch.compile(lambda: library(*joined()), dynamic=False)
        made["auto"] = chosen(inputs)
    return made


def library(query, key, value, backend=None):
    """Torch's attention on (b, s, h, d), by its own choice or by one backend."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def chosen(inputs):
    """What `kernels="auto"` takes for the joined queries and the ring's view; measured here if it is not known."""
    [(key, value)] = inputs.whole

    def run(kernel):
        return attention_ops.attention(inputs.query, [key], [value], inputs.query.shape[-1] ** -0.5, kernel)

    kernel = KernelChoice("auto", World([0], 1.0)).pick("attention", inputs.query, ((key.shape[1],),), run)
    return lambda: run(kernel)


def check(inputs, kernels):
    """Raise unless the kernel gives what the reference gives for the first queries."""
    queries = tuple(q[:, :CHECKED].float() for q in inputs.queries)
    want = attention_reference(queries, [tuple(x.float() for x in inputs.whole[0])])
    for name, run in kernels.items():
        got = run()
        for mine, right in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
            error = ((mine[:, :CHECKED].float() - right).norm() / right.norm()).item()
            # NaN is no smaller than anything.
            if not error <= TOLERANCE[inputs.query.dtype]:
                raise AssertionError(f"{name} is off by {error:.1e} on {tuple(inputs.query.shape)}")


def ways(shape, dtype, device):
    """{op: (run, bytes, FLOPs)} of one layer."""
    inputs = Inputs(shape, dtype, device)
    made = baseline_ops(inputs, device)
    if device == "cuda":
        kernels = kernel_ops(inputs)
        check(inputs, kernels)
        made |= kernels
    else:
        made["reference"] = lambda: attention_reference(inputs.queries, inputs.whole)
    return {name: (run, None, inputs.flops) for name, run in made.items()}


def main(argv=None):
    options = op_bench.parse(argv, __doc__.splitlines()[0], "attention", 180)
    dtypes = (torch.float32,) if options.device == "cpu" else (torch.bfloat16,)
    if options.device == "cuda" and not options.quick:
        dtypes += (torch.float16,)
    cases = []
    for shape, dtype in itertools.product(shapes(options.device, options.quick), dtypes):
        key = {"model": shape.model, "px": shape.px, "patches": shape.patches, "dtype": str(dtype)}
        key["shape"] = [shape.queries, shape.text + shape.image, shape.heads, shape.head_size]
        cases.append((key, functools.partial(ways, shape, dtype, options.device)))
    op_bench.add_rows(options, cases)


if __name__ == "__main__":
    main()
