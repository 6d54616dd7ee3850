"""Fixed-point sampling of a window ends at the sequential sampler's latents, on one device and on several."""

import functools

import bare
import diffusers
import pytest
import ranks
import torch
import torch.distributed as dist

import asyncdiff_fast
from asyncdiff_fast.steps.linear import linear

STEPS = 10
# Of the largest element: the sequential loop steps in fp32, and batches of other sizes add in another order.
CLOSE = 1e-5
SAMPLERS = {
    "DDIM": ("DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=False)),
    "DDIM, v-prediction": ("DDIMScheduler", dict(clip_sample=False, prediction_type="v_prediction")),
    "DDIMParallel": ("DDIMParallelScheduler", dict(clip_sample=False)),
    "CogVideoXDDIM": ("CogVideoXDDIMScheduler", dict(clip_sample=False, prediction_type="v_prediction")),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler, Karras": ("EulerDiscreteScheduler", dict(use_karras_sigmas=True)),
    "EDM Euler": ("EDMEulerScheduler", {}),
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0)),
}
# Tolerances that leave no point to chance.
EXACT = {"anderson": dict(tol1=0.0, tol2=0.0), "picard": dict(tolerance=0.0)}
REFUSED = {
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, "EulerAncestralDiscreteScheduler.*make one of DDIM"),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}, "DPMSolverMultistepScheduler"),
    "Heun": ("HeunDiscreteScheduler", {}, "HeunDiscreteScheduler"),
    "DDIM that clips": ("DDIMScheduler", {}, "not linear.*clip_sample=False"),
    "FlowMatchEuler that draws": (
        "FlowMatchEulerDiscreteScheduler",
        dict(stochastic_sampling=True),
        "not linear.*stochastic_sampling=False",
    ),
}


