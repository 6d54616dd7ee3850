"""Steps side by side on up to eight ranks that are threads: the rule, and how the work is shared."""

import threading

import bare
import diffusers
import pytest
import steps_oracle
import torch
import virtual
from torch.overrides import TorchFunctionMode

from asyncdiff_fast.config import Config
from asyncdiff_fast.runtime import Runtime
from asyncdiff_fast.steps import block, sampling
from asyncdiff_fast.steps.calls import StepCalls

STEPS = 26
# name: class, its options; the last draws noise of its own in every step.
SAMPLERS = {
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "v": ("DDIMScheduler", dict(prediction_type="v_prediction", clip_sample=False)),
    "multistep": ("DPMSolverMultistepScheduler", dict(solver_order=3)),
    "noisy": ("DDPMScheduler", {}),
}


@torch.no_grad()
def loop(model, scheduler, seed=0, leave_at=None):
    scheduler.set_timesteps(STEPS)
    x = bare.noise(seed) * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else bare.noise(seed)
    noisy = isinstance(scheduler, diffusers.DDPMScheduler)
    options = {"generator": torch.Generator().manual_seed(seed)} if noisy else {}
    for step, t in enumerate(scheduler.timesteps):
        if step == leave_at:
            raise KeyboardInterrupt
        x = scheduler.step(model(x, t), t, x, return_dict=False, **options)[0]
    return x


def make(kind):
    name, options = SAMPLERS[kind]
    return getattr(diffusers, name)(**options)


def patched(config, kind):
    """A function of a `VirtualWorld`: ([two results], statistics, bytes sent) of one rank."""
    # Made here: threads share the random numbers that weights are drawn from.
    models = [bare.Bare() for _ in range(config.parallel_steps)]

    def one(world):
        model = models[world.rank]
        steps = StepCalls(config, world)
        steps.open(virtual.VirtualExchange(world))
        runtime = Runtime(model, config, world, steps=steps)
        try:
            scheduler = make(kind)
            found = [loop(model, scheduler), loop(model, scheduler)]
            return found, runtime.stats()["steps"], steps.exchange.sent_bytes
        finally:
            world.gather(None, "the end")
            runtime.close()

    return one


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_rule(kind, num_ranks):
    tolerance = 0.3
    config = Config(parallel_steps=num_ranks, tolerance=tolerance, kernels="torch")
    results = virtual.run(num_ranks, patched(config, kind))
    with steps_oracle.Simulation(make(kind), num_ranks, 2, tolerance, STEPS) as rule:
        simulated = loop(bare.Bare(), rule.scheduler)
    assert max(rule.lengths) > min(2, num_ranks - 1), "the case must have long blocks"
    blocks = [n for n in rule.lengths if n > 1]
    for rank, ((first, second), stats, sent_bytes) in enumerate(results):
        assert torch.equal(first, results[0][0][0]) and torch.equal(first, second)
        assert torch.allclose(first, simulated, rtol=1e-4, atol=1e-5 * float(simulated.abs().max()))
        assert stats["evaluations"] == 2 * (rule.lengths.count(1) + sum(rank < n for n in blocks))
        # With each output goes a number of four bytes; and the first rank's error, which decides how long a block is.
        numbers = 1 + (rank == 0)
        assert sent_bytes == 2 * len(rule.lengths) * (num_ranks - 1) * (first.nbytes + numbers * 4)


def test_a_rank_that_fails_ends_all():
    config = Config(parallel_steps=4, tolerance=1e8, kernels="torch")

    class Odd(bare.Bare):
        def forward(self, x, t):
            if float(t) < 600:
                raise ZeroDivisionError("in the denoiser")
            return super().forward(x, t)

    models = [Odd() if rank == 1 else bare.Bare() for rank in range(4)]

    def one(world):
        model = models[world.rank]
        steps = StepCalls(config, world)
        steps.open(virtual.VirtualExchange(world))
        runtime = Runtime(model, config, world, steps=steps)
        try:
            loop(model, make("flow"))
        finally:
            runtime.close()

    with pytest.raises(ZeroDivisionError):
        virtual.run(4, one)


