"""The GroupNorm benchmark without a GPU: it says so, and its script, baselines and tables work on tiny shapes."""

import collections
import importlib
import pathlib

import pytest
import torch
from asyncdiff_fast.kernels import reference

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """`benchmarks/bench_group_norm.py`, which finds its neighbours on `sys.path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_group_norm")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu(bench):
    with pytest.raises(SystemExit, match="needs a GPU"):
        bench.main([])


def test_measures_each_row_once(bench, tmp_path, monkeypatch):
    out = tmp_path / "group_norm.jsonl"
    for _ in range(2):
        bench.main(["--device", "cpu", "--quick", "--out", str(out)])
        assert len(out.read_text().splitlines()) == 2 * 4
    roofline = importlib.import_module("roofline")
    monkeypatch.setattr(importlib.import_module("measure"), "RESULTS", tmp_path)
    rows = roofline.latest("group_norm")
    header, lines = roofline.table_cells(rows, "copy of the tensor", ("torch", "reference"))
    assert [len(line) for line in lines] == [len(header)] * 2
    assert roofline.picture(rows, "copy of the tensor", "Copies").count("<rect") == 1 + 2


def test_baselines_compute_the_norm(bench):
    baselines = importlib.import_module("group_norm_baselines")
    inputs = bench.Inputs((1, 64, 4, 8), "channels_last", torch.float32, "cpu")
    arguments, keywords = inputs.norm()
    around = (*arguments, inputs.above, inputs.below)
    keywords |= {"conv_bias": None, "temb": None}
    want, _ = reference.group_norm_reference(*arguments, **keywords, bessel=True)
    y, borders = baselines.distrifusion(*around, inputs.stale, 3)
    torch.testing.assert_close(y[..., 1:-1], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(borders, torch.stack((inputs.top, inputs.bottom)), rtol=1e-4, atol=1e-5)
    want, _ = reference.group_norm_reference(*arguments, **keywords | {"mode": "local", "parts": None})
    torch.testing.assert_close(baselines.torch_ops(*around)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_norms_are_those_of_sdxl(bench):
    """Every norm of a residual block of the published configuration, by its level."""
    unet = importlib.import_module("real_models").build("sdxl", device="meta")
    levels = [(2**i, block) for i, block in enumerate(unet.down_blocks)] + [(4, unet.mid_block)]
    levels += [(2**i, block) for i, block in enumerate(reversed(unet.up_blocks))]
    found = {factor: collections.Counter() for factor in bench.NORMS}
    for factor, block in levels:
        for resnet in block.resnets:
            found[factor].update((resnet.norm1.num_channels, resnet.norm2.num_channels))
            assert {norm.num_groups for norm in (resnet.norm1, resnet.norm2)} == {bench.GROUPS}
    assert found == bench.NORMS
