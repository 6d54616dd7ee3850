"""Calls captured and replayed, with a stand-in for the capture: which are of one kind, what is held, what is refused.

A replay of the stand-in computes the call once more from the tensors that stay, into the results that stay.
"""

import itertools
import json
import logging
from pathlib import Path

import fused_checks
import pytest
import tiny_parts
import torch
from stand_in_graphs import Replays, Tape

import asyncdiff_fast
from asyncdiff_fast.fused import capture, graphs

STEPS = 5


class Fails(Replays):
    def capture(self, call):
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def captures(monkeypatch):
    """A function that has another stand-in capture."""

    def use(kind):
        monkeypatch.setattr(capture, "CudaGraphs", kind)

    use(Replays)
    return use


def _calls(unet, size=8, prompt=0, steps=STEPS, number=int):
    """The results of a generation's calls, each with a latent and a timestep of its own."""
    random = torch.Generator().manual_seed(prompt)
    text = torch.randn(2, 3, tiny_parts.WIDTH, generator=random)
    with torch.no_grad():
        return [
            unet(torch.randn(2, 4, size, size, generator=random), number(900 - 100 * step), text, return_dict=False)[0]
            for step in range(steps)
        ]


def _told(runtime):
    return runtime.stats()["kernels"]["graphs"]


def _equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _expanded(number):
    """A timestep as many pipelines give it: one number, seen once for each picture."""
    return torch.tensor(number).expand(2)


@pytest.mark.parametrize("number", [int, float, torch.tensor, _expanded])
def test_replayed_calls_give_what_launched_ones_give(captures, number):
    unet = fused_checks.unet()
    want = [_calls(unet, 8, 0, number=number), _calls(unet, 8, 1, number=number), _calls(unet, 16, 0, number=number)]
    runtime = asyncdiff_fast.patch(unet, graphs=True)
    # The first call of each kind is launched; a result stays what it is when the next call is made.
    _equal(_calls(unet, 8, 0, number=number), want[0])
    assert _told(runtime) == {"captured": 1, "replayed": STEPS - 1, "refused": []}
    _equal(_calls(unet, 8, 1, number=number), want[1])
    assert _told(runtime)["captured"] == 1 and _told(runtime)["replayed"] == 2 * STEPS - 1
    _equal(_calls(unet, 16, 0, number=number), want[2])
    assert _told(runtime)["captured"] == 2
    asyncdiff_fast.unpatch(unet)
    _equal(_calls(unet, 8, 0, number=number), want[0])


def test_arguments_that_the_device_does_not_have_are_kept_apart(captures):
    """A plain argument is part of the kind; results may be objects of diffusers."""
    unet, x, text = fused_checks.unet(), torch.randn(2, 4, 8, 8), torch.randn(2, 3, tiny_parts.WIDTH)
    runtime = asyncdiff_fast.patch(unet, graphs=True)
    with torch.no_grad():
        found = [unet(x, 5, text).sample for _ in range(3)] + [unet(x, 5, text, return_dict=False)[0] for _ in range(3)]
    _equal(found[1:], found[:1] * 5)
    assert _told(runtime) == {"captured": 2, "replayed": 4, "refused": []}
    asyncdiff_fast.unpatch(unet)


