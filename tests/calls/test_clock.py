"""The clock alone: which calls begin a generation, which steps and calls they are, and what it leaves behind."""

import inspect

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from asyncdiff_fast.calls.clock import MOST_CALLS, Clock
from asyncdiff_fast.calls.timesteps import Timesteps
from asyncdiff_fast.calls.watch import last_scheduler, unwatch_schedulers, watch_schedulers


class Early(SchedulerMixin):
    """A scheduler class that is there before the clock."""

    def set_timesteps(self, num_inference_steps: int, *, device=None):
        self.timesteps = torch.linspace(999, 0, num_inference_steps)

    def step(self, model_output, timestep, sample, return_dict: bool = True):
        return sample - 0.1 * model_output


class Derived(Early):
    """Its step calls its parent's, so both are seen."""

    def step(self, model_output, timestep, sample, return_dict: bool = True):
        return super().step(model_output, timestep, sample, return_dict) * 1.0


def _defined_later():
    class Later(SchedulerMixin):
        def set_timesteps(self, num_inference_steps):
            self.timesteps = torch.linspace(999, 0, num_inference_steps)

        def step(self, model_output, timestep, sample):
            return sample

    return Later


@pytest.fixture
def clock():
    watch_schedulers()
    yield Clock()
    unwatch_schedulers()


def _subclasses(cls):
    return {cls}.union(*(_subclasses(sub) for sub in cls.__subclasses__()))


def _methods():
    names = ("step", "set_timesteps", "__init_subclass__")
    return {(cls, name): vars(cls)[name] for cls in _subclasses(SchedulerMixin) for name in names if name in vars(cls)}


def _ticks(clock, timesteps, scheduler=None, calls=1, signature="a"):
    """(begins, step, call) of a loop."""
    found = []
    for t in timesteps:
        for _ in range(calls):
            tick = clock.tick(t, signature)
            found.append((tick.begins, tick.step, tick.call))
        if scheduler is not None:
            scheduler.step(torch.ones(1), t, torch.ones(1))
    return found


def _expected(steps, calls=1):
    return [(step == call == 0, step, call) for step in range(steps) for call in range(calls)]


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("make", [Early, Derived, _defined_later, "in between"])
def test_with_a_scheduler(clock, make, calls):
    scheduler = (_defined_later() if make in ("in between", _defined_later) else make)()
    for steps in (4, 1, 1, 6):
        scheduler.set_timesteps(steps)
        assert _ticks(clock, scheduler.timesteps, scheduler, calls) == _expected(steps, calls)
    assert last_scheduler() is scheduler


def test_repeated_and_rising_timesteps_of_a_scheduler(clock):
    scheduler = Early()
    for timesteps in ([999, 500, 500, 100, 100], [1, 100, 500, 999], [5, 5, 5]):
        scheduler.set_timesteps(len(timesteps))
        assert _ticks(clock, timesteps, scheduler) == _expected(len(timesteps))


def test_a_generation_that_stops_early(clock):
    scheduler = Early()
    for stop in (1, 2, 3):
        scheduler.set_timesteps(5)
        assert _ticks(clock, scheduler.timesteps[:stop], scheduler, 2) == _expected(stop, 2)
        # Between the two calls of a step.
        clock.tick(scheduler.timesteps[stop], "a")


@pytest.mark.parametrize("timesteps", [[999, 600, 300, 0], [0.0, 0.3, 0.9, 1.0], [5, 4.5, 4, 3]])
@pytest.mark.parametrize("kind", ["numbers", "tensors", "rows", "filled"])
@pytest.mark.parametrize("calls", [1, 2])
def test_without_a_scheduler(clock, timesteps, kind, calls):
    memory = torch.zeros(2)
    for _ in range(3):
        if kind == "numbers":
            values = timesteps
        elif kind == "tensors":
            values = torch.tensor(timesteps)
        elif kind == "rows":
            values = torch.tensor(timesteps)[:, None].expand(-1, 3)
        else:
            values = (memory.fill_(t) for t in timesteps)
        assert _ticks(clock, values, calls=calls) == _expected(4, calls)


def test_another_signature_begins_a_generation(clock):
    assert _ticks(clock, [9, 8, 7], signature="a") == _expected(3)
    assert _ticks(clock, [6, 5, 4], signature="b") == _expected(3)
    for t in (9, 8):
        assert clock.tick(t, "a").call == 0
        assert clock.tick(t, "b").call == 1


def test_end_begins_a_generation(clock):
    assert _ticks(clock, [9, 8]) == _expected(2)
    clock.end()
    assert _ticks(clock, [7, 6]) == _expected(2)


def test_set_timesteps_once_for_two_generations(clock):
    scheduler = Early()
    scheduler.set_timesteps(4)
    for _ in range(3):
        assert _ticks(clock, scheduler.timesteps, scheduler) == _expected(4)


def test_set_timesteps_once_and_stopped_early(clock):
    scheduler = Early()
    scheduler.set_timesteps(6)
    for stop in (3, 4, 6):
        assert _ticks(clock, scheduler.timesteps[:stop], scheduler, 2) == _expected(stop, 2)


def test_one_step_generations_are_exact_and_bounded(clock):
    """A loop of one step without a scheduler: nothing says that it ends, so step 0 it stays, with few passes."""
    ticks = [clock.tick(999, "a") for _ in range(50)]
    assert all(tick.step == 0 for tick in ticks)
    assert max(tick.call for tick in ticks) < MOST_CALLS


