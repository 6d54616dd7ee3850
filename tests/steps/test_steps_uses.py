"""Steps side by side as people use pipelines: what is right stays right, and what cannot be is exact and said."""

import functools
import logging

import bare
import diffusers
import pytest
import ranks
import sequences
import steps_oracle
import tiny_pipelines
import torch

import asyncdiff_fast

TOLERANCE, STEPS = 0.2, 12


class Heard(logging.Handler):
    """What the package logs."""

    def __init__(self):
        super().__init__()
        self.lines = []
        logger = logging.getLogger("asyncdiff_fast")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))

    def take(self):
        lines, self.lines = self.lines, []
        return lines


def draw(pipe, steps=STEPS, seed=0, **options):
    arguments = dict(height=32, width=32, guidance_scale=5.0, output_type="np") | options
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return torch.as_tensor(pipe("a cat", num_inference_steps=steps, generator=generator, **arguments).images)


def looks(pipe, step, t, kwargs):
    assert torch.isfinite(kwargs["latents"]).all()
    return {}


def darkens(pipe, step, t, kwargs):
    return {"latents": 0.9 * kwargs["latents"]}


def darkens_late(pipe, step, t, kwargs):
    return {"latents": 0.5 * kwargs["latents"]} if step == 6 else {}


def raises(pipe, step, t, kwargs):
    if step == 5:
        raise KeyError("the callback's own")
    return {}


def stops(pipe, step, t, kwargs):
    pipe._interrupt = step >= 4
    return {}


class TwoStates(torch.nn.Module):
    """Steps a second scheduler with the same prediction, as pipelines of sound and pictures do."""

    def __init__(self):
        super().__init__()
        self.net = bare.Bare()

    def forward(self, x, t):
        return self.net(x, t)


class Own:
    """A scheduler of no library."""

    def set_timesteps(self, n):
        self.timesteps = torch.linspace(1000, 1000 / n, n)

    def step(self, model_output, timestep, sample):
        return (sample - 0.05 * model_output,)


@torch.no_grad()
def own_loop(model, scheduler, steps=STEPS, second=None):
    scheduler.set_timesteps(steps)
    x = bare.noise()
    y = x.clone()
    if second is not None:
        second.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = model(x, t)
        x = scheduler.step(output, t, x)[0]
        if second is not None:
            y = second.step(output, t, y)[0]
    return x + y


def _uses(rank):
    """{use: what it gave}"""
    heard, found = Heard(), {}
    pipe = tiny_pipelines.build("sd15")
    plain = draw(pipe)
    plains = {name: draw(pipe, callback_on_step_end=f) for name, f in (("darkens", darkens), ("late", darkens_late))}
    length = lambda: pipe._num_timesteps  # noqa: E731
    with steps_oracle.Simulation(pipe.scheduler, 2, 2, TOLERANCE, length) as rule:
        simulated = draw(pipe)
        rule.restart()
        short = draw(pipe, steps=7, seed=1, height=48)
    from_image = sequences.image_to_image(pipe)
    plain_image = torch.as_tensor(from_image(0.6)())

    runtime = asyncdiff_fast.patch(pipe, parallel_steps=2, tolerance=TOLERANCE, timeout_s=60)
    heard.take()

    def use(name, run):
        runtime.clear_stats()
        try:
            result = run()
        except (KeyError, ValueError) as error:
            result = str(error)
        found[name] = result, runtime.stats()["steps"], heard.take()

    use("looks", lambda: draw(pipe, callback_on_step_end=looks))
    use("another size", lambda: draw(pipe, steps=7, seed=1, height=48))
    use("darkens", lambda: draw(pipe, callback_on_step_end=darkens))
    use("darkens again", lambda: draw(pipe, callback_on_step_end=darkens))
    use("late", lambda: draw(pipe, callback_on_step_end=darkens_late))
    use("raises", lambda: draw(pipe, callback_on_step_end=raises))
    use("after it raised", lambda: draw(pipe))
    use("stops", lambda: draw(pipe, callback_on_step_end=stops))
    use("after it stopped", lambda: draw(pipe))
    use("image", lambda: torch.as_tensor(from_image(0.6)()))
    with torch.enable_grad():
        x = bare.noise().requires_grad_(True)
        use(
            "gradients",
            lambda: pipe.unet(x, 10, torch.zeros(1, 77, pipe.unet.config.cross_attention_dim)).sample.mean(),
        )
    use("without guidance", lambda: draw(pipe, guidance_scale=1.0))
    asyncdiff_fast.unpatch(pipe)
    found["unpatched"] = draw(pipe)

    model = bare.Bare()
    alone = own_loop(model, Own())
    scheduler = Own()
    runtime = asyncdiff_fast.patch(model, parallel_steps=2, tolerance=1e8, timeout_s=60, scheduler=scheduler)
    use("own scheduler", lambda: own_loop(model, scheduler))
    asyncdiff_fast.unpatch(model)
    found["own scheduler left"] = sorted(vars(scheduler))
    runtime = asyncdiff_fast.patch(model, parallel_steps=2, tolerance=1e8, timeout_s=60)
    use("unknown scheduler", lambda: own_loop(model, Own()))
    euler = [diffusers.FlowMatchEulerDiscreteScheduler() for _ in range(2)]
    use("two schedulers", lambda: own_loop(model, euler[0], second=euler[1]))
    asyncdiff_fast.unpatch(model)
    two = own_loop(
        model, diffusers.FlowMatchEulerDiscreteScheduler(), second=diffusers.FlowMatchEulerDiscreteScheduler()
    )
    runtime = asyncdiff_fast.patch(model, parallel_steps=2, tolerance=1e8, timeout_s=60)

    def differently():
        ddim = diffusers.DDIMScheduler(clip_sample=False)
        ddim.set_timesteps(6)
        x = bare.noise()
        with torch.no_grad():
            for t in ddim.timesteps:
                x = ddim.step(model(x, t), t, x, eta=0.1 * rank, generator=torch.Generator().manual_seed(0))[0]
        return x

    use("other steps on other ranks", differently)
    asyncdiff_fast.unpatch(model)
    return found, dict(plain=plain, simulated=simulated, short=short, image=plain_image, alone=alone, two=two, **plains)


