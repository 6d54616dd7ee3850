"""What patches cannot do is refused on every rank with one clear error and nothing changed; odd uses work."""

import os
import signal
import time

import patch_nets
import pytest
import ranks
import torch
from sequences import Bare, noise, quick

import asyncdiff_fast

TIMEOUT_S = 5
TIMES = (900, 700, 500, 300, 100)


def _build(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return patch_nets.NETS[name]().eval().requires_grad_(False)


@torch.no_grad()
def _predictions(net, size=(16, 8), batch=1, change=None, times=TIMES, seed=0, dtype=torch.float32):
    """Of a few steps; `change(step, x)` may give another latent."""
    x = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = []
    for step, t in enumerate(times):
        x = x if change is None else change(step, x)
        found.append(net(x, t))
        x = x - 0.2 * found[-1]
    return found


def _difference(a, b):
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


def _state(model):
    return {name: set(vars(m)) for name, m in model.named_modules()}


def _outcome(model, run, **options):
    """What `run()` gives on a patched model, or (type, message, seconds, what was left) of its refusal."""
    before, began = _state(model), time.monotonic()
    try:
        asyncdiff_fast.patch(model, **{"num_patches": 2, "timeout_s": 60} | options)
        found = run()
    except Exception as error:
        found = type(error).__name__, str(error), time.monotonic() - began
        left = [name for name, m in model.named_modules() if set(vars(m)) != before[name]]
        if "_asyncdiff_fast" in vars(model):
            asyncdiff_fast.unpatch(model)
        return *found, left
    asyncdiff_fast.unpatch(model)
    return found


def assert_refused(outcomes, *words, kind="ValueError"):
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, tuple), f"rank {rank} was not refused"
        name, message, seconds, left = outcome
        assert name == kind, f"rank {rank}: {name}: {message}"
        assert all(word in message for word in words), f"rank {rank}: {message}"
        assert seconds < 30 and not left, f"rank {rank}: {seconds:.0f} s, left {left}"


# Networks that mix rows in all manner of ways: {name: words of the refusal, or None where patches must be right}


REFUSED = {
    "AcrossRows": "",
    "InstanceNorm": "",
    "LayerNormOverPicture": "",
    "Causal": "causally",
    "Bilinear": "bilinear",
    "OwnSoftmax": "",
    "Squeeze": "",
    "Cumulative": "",
    "Flip": "",
    "Shift": "",
    "MaxPool": "",
    "ReflectPad": "",
    "Transposed": "",
    "Fourier": "",
    "Linear": "",
    "MultiHead": "",
    "Masked": "",
    "Axial": "",
    "RowNumbers": "",
    "Steers": "Steers",
    "SmallMean": "",
}
RIGHT = ("Pointwise", "Windowed", "OneHead", "Positions")


def _nets(rank):
    found = {}
    for name in patch_nets.NETS:
        net = _build(name)
        plain = _predictions(net)
        modes = {}
        for mode in ("sync", "displaced"):
            outcome = _outcome(net, lambda net=net: _predictions(net), exchange=mode, warmup_steps=1)
            modes[mode] = _difference(outcome, plain) if isinstance(outcome, list) else outcome
        found[name] = modes, _difference(_predictions(net), plain)
    return found


def test_networks_are_right_or_refused():
    by_rank, problems = ranks.run(2, _nets, timeout=200), []
    assert {*REFUSED, *RIGHT} == set(patch_nets.NETS)
    for name in patch_nets.NETS:
        try:
            assert all(rank[name][1] == 0 for rank in by_rank), "not as before after unpatch"
            for mode in ("sync", "displaced"):
                outcomes = [rank[name][0][mode] for rank in by_rank]
                if name in REFUSED:
                    assert_refused(outcomes, REFUSED[name])
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
    "exact stages": (dict(num_stages=2, exchange="sync"), ("exchange='sync'", "num_stages=1")),
}


def _bad_options(rank):
    model = Bare()
    found = {name: _outcome(model, lambda: [], **options) for name, (options, _) in OPTIONS.items()}
    plain = _predictions(model)
    return found, _difference(_outcome(model, lambda: _predictions(model), exchange="sync"), plain)


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
        return {
            "rows": _outcome(model, lambda: model(noise(size=1), 5.0)),
            "dimensions": _outcome(sequence := Sequence(), lambda: sequence(torch.ones(3, 4), 5.0)),
            "unguided": _outcome(model, lambda: _predictions(model), num_patches=1, cfg_parallel=True),
            "odd": _outcome(model, lambda: _predictions(model, batch=3), num_patches=1, cfg_parallel=True),
            "columns of tokens": _outcome(
                model,
                lambda: model(torch.ones(1, 4, 8, 1), 5.0),
                exchange="none",
                warmup_steps=0,
                patch_axis="columns",
            ),
        }