def test_two_denoisers_have_clocks_of_their_own(clock):
    other, scheduler = Clock(), Early()
    scheduler.set_timesteps(3)
    for step, t in enumerate(scheduler.timesteps):
        assert (clock.tick(t, "a").step, other.tick(t, "a").step) == (step, step)
        scheduler.step(torch.ones(1), t, torch.ones(1))


def test_a_denoiser_that_rests_for_some_steps(clock):
    """A second denoiser that takes over half-way, as Wan's low-noise model does."""
    scheduler, other = Early(), Clock()
    for _ in range(2):
        scheduler.set_timesteps(6)
        assert _ticks(clock, scheduler.timesteps[:3], scheduler) == _expected(3)
        assert _ticks(other, scheduler.timesteps[3:], scheduler) == _expected(3)


def test_classes_are_restored():
    before = _methods()
    watch_schedulers()
    watch_schedulers()
    assert _methods() != before
    unwatch_schedulers()
    assert vars(Early)["step"] is not before[Early, "step"], "still watched once"
    later = _defined_later()
    assert hasattr(vars(later)["step"], "__wrapped__")
    original = vars(later)["step"].__wrapped__
    unwatch_schedulers()
    after = _methods()
    assert vars(later)["step"] is original
    assert {k: v for k, v in after.items() if k[0] is not later} == before
    assert "__init_subclass__" not in vars(SchedulerMixin)
    assert not hasattr(vars(_defined_later())["step"], "__wrapped__")
    assert last_scheduler() is None


def test_signatures_stay():
    classes = [
        diffusers.EulerDiscreteScheduler,
        diffusers.FlowMatchEulerDiscreteScheduler,
        diffusers.DDIMScheduler,
        Early,
    ]
    before = [(inspect.signature(c.step), inspect.signature(c.set_timesteps), c.step.__doc__) for c in classes]
    watch_schedulers()
    try:
        assert before == [
            (inspect.signature(c.step), inspect.signature(c.set_timesteps), c.step.__doc__) for c in classes
        ]
        assert "sigmas" in inspect.signature(diffusers.EulerDiscreteScheduler().set_timesteps).parameters
    finally:
        unwatch_schedulers()


def test_a_scheduler_is_not_kept_alive(clock):
    scheduler = Early()
    scheduler.set_timesteps(2)
    assert last_scheduler() is scheduler
    del scheduler
    assert last_scheduler() is None


def test_subclass_with_arguments(clock):
    """A class of the user's with an `__init_subclass__` and keywords of its own works while classes are watched."""

    class Named(SchedulerMixin):
        def __init_subclass__(cls, label="none", **kwargs):
            super().__init_subclass__(**kwargs)
            cls.label = label

    class Labelled(Named, label="mine"):
        def step(self, model_output, timestep, sample):
            return sample

    assert Labelled.label == "mine" and hasattr(vars(Labelled)["step"], "__wrapped__")


# The next timestep, for stride 2.

SCHEDULES = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
}
TIMES = [(torch.float32, 0, 20), (torch.float32, 7, 20), (torch.float32, 20, 50), (torch.float16, 0, 20)]
TIMES += [(torch.float16, 20, 50), (torch.bfloat16, 0, 50), (torch.bfloat16, 20, 50)]
CALLERS = {"t": lambda t: t, "t / N": lambda t: t / 1000, "(N - t) / N": lambda t: (1000 - t) / 1000}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype, start, num_steps", TIMES)
def test_following_timestep(caller, schedule, dtype, start, num_steps):
    cls, options = SCHEDULES[schedule]
    if start and dtype != torch.float32 and not hasattr(cls, "set_begin_index"):
        pytest.skip(
            "a list of integers, some of which a coarse type cannot tell apart; pipelines pass them as they are"
        )
    scheduler = cls(**options)
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    values = [CALLERS[caller](t.float()) for t in scheduler.timesteps]
    found = Timesteps(scheduler)
    for i in range(start, len(values) - 1):
        mine = values[i].to(dtype).expand(2)
        found.see(mine) if i < start + 4 else found.skip()
        assert not found.is_last
        following = found.following(mine)
        assert following.shape == mine.shape and following.dtype == dtype
        expected = values[i + 1].to(dtype).expand(2)
        # The caller's arithmetic is in single precision.
        assert torch.allclose(following, expected, rtol=1e-6, atol=1e-6), f"step {i}"
    found.skip()
    assert found.is_last


def test_following_number():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(5)
    values = scheduler.timesteps.tolist()
    found = Timesteps(scheduler)
    found.see(values[0])
    assert found.following(values[0]) == values[1] and isinstance(found.following(values[0]), int)
    found.see(float(values[1]))
    assert isinstance(found.following(float(values[1])), float)


@pytest.mark.parametrize("wrong", [torch.tensor(123.456), torch.tensor(-4.0), 2e5])
def test_unknown_timesteps_are_refused(wrong):
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"stride=2 needs the caller's timesteps.*t / N.*use stride=1"):
        Timesteps(scheduler).see(wrong)


def test_no_scheduler_is_refused():
    with pytest.raises(ValueError, match=r"stride=2.*scheduler=.*stride=1"):
        Timesteps(None)
