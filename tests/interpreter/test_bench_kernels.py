"""What the benchmarks run on a GPU only, at a tiny size: their checks of the kernels, their Triton baseline."""

import functools
import importlib
import pathlib

import pytest
import torch


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


def test_group_norm_benchmark(load):
    bench = load("bench_group_norm")
    inputs = bench.Inputs((1, 64, 2, 8), "channels_last", torch.float32, "cpu")
    ops = bench.kernel_ops(inputs)
    bench.check(inputs, ops)
    for run, _ in ops.values():
        run()
    around = (*inputs.norm()[0], inputs.above, inputs.below)
    padded, borders = bench.baselines.one_program_per_group(*around)
    want, want_borders = bench.baselines.torch_ops(*around)
    torch.testing.assert_close(padded, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(borders, want_borders, rtol=1e-4, atol=1e-5)


def test_attention_benchmark(load):
    bench = load("bench_attention")
    for shape in bench.shapes("cpu", True):
        inputs = bench.Inputs(shape, torch.float32, "cpu")
        ops = bench.kernel_ops(inputs)
        bench.check(inputs, ops)
        ops["attention"] = functools.partial(tuple, inputs.queries)
        with pytest.raises(AssertionError, match="attention is off by"):
            bench.check(inputs, ops)


def test_pointwise_benchmark(load):
    bench = load("bench_pointwise")
    for _, px, patches, layer in bench.cases("cpu", True):
        arguments, _ = bench.inputs(px, patches, layer, torch.float32, "cpu")
        bench.check(bench.op_of(layer), arguments)


def smaller(tiny):
    """Programs are one after the other here: one for each group of each picture, several for large rows."""
    denoiser, inputs = tiny(groups=2)
    text = inputs["encoder_hidden_states"][:1]
    return denoiser, inputs | dict(sample=inputs["sample"][:1, :, :8, :8], encoder_hidden_states=text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_patch_benchmark_runs_the_kernels(load, monkeypatch):
    bench, launched = load("patch_compute"), []
    from asyncdiff_fast.kernels import group_norm

    norm = group_norm.group_norm
    monkeypatch.setattr(group_norm, "group_norm", lambda *a, **k: launched.append(k) or norm(*a, **k))
    monkeypatch.setitem(bench.FOR_CPU, "tiny", functools.partial(smaller, bench.FOR_CPU["tiny"]))
    options = ["--device", "cpu", "--model", "tiny", "--rounds", "1"]
    with torch.no_grad():
        for kernels, used in (("torch", False), ("triton", True)):
            row = bench.row(bench.parse([*options, "--options", f"kernels={kernels}"]), None, 2)
            assert row["kernels"]["mode"] == kernels and bool(launched) == used
            assert bool(row["kernels"]["layers"]) == used