CALLS = {
    "rows": ("num_patches must not exceed the rows of the latent", "num_patches=2, 1 rows", "fewer patches"),
    "dimensions": ("3, 4 or 5 dimensions", "(3, 4)"),
    "unguided": ("cfg_parallel needs classifier-free guidance", "a batch of 1", "cfg_parallel=False"),
    "odd": ("cfg_parallel needs classifier-free guidance", "a batch of 3", "cfg_parallel=False"),
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
    _predictions(model)
    began = time.monotonic()
    with pytest.raises(asyncdiff_fast.ExchangeError) as error:
        _predictions(model, batch=2, change=lose)
        _predictions(model, batch=2)
    seconds = time.monotonic() - began
    asyncdiff_fast.unpatch(model)
    _predictions(model)
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


# Odd uses, which must work. Each gives the predictions of one generation with a net.


def _batch_halves(step, x):
    return x[:1] if step >= 2 else x


def _batch_comes_and_goes(step, x):
    return x[:1] if step % 2 else torch.cat((x, x.flip(2)))[:2]


def _replaced(step, x):
    return x.flip(-1) * 0.9 if step in (1, 3) else x


def _channels_last(step, x):
    return x.contiguous(memory_format=torch.channels_last) if step in (0, 2, 3) else x.contiguous()


def _strided(step, x):
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2] if step != 1 else x


USES = {
    "batch halves": dict(batch=2, change=_batch_halves),
    "batch comes and goes": dict(batch=2, change=_batch_comes_and_goes),
    "replaced latents": dict(change=_replaced),
    "channels last": dict(change=_channels_last),
    "strided": dict(change=_strided),
    "a row each": dict(size=(2, 5)),
    "expanded": dict(batch=1, change=lambda step, x: x[:1].expand(3, -1, -1, -1)),
}


def _uses(rank):
    """{use: (sync difference, displaced difference, whether a second generation is that of a fresh patch)}"""
    found = {}
    for name, use in USES.items():
        net = _net()
        plain = _predictions(net, **use)
        sync = _outcome(net, lambda net=net, use=use: _predictions(net, **use), exchange="sync")
        fresh = _outcome(net, lambda net=net, use=use: _predictions(net, **use), warmup_steps=1)

        def twice(net=net, use=use):
            _predictions(net, **use, seed=1)
            return _predictions(net, **use)

        second = _outcome(net, twice, warmup_steps=1)
        results = sync, fresh, second
        if not all(isinstance(result, list) for result in results):
            found[name] = results
            continue
        same = all(map(torch.equal, fresh, second))
        found[name] = _difference(sync, plain), _difference(fresh, plain), same
    return found


class Attending(patch_nets.Net):
    """A convolution, a norm, attention over all, a convolution."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.GroupNorm(4, patch_nets.WIDTH)

    def mix(self, h, t):
        h = self.norm(h) + t / 1000
        return h + self.picture(torch.nn.functional.scaled_dot_product_attention(*self.heads(h)), h)


def _net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attending().eval().requires_grad_(False)


def test_odd_uses():
    problems = []
    for found in ranks.run(2, _uses, timeout=200):
        for name, (sync, displaced, same) in found.items():
            right = not isinstance(sync, tuple) and sync <= 1e-5 and displaced < 0.5 and same is True
            if not right:
                problems.append(f"{name}: {str(sync)[:300]}, {str(displaced)[:300]}, {str(same)[:300]}")
    assert not problems, "\n".join(problems)


DTYPES = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-5}


def _dtypes(rank):
    found = {}
    for dtype in DTYPES:
        net = _net().to(dtype)
        plain = _predictions(net, dtype=dtype)
        for mode in ("sync", "displaced"):
            outcome = _outcome(
                net, lambda net=net, dtype=dtype: _predictions(net, dtype=dtype), exchange=mode, warmup_steps=1
            )
            found[dtype, mode] = _difference(outcome, plain) if isinstance(outcome, list) else outcome
    return found


def test_dtypes():
    for found in ranks.run(2, _dtypes):
        for (dtype, mode), error in found.items():
            assert not isinstance(error, tuple), (dtype, error)
            assert error <= (DTYPES[dtype] if mode == "sync" else 0.5), (dtype, mode)


def _guidance_switched_off(rank):
    """Guidance that ends in the middle, as a callback of diffusers may have it."""
    net = _net()
    use = USES["batch halves"]
    plain = _predictions(net, **use)

    def twice():
        return _predictions(net, **use) + _predictions(net, **use, seed=1)

    outcome = _outcome(net, twice, num_patches=1, cfg_parallel=True)
    if isinstance(outcome, tuple):
        return outcome
    return _difference(outcome[: len(TIMES)], plain)


def test_guidance_switched_off_in_the_middle():
    for error in ranks.run(2, _guidance_switched_off):
        assert isinstance(error, float) and error <= 1e-6, error


class Stop(Exception):
    """Raised in the middle of a generation."""


def _interrupted(rank):
    """Whether generations after an exception inside and between calls are that of a fresh patch."""
    net = _net()

    def stop(*_):
        raise Stop

    def broken(step, x):
        if step == 2:
            raise Stop
        return x

    def run():
        first = _predictions(net)
        with pytest.raises(Stop):
            _predictions(net, change=broken, seed=1)
        second = _predictions(net)
        hook = net.last.register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            _predictions(net, seed=2)
        hook.remove()
        third = _predictions(net)
        return [all(map(torch.equal, first, x)) for x in (second, third)]

    return _outcome(net, run, warmup_steps=1)


def test_interrupted_generations():
    assert ranks.run(2, _interrupted) == [[True, True]] * 2
