"""Displaced steps on real ranks, one after another, beside a plain simulation in one process."""

import functools
import itertools

import patch_oracle
import pytest
import ranks
import tiny_denoisers
import torch

import asyncdiff_fast

TIMES = (900, 700, 500, 300)
# Of the largest element: rounding, carried on from step to step.
TOLERANCE = 3e-5
TEXT = 5


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _unet(model, x, t):
    return model(x, t, encoder_hidden_states=_random(len(x), TEXT, 32)).sample


def _pixart(model, x, t):
    conditions = {"resolution": None, "aspect_ratio": None}
    text, timestep = _random(len(x), TEXT, 32), torch.full((len(x),), t)
    return model(x, text, timestep=timestep, added_cond_kwargs=conditions).sample.chunk(2, 1)[0]


def _sd3(model, x, t):
    text, pooled = _random(len(x), TEXT, 32), _random(len(x), 64)
    return model(x, text, pooled_projections=pooled, timestep=torch.full((len(x),), float(t))).sample


def _flux(model, x, t):
    ids = torch.zeros(x.shape[1], 3)
    ids[:, 1], ids[:, 2] = torch.arange(x.shape[1]) // 4, torch.arange(x.shape[1]) % 4
    numbers = dict(timestep=torch.full((len(x),), t / 1000), guidance=torch.ones(len(x)))
    text = dict(encoder_hidden_states=_random(len(x), TEXT, 32), pooled_projections=_random(len(x), 32))
    return model(x, img_ids=ids, txt_ids=torch.zeros(TEXT, 3), **text, **numbers).sample


# How a denoiser is made and called, its latent, and {keys of a self-attention: (first of the picture's, rows)}.
MODELS = {
    "unet": (tiny_denoisers.sd15_unet, _unet, (2, 4, 16, 8), {128: (0, 16), 32: (0, 8), 8: (0, 4), 2: (0, 2)}),
    "tall unet": (tiny_denoisers.sd15_unet, _unet, (1, 4, 24, 8), {192: (0, 24), 48: (0, 12), 12: (0, 6), 3: (0, 3)}),
    "pixart": (tiny_denoisers.pixart_transformer, _pixart, (2, 4, 16, 8), {32: (0, 8)}),
    "sd3": (tiny_denoisers.sd3_transformer, _sd3, (1, 4, 16, 8), {32 + TEXT: (0, 8)}),
    "flux": (tiny_denoisers.flux_transformer, _flux, (1, 24, 16), {24 + TEXT: (TEXT, 24)}),
}
CASES = [
    *[("unet", 2, w, dict(group_norm=g)) for g in ("corrected", "stale", "sync", "local") for w in (1, 2)],
    *[("unet", 2, w, dict(exchange="none")) for w in (1, 2)],
    # Patches that share a row of the coarse resolutions, and patches that do not.
    *[(name, 3, 1, dict(group_norm=g)) for name in ("unet", "tall unet") for g in ("corrected", "stale", "local")],
    ("tall unet", 3, 2, dict(group_norm="sync")),
    ("tall unet", 3, 1, dict(exchange="none")),
    *[(name, n, 1, {}) for name in ("pixart", "sd3", "flux") for n in (2, 3)],
    ("pixart", 2, 2, {}),
    ("sd3", 2, 1, dict(exchange="none")),
]


@torch.no_grad()
def predictions(name):
    """A function that gives the predictions of a few steps with a denoiser."""
    _, call, shape, _ = MODELS[name]

    def run(model):
        x, found = _random(*shape), []
        for t in TIMES:
            found.append(call(model, x, t))
            x = x - 0.3 * found[-1]
        return torch.stack(found)

    return run


@torch.no_grad()
def _patched(rank, cases):
    found = []
    for name, num_patches, warmup_steps, options in cases:
        model = MODELS[name][0]()
        options = options | dict(num_patches=num_patches, warmup_steps=warmup_steps, timeout_s=60, predict="none")
        runtime = asyncdiff_fast.patch(model, **options)
        found.append((predictions(name)(model), runtime.plan.rows.held))
        asyncdiff_fast.unpatch(model)
    return found


@functools.cache
def patched(num_patches):
    """[(predictions, held) of each case on each rank]"""
    cases = [case for case in CASES if case[1] == num_patches]
    return list(zip(*ranks.run(num_patches, _patched, cases, timeout=250), strict=True))


def _simulated(case, held):
    name, _, warmup_steps, options = case
    make, _, _, sequences = MODELS[name]
    model = make()
    with torch.no_grad():
        plain = predictions(name)(model)
        with patch_oracle.Simulation(model, held, sequences, warmup_steps, **options):
            return predictions(name)(model), plain


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Each of the simulation's own threads would start as many again."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


def _id(case):
    name, num_patches, warmup_steps, options = case
    return "-".join([name, str(num_patches), str(warmup_steps), *options.values()])


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c[1] > 2), id=_id(c)) for c in CASES])
def test_displaced_steps_follow_the_rule(case):
    number = [c for c in CASES if c[1] == case[1]].index(case)
    results = patched(case[1])[number]
    simulated, plain = _simulated(case, results[0][1])
    for (mine, _), step in itertools.product(results, range(len(TIMES))):
        error = (mine[step] - simulated[step]).abs().max() / simulated[step].abs().max()
        assert error <= TOLERANCE, f"step {step}: prediction differs by {error:.1e} of its maximum"
    error = (simulated[-1] - plain[-1]).abs().max() / plain[-1].abs().max()
    assert error > 5 * TOLERANCE, "the case cannot tell displaced from exact"


def test_the_rules_differ():
    """The simulation itself tells the modes apart."""
    held = ((0, 8), (8, 16))
    modes = [dict(group_norm=g) for g in ("corrected", "stale", "sync", "local")] + [dict(exchange="none")]
    runs = [_simulated(("unet", 2, 1, mode), held)[0] for mode in modes]
    for a, b in itertools.combinations(runs, 2):
        assert (a[-1] - b[-1]).abs().max() / b[-1].abs().max() > 5 * TOLERANCE
