"""The launches of the small fusions that are compiled for every target: shapes of SDXL, SD3 and Flux."""

from functools import partial

import torch
from asyncdiff_fast.kernels.add_norm import add_layer_norm
from asyncdiff_fast.kernels.pointwise import gate_residual_adaln, geglu, gelu
from asyncdiff_fast.kernels.qk_norm_rope import qk_norm_rope
from compile_kernels import Variant
from ring_views import key_value


def tensor(*shape, dtype=torch.bfloat16):
    """Memory that nobody touches."""
    return torch.empty(shape, dtype=dtype)


def adaln(columns, branch=True, dtype=torch.bfloat16):
    x = tensor(1, 64, columns, dtype=dtype)
    gate, scale, shift = tensor(1, 6 * columns, dtype=dtype).chunk(6, dim=1)[:3]
    gate_residual_adaln(x, x if branch else None, gate if branch else None, scale, shift)


def added(columns, dtype=torch.bfloat16, weights=True):
    x, weight = tensor(1, 64, columns, dtype=dtype), tensor(columns, dtype=dtype) if weights else None
    add_layer_norm(x, x, weight, weight)


def qk(heads, head_size, interleaved=True, rope=True):
    q, weight = tensor(1, 64, heads, head_size), tensor(head_size)
    key, value = key_value(tensor(128, 1, 2, heads, head_size)[64:])
    tables = {name: tensor(64, head_size, dtype=torch.float32) for name in ("cos", "sin")} if rope else {}
    qk_norm_rope(q, q, q, q_weight=weight, k_weight=weight, **tables, interleaved=interleaved, k_out=key, v_out=value)


GELU, ADALN, QK = ("_gelu_kernel",), ("_gate_residual_adaln_kernel",), ("_qk_norm_rope_kernel",)
ADDED = ("_add_layer_norm_kernel",)
VARIANTS = [
    Variant("geglu 2560", lambda: geglu(tensor(64, 5120)), GELU),
    Variant(
        "geglu 5120, tanh, float32", lambda: geglu(tensor(64, 10240, dtype=torch.float32), approximate="tanh"), GELU
    ),
    Variant("gelu into a view", lambda: gelu(tensor(1, 64, 12288), out=tensor(1, 64, 15360)[..., 3072:]), GELU),
    *(Variant(f"adaln {columns}", partial(adaln, columns), ADALN) for columns in (640, 1536, 3072)),
    Variant("adaln 3072, no branch", partial(adaln, 3072, branch=False), ADALN),
    Variant("adaln 5120, float32", partial(adaln, 5120, dtype=torch.float32), ADALN),
    *(Variant(f"sum and norm {columns}", partial(added, columns, torch.float16), ADDED) for columns in (640, 1280)),
    Variant("sum and norm 320, float32, no weights", partial(added, 320, torch.float32, False), ADDED),
    Variant("norm and rope 24 × 128", partial(qk, 24, 128), QK),
    Variant("norm and rope 24 × 128, halves", partial(qk, 24, 128, interleaved=False), QK),
    Variant("norm 24 × 64", partial(qk, 24, 64, rope=False), QK),
]