def test_no_more_than_some_kinds_are_kept(captures, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    unet = fused_checks.unet()
    runtime = asyncdiff_fast.patch(unet, graphs=True)
    for size in (8, 12, 16, 8):
        _calls(unet, size, steps=2)
    assert _told(runtime)["captured"] == 4 and len(runtime._layers.graphs._kinds) == 2
    asyncdiff_fast.unpatch(unet)


def test_what_cannot_be_captured_is_launched_and_said_once(captures, caplog):
    captures(Fails)
    unet = fused_checks.unet()
    want = _calls(unet)
    asyncdiff_fast.patch(unet, graphs=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            _equal(_calls(unet), want)
    asyncdiff_fast.unpatch(unet)
    (line,) = [r.getMessage() for r in caplog.records if "graphs=True" in r.getMessage()]
    assert "UNet2DConditionModel is launched kernel by kernel: RuntimeError: operation not permitted" in line


def test_a_call_that_did_not_end_is_launched_again(captures):
    """A capture comes after a call of its kind that has compiled and chosen everything."""
    unet = fused_checks.unet()
    want = _calls(unet)
    runtime = asyncdiff_fast.patch(unet, graphs=True)
    forward, unet.mid_block.forward = unet.mid_block.forward, _out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        _calls(unet)
    unet.mid_block.forward = forward
    _equal(_calls(unet), want)
    assert _told(runtime) == {"captured": 1, "replayed": STEPS - 1, "refused": []}
    asyncdiff_fast.unpatch(unet)


def _out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("of this call")


def _with_a_hook(unet):
    unet.mid_block.register_forward_hook(lambda module, args, result: None)
    return "a hook is on mid_block"


def _in_training(unet):
    unet.train()
    return "the denoiser is in training mode"


@pytest.mark.parametrize("prepare", [_with_a_hook, _in_training])
def test_what_a_replay_would_leave_out_is_launched(captures, prepare):
    unet = fused_checks.unet()
    want, why = _calls(unet), prepare(unet)
    runtime = asyncdiff_fast.patch(unet, graphs=True)
    _equal(_calls(unet), want)
    assert _told(runtime) == {"captured": 0, "replayed": 0, "refused": [why]}
    asyncdiff_fast.unpatch(unet)


def test_without_a_gpu_calls_are_launched():
    unet = fused_checks.unet()
    want = _calls(unet)
    runtime = asyncdiff_fast.patch(unet, graphs=True)
    _equal(_calls(unet), want)
    assert _told(runtime)["refused"] == ["an argument is on cpu"]
    asyncdiff_fast.unpatch(unet)


def test_other_modules_or_weights_are_captured_anew(captures):
    unet = fused_checks.unet()
    runtime = asyncdiff_fast.patch(unet, graphs=True)
    _calls(unet)
    conv = unet.conv_out
    unet.conv_out = torch.nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1).requires_grad_(False)
    replaced = _calls(unet, prompt=1)
    assert _told(runtime)["captured"] == 2
    unet.conv_out.weight.data = unet.conv_out.weight.data * 2
    doubled = _calls(unet, prompt=1)
    assert _told(runtime)["captured"] == 3
    asyncdiff_fast.unpatch(unet)
    _equal(_calls(unet, prompt=1), doubled)
    assert not torch.equal(doubled[0], replaced[0])


def test_calls_that_ranks_share_are_refused():
    with pytest.raises(ValueError, match="graphs=True, num_stages=2, num_patches=2; pass graphs=False, num_stages or"):
        asyncdiff_fast.Config(graphs=True, num_stages=2, num_patches=2)
    with pytest.raises(ValueError, match="graphs=True, pipeline_patches=1; pass graphs=False, or more patches"):
        asyncdiff_fast.Config(graphs=True, num_stages=2, pipeline_patches=1)
    with pytest.raises(ValueError, match='graphs must be True, False or "auto"'):
        asyncdiff_fast.Config(graphs=1)
    assert asyncdiff_fast.Config(graphs=True, parallel_steps=2, cfg_parallel=True).world_size == 4


def test_a_timestep_that_is_one_for_the_whole_batch(captures):
    unet = fused_checks.unet()

    def expanded(value):
        return torch.tensor(value).expand(2)

    want = _calls(unet, number=expanded)
    runtime = asyncdiff_fast.patch(unet, graphs=True)
    _equal(_calls(unet, number=expanded), want)
    assert _told(runtime)["captured"] == 1
    asyncdiff_fast.unpatch(unet)


class Counts(torch.nn.Module):
    """Somebody's own, which knows how often it was called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


def test_by_default_calls_are_captured_where_nothing_in_them_is_somebodys_own(captures):
    unet = fused_checks.unet()
    want = _calls(unet)
    runtime = asyncdiff_fast.patch(unet)
    _equal(_calls(unet), want)
    assert _told(runtime) == {"captured": 1, "replayed": STEPS - 1, "refused": []}
    # Seen at the next generation.
    unet.conv_norm_out = torch.nn.Sequential(unet.conv_norm_out, Counts())
    _equal(_calls(unet), want)
    assert unet.conv_norm_out[1].calls == STEPS and "test_graphs" in _told(runtime)["refused"][0]
    asyncdiff_fast.unpatch(unet)
    runtime = asyncdiff_fast.patch(unet)
    assert "graphs" not in runtime.stats()["kernels"]
    asyncdiff_fast.unpatch(unet)
    compiled = torch.compile(fused_checks.unet(), backend="eager")
    runtime = asyncdiff_fast.patch(compiled)
    assert "graphs" not in runtime.stats()["kernels"]
    asyncdiff_fast.unpatch(compiled)


def test_replayed_casts_are_those_of_the_weights_as_they_are(captures):
    """What autocast has cast is freed when its context ends, so a graph must not read it."""
    captures(Tape)
    unet = fused_checks.unet()

    def generation():
        with torch.autocast("cpu", torch.bfloat16):
            found = _calls(unet, steps=3)
        unet.conv_in.weight.data.mul_(2)
        return found

    want = [generation() for _ in range(2)]
    unet.conv_in.weight.data.div_(4)
    runtime = asyncdiff_fast.patch(unet, graphs=True)
    got = [generation() for _ in range(2)]
    assert _told(runtime) == {"captured": 1, "replayed": 5, "refused": []}
    asyncdiff_fast.unpatch(unet)
    for a, b in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
        assert (a - b).abs().max() < 2e-2 * b.abs().max()


@pytest.mark.parametrize("way", ["num_stages", "num_patches"])
def test_pieces_are_left_out_by_default_until_rows_say_that_they_gain(way):
    """What `graphs="auto"` does of calls that ranks share is decided by what a GPU has measured."""
    rows = (Path(__file__).parents[2] / "benchmarks" / "results").glob("pieces*.jsonl")
    measured = [json.loads(line) for path in rows for line in path.read_text().splitlines()]
    gains = [row["speedup"] for row in measured if row["way"] == way.removeprefix("num_") and row["mode"] == "auto"]
    config = asyncdiff_fast.Config(**{way: 2})
    assert bool(graphs.wanted(fused_checks.unet(), config, "cuda")) == (len(gains) > 0 and min(gains) > 1)
