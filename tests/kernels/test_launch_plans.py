"""What a launcher works out is worked out once for each layout; from then on a launch looks it up, and nothing else."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from asyncdiff_fast.kernels import plans

from asyncdiff_fast.fused import attention_ops, ops, patch_ops

triton = pytest.importorskip("triton")
KERNELS = str(Path(plans.__file__).parent)


def test_a_plan_is_made_once_for_each_layout_and_option():
    made = []

    @plans.planned
    def plan(x, y, option):
        made.append((x.shape, x.stride(), x.dtype, x.device.type, y, option))
        if option == "refused":
            raise ValueError("not this one")
        return x

    x = torch.zeros(2, 3)
    assert plan((x, None), 1) is plan((torch.ones(2, 3), None), 1)
    for other in (x.t(), x.half(), torch.zeros(3, 3)):
        plan((other, None), 1)
    plan((x, None), 2)
    assert len(made) == 5 and made[0] == ((2, 3), (3, 1), torch.float32, "meta", None, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="not this one"):
            plan((x, None), "refused")
    assert len(made) == 7


@pytest.mark.parametrize("n", range(70))
def test_sizes_are_those_of_triton(n):
    assert plans.power_of_2(n) == triton.next_power_of_2(n)
    assert plans.ceil_div(n, 7) == triton.cdiv(n, 7)


def _calls():
    """{op: function that launches it}."""
    x, w, t, rows = torch.zeros(2, 32, 64, 64), torch.ones(32), torch.ones(2, 32), torch.zeros(2, 32, 1, 64)
    tokens, wide, mod, parts = torch.zeros(2, 64, 32), torch.zeros(2, 64, 64), torch.ones(2, 32), torch.ones(2, 2, 8, 2)
    heads, long = torch.zeros(2, 64, 4, 16), torch.zeros(1, 1024, 1, 16)
    around = dict(halo=[1, 1], silu=True, temb=t, combine="corrected", parts=parts, above=rows, top=rows)
    return {
        "group_norm": lambda: ops.group_norm(x, w, w, 8, 1e-5, True, w, t, None, None, None, "triton"),
        "small": lambda: ops.group_norm(x[:, :, :4, :4].contiguous(), w, w, 8, 1e-5, True, *[None] * 5, "triton"),
        "residual_add": lambda: ops.residual_add(x, x, w, 1.0, "triton"),
        "geglu": lambda: ops.geglu(wide, "triton"),
        "gate_residual_adaln": lambda: ops.gate_residual_adaln(tokens, tokens, mod, mod, mod, 1e-6, "triton"),
        "add_layer_norm": lambda: ops.add_layer_norm(tokens, tokens, w, None, 1e-5, "triton"),
        "joint_qk_norm_rope": lambda: attention_ops.joint_qk_norm_rope(
            [heads], [heads], [heads], [torch.ones(16)], [torch.ones(16)], 1e-6, None, None, "triton"
        ),
        "attention": lambda: attention_ops.attention(
            heads, [heads, heads[:, :7]], [heads, heads[:, :7]], 0.25, "triton"
        ),
        "divided attention": lambda: attention_ops.attention(long, [long], [long], 0.25, "triton"),
        "patch_group_norm": lambda: patch_ops.patch_group_norm(x, w, w, 8, 1e-5, "triton", **around),
    }


@pytest.mark.parametrize("name", _calls())
def test_a_launch_of_a_known_layout_neither_checks_nor_counts(name, monkeypatch):
    launched, counts, call = [], Counter(), _calls()[name]
    # Where no device is, a launch ends before Triton's own part.
    monkeypatch.setattr(triton.runtime.JITFunction, "run", lambda self, *a, **k: launched.append(self.fn.__name__))

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(KERNELS):
            counts[Path(frame.f_code.co_filename).stem] += 1

    call()
    first = len(launched)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert len(launched) == 2 * first > 0
    assert not counts["checks"] and not counts["tuning"], counts
    # Of all launches of an op: its launchers, a plan and what is made of it.
    assert sum(counts.values()) <= 8 * first, counts