@pytest.mark.parametrize("told, said", [(lambda: STEPS, False), (lambda: None, True)])
def test_a_block_that_an_exception_cuts_is_said_only_where_latents_may_be_held(caplog, told, said):
    """A pipeline's latents are lost with its loop; those of a loop of one's own may be kept."""
    models = [bare.Bare() for _ in range(4)]
    config = Config(parallel_steps=4, tolerance=1e8, kernels="torch")

    def one(world):
        steps = StepCalls(config, world, told)
        steps.open(virtual.VirtualExchange(world))
        runtime, scheduler = Runtime(models[world.rank], config, world, steps=steps), make("flow")
        try:
            # After two exact steps and one of a block.
            with pytest.raises(KeyboardInterrupt):
                loop(models[world.rank], scheduler, leave_at=3)
            world.gather(None, "all have left")
            return loop(models[world.rank], scheduler)
        finally:
            runtime.close()

    first, *others = virtual.run(4, one)
    assert all(torch.equal(first, other) for other in others)
    assert any("in the middle of a block" in text for text in caplog.messages) == said


def test_ranks_that_round_otherwise_take_the_same_blocks(monkeypatch):
    """Were each to decide by its own error, one would wait in an exact step for what others send after a block."""
    monkeypatch.setattr(virtual, "PATIENCE_S", 5)
    own, exact = threading.local(), block.relative_error
    for module in (block, sampling):
        monkeypatch.setattr(module, "relative_error", lambda *args: exact(*args) * own.factor)
    run = patched(Config(parallel_steps=3, tolerance=0.3, kernels="torch"), "flow")

    def one(world):
        own.factor = 1000.0**world.rank
        return run(world)

    (pictures, stats, _), *others = virtual.run(3, one)
    assert stats["blocks"] > 2
    for theirs, their_stats, _ in others:
        assert torch.equal(theirs[0], pictures[0]) and their_stats["block_lengths"] == stats["block_lengths"]


class Reads(TorchFunctionMode):
    """Counts what waits for a device: numbers and truths taken from tensors."""

    count, reading = 0, {getattr(torch.Tensor, name) for name in ("tolist", "item", "__float__", "__int__", "__bool__")}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in self.reading
        return func(*args, **(kwargs or {}))


class Straight:
    """A sampler of no known family, which reads nothing of its tensors."""

    def set_timesteps(self, steps):
        self.timesteps = torch.linspace(999, 0, steps)

    def step(self, model_output, timestep, sample, return_dict=False):
        return (sample - model_output / STEPS,)


def test_no_step_of_the_sampler_waits_for_the_device():
    """How long the next block may be is read once the next step begins, when all before it is queued."""
    config = Config(parallel_steps=2, tolerance=1e8, kernels="torch")
    models = [bare.Bare() for _ in range(2)]

    def one(world):
        scheduler, reads = Straight(), Reads()
        steps = StepCalls(config, world, scheduler=scheduler)
        steps.open(virtual.VirtualExchange(world))
        runtime = Runtime(models[world.rank], config, world, steps=steps)
        try:
            scheduler.set_timesteps(STEPS)
            x = bare.noise(0)
            with torch.no_grad():
                for t in scheduler.timesteps:
                    output = models[world.rank](x, t)
                    with reads:
                        (x,) = scheduler.step(output, t, x)
            return reads.count, runtime.stats()["steps"]
        finally:
            world.gather(None, "the end")
            runtime.close()

    for count, stats in virtual.run(2, one):
        assert stats["blocks"] == 12 and stats["latent_error"]["mean"] > 0
        # The list of timesteps is read once, to know how many steps there are, and after the last step what was sent.
        assert count <= 3
