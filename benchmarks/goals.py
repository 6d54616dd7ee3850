"""What the kernels are to reach, and what rows say of it: targets until a GPU has measured them, and after it too."""

import math
from collections.abc import Callable
from typing import NamedTuple

import roofline
from bench_group_norm import NORMS, shapes

LARGE, MEDIUM = 64e6, 8e6


class Goal(NamedTuple):
    """`measured(rows)` gives a figure for each shape that the goal is about; the worst of them must reach `least`."""

    what: str
    least: float
    measured: Callable
    form: str = ".2f"


def faster(own, baseline, where=lambda setting, shape: True):
    """How many times as fast as a baseline `own` is; either may be several: then the best of them counts."""
    sides = [(names,) if isinstance(names, str) else names for names in (own, baseline)]

    def measured(rows):
        for ops in _shapes(rows, where):
            mine, times = ([ops[name]["median_s"] for name in names if name in ops] for names in sides)
            if mine and times:
                yield min(times) / min(mine)

    return measured


def chain(own, baseline):
    """As `faster`, of all norms in SDXL's residual blocks together, at 3840 pixels and 8 patches, layout by layout."""
    last = [(shape, NORMS[px // 8 // shape[3]][shape[1]]) for px, patches, shape in shapes("cuda", False)
            if (px, patches) == (3840, 8)]  # fmt: skip

    def measured(rows):
        for setting, found in roofline.by_setting(rows).items():
            ops = [(found.get(shape, {}), count) for shape, count in last]
            if _of(px=3840, patches=8)(dict(setting), ()) and all(own in o and baseline in o for o, _ in ops):
                yield sum(n * o[baseline]["median_s"] for o, n in ops) / sum(n * o[own]["median_s"] for o, n in ops)

    return measured


def share(own, where=lambda setting, shape: True):
    """Share of the device's copy bandwidth."""

    def measured(rows):
        yield from (ops[own]["share_of_copy"] for ops in _shapes(rows, where) if own in ops)

    return measured


def _shapes(rows, where):
    for setting, found in roofline.by_setting(rows).items():
        for shape, ops in found.items():
            if where(dict(setting), shape):
                yield ops


def _of(size=0, **wanted):
    """Shapes of at least `size` bytes in half precision, with these values in their key."""

    def where(setting, shape):
        return 2 * math.prod(shape) >= size and all(setting.get(name) == value for name, value in wanted.items())

    return where


def _attention(heads=None, head_size=None, **wanted):
    """Attention with these heads."""

    def where(setting, shape):
        fits = heads in (None, shape[2]) and head_size in (None, shape[3])
        return fits and all(setting.get(name) == value for name, value in wanted.items())

    return where


_LAST, _SMALL = dict(px=3840, patches=8), dict(px=1024, patches=8)
_LIBRARY = ("ring, torch", "ring, cudnn", "ring, flash")
GOALS = {
    "group_norm": (
        Goal("statistics, merge, norm and halo, tensors of 64 MB and more, of copy bandwidth", 0.85,
             share("group_norm", _of(LARGE)), ".0%"),
        Goal("the norm's pass alone, tensors of 64 MB and more, of copy bandwidth", 0.9,
             share("apply", _of(LARGE)), ".0%"),
        Goal("against `F.group_norm`, SiLU and `cat`, 8 MB and more", 6, faster("group_norm", "torch", _of(MEDIUM))),
        Goal("against DistriFusion's formula in eager torch, 8 MB and more", 4,
             faster("group_norm", "DistriFusion's formula", _of(MEDIUM))),
        Goal("the same at 1024 pixels and 8 patches, both as CUDA graphs", 3,
             faster("group_norm", "DistriFusion's formula", _of(**_SMALL))),
        Goal("against one Triton program per group, 8 MB and more", 3,
             faster("group_norm", "one program per group", _of(MEDIUM))),
        Goal("all norms in SDXL's residual blocks at 3840 pixels and 8 patches, against DistriFusion's formula", 3.5,
             chain("group_norm", "DistriFusion's formula")),
    ),
    "attention": (
        Goal("head size 64, SDXL at 3840 pixels and 8 patches, 10 heads, against cuDNN on the same ring", 0.85,
             faster("attention", "ring, cudnn", _attention(10, **_LAST))),
        Goal("head size 128, FLUX at 2048 pixels and 8 patches, against cuDNN on the same ring", 0.65,
             faster(("attention", "attention, ahead"), "ring, cudnn", _attention(head_size=128, px=2048, patches=8))),
        Goal("cuDNN on a ring against `cat` and cuDNN, SDXL at 3840 pixels and 8 patches, 10 heads", 1.02,
             faster("ring, cudnn", "cat, cudnn", _attention(10, **_LAST))),
        Goal("the same, 20 heads", 1.08, faster("ring, cudnn", "cat, cudnn", _attention(20, **_LAST))),
        Goal("the same, SDXL at 1024 pixels and 8 patches", 1.25,
             faster("ring, cudnn", "cat, cudnn", _attention(model="sdxl", **_SMALL))),
        Goal("keys divided between programs against `cat` and cuDNN, SDXL at 1024 pixels and 8 patches, 10 heads", 1.5,
             faster("attention", "cat, cudnn", _attention(10, **_SMALL))),
        Goal("the same at 2048 pixels", 1.25, faster("attention", "cat, cudnn", _attention(10, px=2048, patches=8))),
        Goal("automatic choice against the best on the ring, every shape", 0.97,
             faster("auto", (*_LIBRARY, "attention"))),
    ),
    "pointwise": (
        Goal("every fusion, 32 MB and more, of copy bandwidth", 0.85, share("kernel", _of(32e6)), ".0%"),
        Goal("GEGLU against eager torch, 32 MB and more", 1.6, faster("kernel", "torch", _of(32e6, fusion="geglu"))),
        Goal("gate, sum and modulated norm against eager torch, 32 MB and more", 2.5,
             faster("kernel", "torch", _of(32e6, fusion="gate_residual_adaln"))),
        Goal("norm and rotation of queries and keys against eager torch, FLUX, 8 MB and more", 8,
             faster("kernel", "torch", _of(MEDIUM, fusion="joint_qk_norm_rope", model="flux"))),
        Goal("automatic choice against the best, every shape", 0.97, faster("auto", ("kernel", "torch"))),
    ),
}  # fmt: skip


def lines(name, rows):
    """[what, goal, measured] of each goal of a benchmark: the worst shape, its distance from the goal said plainly."""
    made = []
    for goal in GOALS[name]:
        sign = "" if goal.form.endswith("%") else "×"
        found = list(goal.measured(rows))
        told = "not measured"
        if found:
            told = f"{min(found):{goal.form}}{sign}" + ("" if min(found) >= goal.least else ", missed")
        made.append([goal.what, f"{goal.least:{goal.form}}{sign}", told])
    return made


if __name__ == "__main__":
    for name in GOALS:
        for what, goal, told in lines(name, roofline.latest(name)):
            print(f"ROW {name}, {what}: {told}; goal {goal}")
