"""Predicted stale inputs: the arithmetic, the rule on real ranks, what is checked of them and decided by it."""

import diffusers
import oracle
import pytest
import ranks
import torch
from bare import Bare, noise
from sequences import assert_right, compare
from torch.utils._pytree import tree_map_only

import asyncdiff_fast
from asyncdiff_fast.patches.state import Received
from asyncdiff_fast.prediction import trend
from asyncdiff_fast.prediction.self_check import Report, SelfCheck
from asyncdiff_fast.prediction.trend import Instants, Trend, damping, extrapolate, ratio

STAGES = [["first", "blocks.0", "blocks.1", "blocks.2"], ["blocks.3", "blocks.4", "blocks.5", "last"]]
TIMES = [900, 800, 700, 600, 500, 400, 300, 200, 100]

LINEAR = {"predict": "linear"}


def test_one_hop_carries_the_whole_change_and_more_hops_less():
    shares = [damping(hops, 50) for hops in (1, 2, 3, 4, 8)]
    assert shares[:3] == pytest.approx([1, 1, 1]) and shares == sorted(shares, reverse=True) and shares[-1] > 0
    assert damping(4, 12) < damping(4, 25) < damping(4, 50)
    assert damping(4, 1) == 0


@pytest.mark.parametrize(
    "read_at, last, before, expected",
    [
        (700, 800, 900, 1),
        (780, 800, 900, 0.2),
        (600, 800, 900, 1),
        (800, 800, 900, 0),
        (700, 800, 800, 0),
        (900, 800, 900, 0),
        (700, 800, None, 0),
        (700, None, None, 0),
    ],
)
def test_ratio_of_intervals(read_at, last, before, expected):
    assert ratio(read_at, last, before) == pytest.approx(expected)


def _trend(scheduler, steps, made, read):
    scheduler.set_timesteps(steps)
    trend = Trend(hops=1)
    trend.begin(Instants(scheduler, scheduler.timesteps[0], 0))
    for step in made:
        trend.made(step)
    trend.weigh(read)
    return trend.weight


def test_repeated_timesteps_are_reused():
    """Heun's scheduler lists all but the first timestep twice."""
    weights = [_trend(diffusers.HeunDiscreteScheduler(), 20, (k - 2, k - 1), k) for k in (2, 3, 4, 5)]
    assert weights == [0, 0, 0, 0]


def test_uneven_timesteps_scale_the_change():
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    weights = [_trend(scheduler, 30, (k - 2, k - 1), k) for k in (2, 10, 29)]
    times = scheduler.timesteps
    for k, weight in zip((2, 10, 29), weights, strict=True):
        expected = float((times[k] - times[k - 1]) / (times[k - 1] - times[k - 2]))
        assert weight == pytest.approx(min(expected, 1), rel=1e-5)
    assert len(set(weights)) > 1


def test_unknown_scheduler_counts_steps():
    trend = Trend(hops=1)
    trend.begin(Instants(None, 0.5, 0))
    trend.weigh(1)
    assert trend.weight == 0
    trend.made(0)
    trend.weigh(1)
    assert trend.weight == 0
    trend.made(1)
    trend.weigh(2)
    assert trend.weight == 1


