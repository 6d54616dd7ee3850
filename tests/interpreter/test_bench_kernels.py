"""What the GroupNorm benchmark runs on a GPU only, at a tiny size: its check of the kernels, its Triton baseline."""

import importlib
import pathlib

import torch


def test_group_norm_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
    bench = importlib.import_module("bench_group_norm")
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