def make(kind):
    name, options = SAMPLERS[kind] if kind in SAMPLERS else REFUSED[kind][:2]
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def begun(at):
    """A sampler whose loop begins at a step."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(at)
    return scheduler


def start(scheduler):
    return bare.noise() * getattr(scheduler, "init_noise_sigma", 1.0)


@functools.cache
def model():
    return bare.Bare(num_blocks=2)


def predict(points, timesteps):
    """Points (n, 1, c, h, w)."""
    return model()(points.flatten(0, 1), timesteps.to(points)).view(points.shape)


@torch.no_grad()
def sequential(scheduler):
    """Latents before every step and after the last, by a plain loop."""
    x = start(scheduler)
    found = [x]
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model()(scaled, t), t, x, return_dict=False)[0]
        found.append(x)
    return torch.stack(found)


def close(found, expected, by=CLOSE):
    return float((found - expected).abs().max()) <= by * float(expected.abs().max())


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("kind", SAMPLERS)
def test_ends_at_the_sequential_result(kind, method, window):
    scheduler = make(kind)
    options = EXACT[method] | dict(window=window)
    latents, record = asyncdiff_fast.sample_window(
        predict, scheduler, start(scheduler), method, keep_points=True, **options
    )
    expected = sequential(scheduler)
    assert close(latents, expected[-1]) and latents.dtype == expected.dtype
    assert close(record.points[-1], expected.double()), "every point is the loop's, not the last alone"
    assert record.windows[0] == (0, min(window or STEPS, STEPS)) and record.rounds <= STEPS
    assert all(end - begin <= (window or STEPS) for begin, end in record.windows)
    if window == 1:
        assert record.rounds == record.evaluations == record.waits == STEPS


@pytest.mark.parametrize(
    "kind, method",
    [
        ("DDIM", "anderson"),
        ("Euler", "anderson"),
        ("Euler", "picard"),
        ("FlowMatchEuler", "anderson"),
        ("FlowMatchEuler", "picard"),
    ],
)
def test_tolerances_save_rounds(kind, method):
    scheduler = make(kind)
    latents, record = asyncdiff_fast.sample_window(predict, scheduler, start(scheduler), method)
    assert record.rounds < STEPS and record.points is None
    assert close(latents, sequential(make(kind))[-1], by=1e-2)


def test_a_window_that_is_solved_at_once():
    """Its last point is what the next one begins with: the published code would begin with the one before it."""
    scheduler, constant = make("DDIM"), torch.linspace(-1, 1, 256).view(1, 4, 8, 8)
    latents, record = asyncdiff_fast.sample_window(
        lambda points, _: constant.expand_as(points), scheduler, start(scheduler), window=2, tol1=1e9
    )
    x = start(scheduler)
    for t in scheduler.timesteps:
        x = scheduler.step(constant, t, x).prev_sample
    assert record.windows == tuple((k, k + 2) for k in range(0, STEPS, 2))
    assert close(latents, x)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_reads_a_scheduler_without_touching_it(kind):
    used = make(kind)
    sequential(used)
    state = torch.get_rng_state()
    before = repr(vars(used))
    found = linear(used)
    assert repr(vars(used)) == before and torch.equal(torch.get_rng_state(), state)
    assert found.a == linear(make(kind)).a, "a scheduler that has been used reads the same"
    x, fresh = start(used), make(kind)
    for k, t in enumerate(fresh.timesteps):
        u = torch.randn_like(x)
        if hasattr(fresh, "scale_model_input"):
            assert close(fresh.scale_model_input(x, t), found.scales[k] * x)
        y = fresh.step(u, t, x, return_dict=False)[0]
        assert close(found.a[k] * x + found.b[k] * u, y)
        x = y


def variances(scheduler):
    return torch.tensor(linear(scheduler).variances, dtype=torch.float64)


def test_variances_are_ddpm_s_own():
    """Whatever the form: VP, VE and flow latents of the same noise levels have one variance, scaled as they are."""
    ddim, euler, flow = make("DDIM"), make("Euler"), make("FlowMatchEuler")
    levels = ddim.alphas_cumprod.double()[ddim.timesteps]
    levels = torch.cat((levels, ddim.final_alpha_cumprod.double()[None]))
    euler.sigmas = ((1 - levels) / levels).sqrt()
    # Flow latents are VE's times 1 - σ.
    flow.sigmas = euler.sigmas / (1 + euler.sigmas)
    exploding = variances(euler)
    assert torch.allclose(exploding * levels[1:], variances(ddim), rtol=1e-9)
    assert torch.allclose(exploding * (1 - flow.sigmas[1:]).square(), variances(flow), rtol=1e-9)


def test_half_precision_and_batches():
    scheduler, seen = make("DDIM"), set()

    def predict_half(points, timesteps):
        seen.add((points.dtype, tuple(points.shape[1:]), tuple(timesteps.shape) == (len(points),)))
        return torch.stack([model()(x.float(), t) for x, t in zip(points, timesteps, strict=True)]).half()

    noise = torch.cat((start(scheduler), start(scheduler).flip(-1))).half()
    latents, _ = asyncdiff_fast.sample_window(predict_half, scheduler, noise)
    assert seen == {(torch.float16, tuple(noise.shape), True)}
    assert latents.dtype == torch.float16 and close(latents[:1].float(), sequential(make("DDIM"))[-1], by=2e-2)


@pytest.mark.parametrize("kind", REFUSED)
def test_samplers_that_are_refused(kind):
    with pytest.raises(ValueError, match=REFUSED[kind][2]):
        asyncdiff_fast.sample_window(predict, make(kind), bare.noise())


@pytest.mark.parametrize(
    "error, match, changed",
    [
        (ValueError, "method must be 'picard' or 'anderson': got 'newton'", dict(method="newton")),
        (TypeError, "'picard' has no option order; it has window", dict(method="picard", order=2)),
        (ValueError, "window must be at least 1: got 0", dict(window=0)),
        (TypeError, "window must be a whole number: got 2.5", dict(window=2.5)),
        (TypeError, "memory must be a whole number: got True", dict(memory=True)),
        (ValueError, "regularisation must be more than 0: got 0", dict(regularisation=0)),
        (ValueError, "tolerance must be at least 0: got nan", dict(method="picard", tolerance=float("nan"))),
        (TypeError, "predict must be a function", dict(predict=3)),
        (TypeError, "noise must be a floating-point tensor.*got list", dict(noise=[0.0])),
        (TypeError, r"got torch.int64 \(3,\)", dict(noise=torch.arange(3))),
        (ValueError, "set_timesteps", dict(scheduler=diffusers.DDIMScheduler(clip_sample=False))),
        (ValueError, "a step at least: got FlowMatchEuler.* begins at number", dict(scheduler=begun(STEPS))),
        (ValueError, "end_at_one is for DDIM", dict(method="picard", end_at_one=True, scheduler="Euler")),
        (ValueError, "one tensor of its points' shape.*learned variance", dict(predict=lambda x, t: x[:, :, :2])),
        (ValueError, "one tensor of its points' shape.*got tuple", dict(predict=lambda x, t: (x,))),
    ],
)
def test_bad_input_is_refused(error, match, changed):
    given = dict(predict=predict, scheduler="DDIM", noise=bare.noise()) | changed
    if isinstance(given["scheduler"], str):
        given["scheduler"] = make(given["scheduler"])
    with pytest.raises(error, match=match):
        asyncdiff_fast.sample_window(**given)


# Several ranks, in one launch.

ON_RANKS = [
    ("DDIM", "anderson", {}),
    ("DDIM", "picard", dict(window=3)),
    ("Euler", "anderson", dict(window=5, order=4)),
    # The last round has fewer points than ranks.
    ("FlowMatchEuler", "picard", dict(tolerance=0.0)),
    ("FlowMatchEuler", "anderson", dict(window=1)),
]


def _sampled(number, counted=predict, group=None):
    kind, method, options = ON_RANKS[number]
    scheduler = make(kind)
    return asyncdiff_fast.sample_window(counted, scheduler, start(scheduler), method, group=group, **options)


def _refusal(**changed):
    """What a call raises here."""
    given = dict(predict=predict, scheduler=make("DDIM"), noise=bare.noise(), timeout_s=20) | changed
    try:
        asyncdiff_fast.sample_window(**given)
    except Exception as error:
        return type(error).__name__, str(error)


def _fails(points, timesteps):
    raise RuntimeError("no such prompt")


def _all(rank):
    evaluated = []

    def counted(points, timesteps):
        evaluated.append(len(points))
        return predict(points, timesteps)

    found = {"sampled": [_sampled(number) for number in range(len(ON_RANKS))]}
    assert not dist.is_initialized(), "the group that was started is gone"
    dist.init_process_group("gloo")
    found["group"] = _sampled(0, counted), sum(evaluated)
    # Ranks on their own. Both must make both groups.
    alone = [dist.new_group([r]) for r in range(2)][rank]
    found["alone"] = _sampled(0, group=alone)
    found["window"] = _refusal(window=3 + rank)
    found["noise"] = _refusal(noise=bare.noise(rank))
    found["option"] = _refusal(**({"window": 0} if rank else {}))
    found["predict"] = _refusal(**({"predict": _fails} if rank else {}))
    found["after"] = _sampled(0)
    dist.destroy_process_group()
    return found


@functools.cache
def results():
    return ranks.run(2, _all, timeout=200)


def test_two_ranks_equal_one():
    for number in range(len(ON_RANKS)):
        alone, record = _sampled(number)
        both = [found["sampled"][number] for found in results()]
        assert torch.equal(both[0][0], both[1][0]), "the same bits on every rank"
        assert close(both[0][0], alone, by=1e-6)
        for _, theirs in both:
            assert theirs.windows == record.windows and theirs.num_ranks == 2 and record.num_ranks == 1
            assert theirs.waits < record.waits or ON_RANKS[number][2].get("window") == 1


def test_points_are_divided():
    (first, record), _ = results()[0]["group"]
    counts = [found["group"][1] for found in results()]
    assert sum(counts) == record.evaluations and counts[0] == record.waits
    assert all(torch.equal(found["after"][0], first) for found in results()), "failures leave nothing behind"
    assert all(found["alone"][1].num_ranks == 1 for found in results())


def test_ranks_refuse_alike():
    for name, words in (("window", "every rank must sample the same: method"), ("noise", "noise differ")):
        for found in results():
            kind, message = found[name]
            assert kind == "ValueError" and words in message
    assert "window must be at least 1" in results()[1]["option"][1]
    assert "rank 1 refused to sample: window must be at least 1" in results()[0]["option"][1]


def test_a_rank_that_fails_is_named():
    assert results()[1]["predict"] == ("RuntimeError", "no such prompt")
    kind, message = results()[0]["predict"]
    assert kind == "ExchangeError" and "rank 1" in message