# A unit in the last place of the largest value: one rounding of the result, none of the difference.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_extrapolate(dtype, weight):
    before, last = noise(0).to(dtype), (noise(0) + 0.01 * noise(1)).to(dtype)
    expected = last.double() + weight * (last.double() - before.double())
    extrapolate(before, last, weight)
    assert (before.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_received_parts_take_turns():
    part = Received(1, torch.full((2, 3), torch.nan), predicts=True)
    for epoch, value in ((0, 1.0), (0, 3.0)):
        part.place.fill_(value)
        part.learn(epoch)
    read = []
    for epoch, arriving in enumerate((4.0, 9.0, 16.0)):
        part.predict(epoch, 1.0)
        read.append(float(part.place[0, 0]))
        part.buffers[epoch % 2].fill_(arriving)
    assert read == [5.0, 5.0, 14.0]


# On ranks.


class Predicted(oracle.Simulation):
    """The rule with predictions: what another stage gave is carried on by `share` of its last change."""

    share = 1.0

    def restart(self):
        super().restart()
        self.before = {}

    def _unit(self, name, forward):
        plain = super()._unit(name, forward)

        def run(*args, **kwargs):
            key = (name, self.ordinals.get(name, 0))
            if self.stage is None or self.owner[key] == self.stage:
                return plain(*args, **kwargs)
            self.ordinals[name] = key[1] + 1
            last, before = self.cache[self.place, key], self.before.get((self.place, key))
            if before is None:
                return tree_map_only(torch.Tensor, torch.clone, last)
            return torch.lerp(before, last, 1 + self.share)

        return run

    def _call(self, *args, **kwargs):
        before = dict(self.cache)
        result = super()._call(*args, **kwargs)
        self.before = before
        return result


def _loop(model, dtype=torch.float32, seed=0, text=None):
    @torch.no_grad()
    def run():
        x = noise(seed).to(dtype)
        for number, t in enumerate(TIMES):
            x = x - 0.1 * model(x, t / 10, *(() if text is None else (text(number),)))
        return x

    return run


def _rule(rank, dtype, warmup_steps):
    model = Bare().to(dtype)

    def simulate(denoiser, owner):
        return Predicted(denoiser, owner, 2, warmup_steps)

    generations = [_loop(model, dtype), _loop(model, dtype, seed=1), _loop(model, dtype)]
    options = {"stages": STAGES, "warmup_steps": warmup_steps, "predict": "linear", "resync": 0}
    results, stats = compare(rank, model, model, generations, simulate, **options)
    return [tuple(x if x is None else x.float() for x in pictures) for pictures in results], stats


@pytest.mark.parametrize(
    "dtype, warmup_steps, tolerance", [(torch.float32, 1, 1e-6), (torch.float32, 3, 1e-6), (torch.bfloat16, 3, 2e-2)]
)
def test_ranks_follow_the_rule(dtype, warmup_steps, tolerance):
    """With one exact call the first asynchronous one reuses, with more it predicts; a generation forgets the last."""
    results = ranks.run(2, _rule, dtype, warmup_steps)
    if dtype is torch.float32:
        assert_right(results, tolerance)
    for patched, simulated, _ in results[0][0]:
        assert (patched - simulated).abs().max() <= tolerance


class Ramp(torch.nn.Module):
    """Its first part is linear in the timestep and knows nothing of the latent; convolutions keep it linear."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.inner, self.last = (
                torch.nn.Conv2d(4, 4, 3, padding=1, bias=True),
                torch.nn.Conv2d(4, 4, 3, padding=1),
                torch.nn.Conv2d(4, 4, 3, padding=1),
            )

    def forward(self, x, t):
        return self.last(self.inner(self.first(x * (torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1) / 1000))))


class Listed:
    """A scheduler of one's own, with uneven timesteps."""

    timesteps = torch.tensor([960.0, 880, 780, 660, 540, 430, 330, 240, 160, 90])


def _ramp(rank, options, whole):
    """Largest differences of predictions from the unpatched model's, of all calls; `whole` changes are carried on."""
    if whole:
        trend.damping, trend.LARGEST_RATIO = lambda hops, num_steps: 1.0, 2.0
    model, x = Ramp(), noise(size=16)
    with torch.no_grad():
        exact = [model(x, t) for t in Listed.timesteps]
        runtime = asyncdiff_fast.patch(model, timeout_s=40, warmup_steps=2, scheduler=Listed(), **LINEAR | options)
        found = [model(x, t) for t in Listed.timesteps]
        stats = runtime.stats()
        asyncdiff_fast.unpatch(model)
    return max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)), stats


@pytest.mark.parametrize("options", [{"num_stages": 2, "stages": [["first"], ["inner", "last"]]}, {"num_patches": 2}])
def test_what_is_linear_in_the_timestep_is_exact(options):
    results = ranks.run(2, _ramp, options, True)
    assert all(error <= 1e-6 for error, _ in results)
    # The first stage receives nothing.
    errors = [e for _, stats in results for e in stats["prediction"].values()]
    assert errors and all(e["error"] < 1e-5 < 1e-2 < e["reuse_error"] for e in errors)
    for error, stats in ranks.run(2, _ramp, {**options, "predict": "none"}, True):
        assert error > 1e-3 and stats["prediction"] == {}


# What is checked, and decided by it.


def test_errors_are_of_the_last_values():
    check = SelfCheck(["a", "b"], "cpu")
    values = [(1.0, 5.0), (2.0, 5.0), (4.0, 5.0), (6.0, 10.0)]
    for a, b in values:
        check.note(0, torch.full((3000,), a))
        check.note(1, torch.full((7,), b))
        check.judge(1.0)
    assert check.summary()["a"] == pytest.approx({"error": 0, "reuse_error": 2 / 6})
    assert check.summary()["b"] == pytest.approx({"error": 0.5, "reuse_error": 0.5})
    assert float(check.worst) == 0.5
    check.restart()
    assert check.summary() == {} and float(check.worst) == 0


