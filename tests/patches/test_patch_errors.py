"""What patches cannot do is refused on every rank with one clear error and nothing changed."""

import os
import signal
import time

import patch_nets
import pytest
import ranks
import torch
from bare import Bare, noise
from patch_runs import assert_refused, build, difference, outcome, predictions
from sequences import quick

import asyncdiff_fast
from asyncdiff_fast.patches import check

TIMEOUT_S = 5


# Networks that mix rows in all manner of ways: {name: words of the refusal, or None where patches must be right}


REFUSED = {
    "AcrossRows": "",
    "InstanceNorm": "works along rows of the picture (instance_norm",
    "LayerNormOverPicture": "",
    "Causal": "causally",
    "Bilinear": "bilinear",
    "OwnSoftmax": "compares rows of the picture with each other (matmul",
    "Cumulative": "works along rows of the picture (cumsum",
    "Flip": "works along rows of the picture (flip",
    "Shift": "works along rows of the picture (roll",
    "MaxPool": "pools with padding",
    "ReflectPad": "",
    "Transposed": "",
    "Fourier": "works along rows of the picture (fft",
    "Linear": "works along rows of the picture (softmax",
    "MultiHead": "works along rows of the picture (multi_head_attention_forward",
    "Masked": "",
    "RowNumbers": "",
    "Steers": "reads numbers from activations",
    "Deviation": "sums over rows of the picture (std",
}
RIGHT = (
    "Squeeze",
    "Norm",
    "SmallMean",
    "LinearSums",
    "NormedSums",
    "Einsum",
    "Pooled",
    "OwnBetween",
    "Pointwise",
    "Windowed",
    "Axial",
    "OneHead",
    "Positions",
)


# The first call is the same in both: a refusal need not be tried twice.
MODES = {True: ("sync", "displaced"), False: ("displaced",)}


def _nets(rank):
    found = {}
    # Those that ranks compute together come last, so that no rank is gone before another has heard of a refusal.
    for name in (*REFUSED, *RIGHT):
        net = build(name)
        plain = predictions(net)
        modes = {}
        for mode in MODES[name in RIGHT]:
            result = outcome(net, lambda net=net: predictions(net), exchange=mode, warmup_steps=1)
            modes[mode] = difference(result, plain) if isinstance(result, list) else result
        found[name] = modes, difference(predictions(net), plain)
    return found


def test_networks_are_right_or_refused():
    by_rank, problems = ranks.run(2, _nets, timeout=200), []
    assert {*REFUSED, *RIGHT} == set(patch_nets.NETS)
    for name in patch_nets.NETS:
        try:
            assert all(rank[name][1] == 0 for rank in by_rank), "not as before after unpatch"
            for mode in MODES[name in RIGHT]:
                outcomes = [rank[name][0][mode] for rank in by_rank]
                if name in REFUSED:
                    assert_refused(outcomes, REFUSED[name], "num_stages")
                else:
                    limit = 1e-5 if mode == "sync" else 0.5
                    assert all(error <= limit for error in outcomes), outcomes
        except (AssertionError, TypeError) as error:
            problems.append(f"{name}: {mode}: {str(error)[:600]}")
    assert not problems, "\n".join(problems)


# Bad options: {name: (options, words)}

OPTIONS = {
    "zero": (dict(num_patches=0), ("num_patches must be an integer of at least 1", "num_patches=0")),
    "text": (dict(num_patches="2"), ("num_patches='2'",)),
    "boolean": (dict(num_patches=True), ("num_patches=True",)),
    "world": (dict(num_patches=3), ("world_size", "= 3", "world_size 2", "num_patches=2", "3 processes")),
    "halves": (dict(num_patches=2, cfg_parallel=True), ("2 * 2 * (1 + 1 - 1) = 4", "num_patches=1")),
    "exchange": (dict(exchange="async"), ("exchange", '"displaced", "sync" or "none"', "'async'")),
    "group_norm": (dict(group_norm="batch"), ("group_norm", '"corrected"', "'batch'")),
    "cfg_parallel": (dict(cfg_parallel=1), ("cfg_parallel must be True or False", "cfg_parallel=1")),
    "bessel": (dict(bessel="yes"), ("bessel must be True or False",)),
    "warmup": (dict(warmup_steps=0), ("warmup_steps", "at least 1", 'exchange="none"')),
    "warmup sync": (dict(warmup_steps=0, exchange="sync"), ("warmup_steps", "at least 1")),
    "axis": (dict(patch_axis="columns"), ("patch_axis", "naive", 'exchange="none", warmup_steps=0')),
    "axis name": (dict(patch_axis="both"), ("patch_axis", '"alternating"', "'both'")),
    "sync stages": (dict(num_stages=2, group_norm="sync"), ("num_stages=2", "num_patches=2", 'group_norm="sync"')),
    "sync norms of its own": (dict(exchange="sync", group_norm="local"), ("group_norm='local'", "leave one of them")),
    "sync without patches": (dict(num_patches=1, num_stages=2, exchange="sync"), ("num_stages=2", "pass num_patches")),
    "sync steps": (dict(num_patches=1, parallel_steps=2, exchange="sync"), ("parallel_steps=2", "leave exchange out")),
    "exact stages": (dict(num_stages=2, exchange="sync"), ("exchange='sync'", "num_stages=1")),
}