@functools.cache
def uses():
    return ranks.run(2, _uses, timeout=290)


def of(name):
    """[(result, stats, log)] of the ranks, and what it is to be compared with."""
    return [found[name] for found, _ in uses()], uses()[0][1]


def says(log, level, text):
    return any(kind == level and text in line for kind, line in log)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("looks", "simulated"),
        ("another size", "short"),
        ("after it raised", "simulated"),
        ("after it stopped", "simulated"),
    ],
)
def test_blocks(name, expected):
    everyone, known = of(name)
    for result, stats, log in everyone:
        assert torch.equal(result, everyone[0][0]) and torch.allclose(result, known[expected], atol=1e-5)
        assert stats["blocks"] > 0 and not stats["exact_because"] and not log


@pytest.mark.parametrize("name, expected", [("darkens", "darkens"), ("darkens again", "darkens")])
def test_changed_latents_are_exact_and_said_once(name, expected):
    everyone, known = of(name)
    for result, stats, log in everyone:
        assert torch.equal(result, known[expected]) and stats["blocks"] == 0
        assert stats["exact_because"] == {"the latents are changed between two steps": 1}
        assert says(log, "INFO", "the latents are changed") == (name == "darkens")


def test_latents_changed_in_the_middle_are_said():
    everyone, known = of("late")
    for result, stats, log in everyone:
        assert torch.equal(result, everyone[0][0])
        assert says(log, "WARNING", "the latents were changed at step 7") == bool(stats["blocks_cut_short"])
        assert stats["blocks"] > 0 and float((result - known["late"]).abs().max()) < 0.1


def test_a_callback_that_raises():
    for result, _, log in of("raises")[0]:
        assert "the callback's own" in result
        assert not log or says(log, "WARNING", "in the middle of a block")


def test_a_loop_that_stops_in_a_block_is_said():
    for _, stats, log in of("stops")[0]:
        whole = stats["exact_steps"] + sum(n * k for n, k in stats["block_lengths"].items())
        assert says(log, "WARNING", "predictions") == (whole < 5)


def test_image_to_image():
    everyone, known = of("image")
    for result, stats, _ in everyone:
        assert torch.equal(result, everyone[0][0]) and float((result - known["image"]).abs().max()) < 0.05
        assert stats["blocks"] > 0


def test_gradients_are_exact():
    for result, stats, _ in of("gradients")[0]:
        assert result.requires_grad and stats["evaluations"] == 0


def test_without_guidance():
    for result, stats, _ in of("without guidance")[0]:
        assert torch.equal(result, of("without guidance")[0][0][0]) and stats["blocks"] > 0


def test_unpatched():
    for found, known in uses():
        assert torch.equal(found["unpatched"], known["plain"])
        assert found["own scheduler left"] == ["timesteps"]


def test_a_scheduler_of_no_library():
    everyone, known = of("own scheduler")
    for result, stats, _ in everyone:
        assert stats["blocks"] == 5 and torch.equal(result, everyone[0][0])
        assert torch.allclose(result, known["alone"], atol=0.05)
    for result, stats, log in of("unknown scheduler")[0]:
        assert torch.equal(result, known["alone"]) and stats["blocks"] == 0
        assert says(log, "INFO", "pass scheduler= to patch()")


def test_two_schedulers():
    everyone, known = of("two schedulers")
    for result, stats, log in everyone:
        assert torch.equal(result, known["two"]) and stats["blocks"] == 0
        assert says(log, "INFO", "steps more than once")


def test_samplers_that_do_other_things_on_other_ranks_are_refused():
    for result, stats, _ in of("other steps on other ranks")[0]:
        assert stats["blocks"] == 0 and "eta is 0.0 on rank 0 and 0.1 on rank 1" in result