def test_report_is_of_the_call_before():
    report = Report()
    assert report.take() == 0
    report.give(torch.tensor([0.3]))
    assert report.take() == pytest.approx(0.3)
    report.forget()
    assert report.take() == 0


def _counted(rank, options, switch=None):
    model = Bare()
    text = None if switch is None else lambda number: torch.full((4,), 300.0 if number >= switch else 0.0)
    runtime = asyncdiff_fast.patch(model, timeout_s=40, **LINEAR | options)
    pictures = [_loop(model, text=text)(), _loop(model, text=text)()]
    stats = runtime.stats()
    asyncdiff_fast.unpatch(model)
    return stats["exact_calls"], stats["compute_calls"], pictures


@pytest.mark.parametrize("tolerance, exact_calls", [(1e6, 6), (0.0, 2 * len(TIMES))])
def test_auto_warm_up_ends_within_the_tolerance(tolerance, exact_calls):
    options = {"num_stages": 2, "warmup_steps": "auto", "tolerance": tolerance, "resync": 0}
    found = ranks.run(2, _counted, options)
    assert [calls[0] for calls in found] == [exact_calls] * 2
    assert torch.equal(found[0][2][0], found[0][2][1])


def _all_exact_then_auto(rank):
    """What a generation of exact calls saw does not end the warm-up of the next one."""
    model = Bare()
    options = {"num_stages": 2, "stages": STAGES, "warmup_steps": "auto", "tolerance": 1e6, "resync": 0}
    runtime = asyncdiff_fast.patch(model, timeout_s=40, **LINEAR | options)
    counts = []
    for times in (TIMES[:3], TIMES[:3], TIMES):
        runtime.clear_stats()
        with torch.no_grad():
            for t in times:
                model(noise(), t / 10)
        counts.append(runtime.stats()["exact_calls"])
    asyncdiff_fast.unpatch(model)
    return counts


def test_auto_warm_up_begins_with_each_generation():
    assert ranks.run(2, _all_exact_then_auto) == [[3, 3, 3]] * 2


def test_auto_warm_up_of_patches():
    (exact, _, pictures), other = ranks.run(
        2, _auto_patches, {"num_patches": 2, "warmup_steps": "auto", "tolerance": 1e6, "resync": 0}
    )
    assert exact == other[0] and torch.equal(pictures, other[2])


def _auto_patches(rank, options):
    model, x = Ramp(), noise(size=16)
    with torch.no_grad():
        exact = model(x, 500.0)
        asyncdiff_fast.patch(model, **LINEAR | options)
        pictures = torch.stack([model(x, t) for t in TIMES[:5]])
        asyncdiff_fast.unpatch(model)
    return float(exact.sum()), None, pictures


def test_a_spike_makes_one_call_exact_on_all_ranks():
    options = {"num_stages": 2, "stages": STAGES, "warmup_steps": 3}
    calm = ranks.run(2, _counted, options)
    spike = ranks.run(2, _counted, options, 4)
    never = ranks.run(2, _counted, {**options, "resync": 0}, 4)
    assert [c[0] for c in calm] == [6, 6]
    assert [c[0] for c in spike] == [8, 8]
    assert [c[0] for c in never] == [6, 6]
    assert torch.equal(spike[0][2][1], spike[1][2][1])


@pytest.mark.parametrize(
    "options",
    [
        {"predict": "none"},
        {"num_stages": 1},
        {"num_patches": 2},
        {"num_stages": 1, "num_patches": 2, "exchange": "sync"},
    ],
)
def test_auto_warm_up_needs_predictions(options):
    with pytest.raises(ValueError, match='warmup_steps="auto" needs predictions'):
        asyncdiff_fast.Config(**LINEAR | {"num_stages": 2, "warmup_steps": "auto"} | options)


def test_memory_is_in_the_plan():
    inputs = {"x": noise(size=16), "t": 500.0}
    for options in ({"num_stages": 2, "stages": [["first"], ["inner", "last"]]}, {"num_patches": 2}):
        plans = [asyncdiff_fast.plan(Ramp(), inputs, predict=p, **options) for p in ("none", "linear")]
        if "num_stages" in options:
            none, linear = (plan.buffer_bytes(1) for plan in plans)
            # One more place for the received (1, 4, 16, 16), and the error that travels with the result.
            assert linear - none == 4 * 16 * 16 * 4 + 2 * 4
        else:
            none, linear = (plan.memory_bytes(0) for plan in plans)
            # Two turns of one row from the other patch, for each convolution that does not read the latent itself.
            assert linear - none == 2 * plans[1].predicted_bytes(0) > 0