def _bad_options(rank):
    model = Bare()
    found = {name: outcome(model, lambda: [], **options) for name, (options, _) in OPTIONS.items()}
    plain = predictions(model)
    return found, difference(outcome(model, lambda: predictions(model), exchange="sync"), plain)


def test_bad_options():
    by_rank, problems = ranks.run(2, _bad_options), []
    for name, (_, words) in OPTIONS.items():
        try:
            assert_refused([rank[0][name] for rank in by_rank], *words)
        except AssertionError as error:
            problems.append(f"{name}: {error}".splitlines()[0])
    assert not problems, "\n".join(problems)
    assert all(error <= 1e-5 for _, error in by_rank), "patches must work after refusals"


# Bad calls.


class Sequence(torch.nn.Module):
    """A latent of two dimensions."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x, t):
        return self.layer(x)


def _bad_calls(rank):
    model = Bare()
    with torch.no_grad():
        found = {
            "rows": outcome(model, lambda: model(noise(size=1), 5.0)),
            "dimensions": outcome(sequence := Sequence(), lambda: sequence(torch.ones(3, 4), 5.0)),
            "columns of tokens": outcome(
                model,
                lambda: model(torch.ones(1, 4, 8, 1), 5.0),
                exchange="none",
                warmup_steps=0,
                patch_axis="columns",
            ),
        }
    assert isinstance(outcome(model, lambda: predictions(model)), list)
    return found


CALLS = {
    "rows": ("num_patches must not exceed the rows of the latent", "num_patches=2, 1 rows", "fewer patches"),
    "dimensions": ("3, 4 or 5 dimensions", "(3, 4)"),
    "columns of tokens": ("num_patches=2, 1 rows",),
}


def test_bad_calls():
    by_rank = ranks.run(2, _bad_calls)
    for name, words in CALLS.items():
        assert_refused([rank[name] for rank in by_rank], *words)


# A lost peer.


def _lost(rank, lost, options, way):
    """What the others see when a rank goes before its third call: (type, message, seconds, what unpatch leaves)."""
    model = Bare()

    def lose(step, x):
        if step == 3 and rank == lost:
            os.kill(os.getpid(), way)
        return x

    asyncdiff_fast.patch(model, warmup_steps=1, timeout_s=TIMEOUT_S, **options)
    predictions(model)
    began = time.monotonic()
    with pytest.raises(asyncdiff_fast.ExchangeError) as error:
        predictions(model, batch=2, change=lose)
        predictions(model, batch=2)
    seconds = time.monotonic() - began
    asyncdiff_fast.unpatch(model)
    predictions(model)
    return str(error.value), seconds, [n for n, m in model.named_modules() if "_diffusers_hook" in vars(m)]


LOSSES = [
    (3, 1, dict(num_patches=3), signal.SIGKILL),
    (2, 1, dict(num_patches=2), signal.SIGSTOP),
    (2, 0, dict(num_patches=2, exchange="sync"), signal.SIGKILL),
    (2, 0, dict(num_patches=2, group_norm="sync"), signal.SIGSTOP),
    (2, 1, dict(num_patches=2, exchange="none"), signal.SIGKILL),
]


@pytest.mark.parametrize("world_size, lost, options, way", quick(LOSSES, LOSSES[0], LOSSES[1]))
def test_a_lost_rank_is_named(world_size, lost, options, way):
    started = ranks.start(world_size, _lost, lost, options, way)
    try:
        kept = [pair for rank, pair in enumerate(started) if rank != lost]
        for message, seconds, left in ranks.workers.collect(kept, TIMEOUT_S + 60):
            assert f"rank {lost} " in message
            assert seconds < TIMEOUT_S + 15 and not left
    finally:
        started[lost][0].kill()


def test_tf32_is_no_reason_to_refuse(monkeypatch):
    """cuDNN takes it for fp32 unless told otherwise, and another algorithm for a patch than for the whole picture."""
    backends = torch.backends
    monkeypatch.setattr(backends.cudnn, "allow_tf32", True)
    assert check.uses_tf32()
    monkeypatch.setattr(backends.cudnn, "allow_tf32", False)
    assert not backends.cuda.matmul.allow_tf32 and not check.uses_tf32()
