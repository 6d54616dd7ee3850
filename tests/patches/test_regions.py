"""Denoisers that count on the picture's size around their blocks: patches work between the first and the last."""

import ranks
import region_nets
import torch
from patch_runs import assert_refused, difference, outcome, twice
from region_nets import RIGHT, build, steps

import asyncdiff_fast


@torch.no_grad()
def _all(rank):
    found = {}
    for kind in RIGHT:
        net = build(kind)
        for mode in ("sync", "displaced"):
            found[kind.__name__, mode], result = twice(net, steps, exchange=mode)
        found[kind.__name__, "results"] = result
    for kind in (region_nets.Plain, region_nets.Square):
        net = build(kind)
        found["displaced", kind] = outcome(net, lambda net=net: steps(net), warmup_steps=1)
    for kind in (region_nets.Chooses, region_nets.Hidden, region_nets.Banded):
        net = build(kind)
        found[kind.__name__] = outcome(net, lambda net=net: steps(net), exchange="sync")
    return found


def test_blocks_alone_are_shared_out():
    by_rank = ranks.run(2, _all)
    wrong = []
    for kind in RIGHT:
        for mode, limit in (("sync", 1e-5), ("displaced", 0.5)):
            errors = [rank[kind.__name__, mode] for rank in by_rank]
            if not all(isinstance(e, float) and e <= limit for e in errors):
                wrong.append(f"{kind.__name__}, {mode}: {errors[0]}")
    assert not wrong, "\n".join(wrong)
    for kind in RIGHT:
        first, second = (rank[kind.__name__, "results"] for rank in by_rank)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), kind
    # Where both ways are open, both give the same, with stale keys too.
    plain, square = (by_rank[0]["displaced", kind] for kind in (region_nets.Plain, region_nets.Square))
    assert difference(plain, steps(build(region_nets.Plain))) > 0 and difference(square, plain) <= 1e-5
    # What is said is why the usual way, whole rows of the picture, is none.
    assert_refused([rank["Chooses"] for rank in by_rank], "does not run on patch")
    assert_refused([rank["Banded"] for rank in by_rank], "does not run on patch")
    assert_refused([rank["Hidden"] for rank in by_rank], "does not run on patch")


def test_the_plan_tells_where_patches_work():
    inputs = dict(x=torch.randn(1, 4, region_nets.SIZE, region_nets.SIZE), t=5.0)
    told = str(asyncdiff_fast.plan(build(region_nets.Square), inputs, num_patches=2))
    assert "cut: tokens from blocks.0 on, put together behind blocks.1; all else whole" in told
