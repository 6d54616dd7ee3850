"""docs/coverage.md: which denoiser classes of diffusers can be shared how, as found here; `make tables` writes it."""

import functools
import itertools
import os
import re
from pathlib import Path

import coverage_models
import diffusers
import pytest
import ranks
import torch
from coverage_models import LEFT_OUT, MODELS
from refusals import is_ours
from torch.utils._pytree import tree_leaves

import asyncdiff_fast

STEPS = 8
PAGE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
# Each with the largest difference, relative to the largest element, of repeated calls with the same inputs.
MODES = {
    "one device": (dict(), 1e-5),
    # Of a picture: rounding of a call, as of packed weights, grows over the steps.
    "steps": (dict(parallel_steps=2), 1e-4),
    "stages, exact": (dict(num_stages=2, warmup_steps=9), 1e-5),
    "stages, displaced": (dict(num_stages=2, warmup_steps=1), 1e-5),
    "patches, synchronous": (dict(num_patches=2, exchange="sync"), 1e-4),
    "patches, displaced": (dict(num_patches=2, warmup_steps=1), 1e-4),
    "halves of guidance": (dict(cfg_parallel=True), 1e-4),
}
ALONE, *SHARED = MODES
REASONS = {
    "does not run on patch": "does not run on a patch",
    "needs a latent": "no latent of 3 to 5 dimensions",
    "does not give on half": "halves differ",
    "while it is looked at": "calls cannot be followed",
    "leads": "rows change by slices or filters",
    "changes the rows": "rows change by slices or filters",
    "attends to tokens that are not": "tokens beside the picture's",
    "works along rows": "rows are compared",
    "cannot be shared out as patches": "rows are combined",
}
FEW = (
    "UNet2DConditionModel", "Lumina2Transformer2DModel", "SanaTransformer2DModel", "DiTTransformer2DModel",
    "MiniMaxMusic3Transformer1DModel",
)  # fmt: skip
# Whose tokens, positions and texts come as those of another class do, or that compile for seconds.
ALIKE = {
    "AnyFlowFARTransformer3DModel", "AnyFlowTransformer3DModel", "BriaFiboTransformer2DModel",
    "BriaTransformer2DModel", "ChronoEditTransformer3DModel", "CogView3PlusTransformer2DModel",
    "ConsisIDTransformer3DModel", "DreamLiteTransformer2DModel",
    "Flux3Transformer2DModel", "HeliosTransformer3DModel", "HunyuanImageTransformer2DModel",
    "JoyImageEditTransformer3DModel", "Kandinsky6Transformer3DModel", "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel", "SkyReelsV2Transformer3DModel", "Transformer2DModel", "TransformerTemporalModel",
    "WanAnimate2Transformer3DModel", "WanVACETransformer3DModel",
}  # fmt: skip


def _results(model, inputs):
    return [x for x in tree_leaves(model(**inputs)) if isinstance(x, torch.Tensor)]


def _pictures(model, inputs):
    """The latents that a loop of some steps ends with."""
    place = next(name for name in ("sample", "hidden_states", "x") if name in inputs)
    moment = next(name for name in ("timestep", "timesteps", "t", "timestep_ratio") if name in inputs)
    given, when, scheduler = inputs[place], torch.as_tensor(inputs[moment]), diffusers.DDIMScheduler()
    # Some count from 0 to 1.
    unit = 1.0 if float(when.max()) > 1 else 1 / scheduler.config.num_train_timesteps
    scheduler.set_timesteps(STEPS)
    x = torch.stack(given) if isinstance(given, list) else given
    for t in scheduler.timesteps:
        now = torch.full_like(when, float(t) * unit)
        made = _results(model, inputs | {place: list(x) if isinstance(given, list) else x, moment: now})
        output = torch.stack(made) if isinstance(given, list) else made[0]
        for dim, size in enumerate(x.shape):
            # Some classes also give a variance, and some need more than they give.
            output = torch.nn.functional.pad(output.movedim(dim, -1), (0, max(0, size - output.shape[dim])))
            output = output[..., :size].movedim(-1, dim)
        x = scheduler.step(output, t, x).prev_sample
    return [x]


def _apart(model, inputs, plain, make, times):
    """The largest difference, of the largest element, of what is made several times."""
    found = (zip(make(model, inputs), plain, strict=True) for _ in range(times))
    return max(float((a - b).abs().max() / b.abs().max()) for pairs in found for a, b in pairs)


def _sharing(model, inputs, options, limit):
    plain = _results(model, inputs)
    asyncdiff_fast.patch(model, timeout_s=30, **options)
    apart = _apart(model, inputs, plain, _results, 4)
    return "works" if apart <= limit else f"WRONG by {apart:.0e}"


def _steps(model, inputs, options, limit):
    """Exact where all steps are, and side by side without anything amiss."""
    plain = _pictures(model, inputs)
    asyncdiff_fast.patch(model, timeout_s=30, warmup_steps=STEPS, **options)
    apart = _apart(model, inputs, plain, _pictures, 2)
    asyncdiff_fast.unpatch(model)
    runtime = asyncdiff_fast.patch(model, timeout_s=30, tolerance=1e8, **options)
    whole = all(x.isfinite().all() for x in _pictures(model, inputs)) and runtime.stats()["steps"]["blocks"] > 0
    return f"WRONG by {apart:.0e}" if apart > limit else "works" if whole else "WRONG: no steps side by side"


@torch.no_grad()
def _cell(name, options, limit):
    """What becomes of a model of a class under one way to share it, in words."""
    model, inputs = coverage_models.build(name), coverage_models.inputs(name)
    try:
        found = (_steps if "parallel_steps" in options else _sharing)(model, inputs, options, limit)
    except asyncdiff_fast.ExchangeError:
        raise
    except Exception as error:
        reason = next((reason for text, reason in REASONS.items() if text in str(error)), str(error)[:60])
        found = f"refused: {reason}" if is_ours(error) else f"fails: {type(error).__name__}"
    if "_asyncdiff_fast" in vars(model):
        asyncdiff_fast.unpatch(model)
    return found


def _cells(rank, places):
    return {(name, mode): _cell(name, *MODES[mode]) for name, mode in places}


@functools.cache
def table(names):
    """{(class, mode): what becomes of it}."""
    (alone,) = ranks.run(1, _cells, [(name, ALONE) for name in names], timeout=580)
    for mode in SHARED:
        alone |= _shared([(name, mode) for name in names])
    return alone


def _shared(places):
    """The cells of some places that two ranks share."""
    first, second = ranks.run(2, _cells, places, timeout=580)
    assert first == second, "ranks disagree"
    return first


def classes():
    """Names of all denoiser classes that diffusers exports."""
    found = [n for n in dir(diffusers) if re.search(r"Transformer\w*Model$|DiT2DModel$|^UNet|UNet$|UVit2DModel$", n)]
    return [n for n in found if "ControlNet" not in n and "Pipeline" not in n]


def _row(cells, name):
    return f"| {name} | {' | '.join(cells.get((name, mode), '') for mode in MODES)} |"


def page():
    """The text of the page."""
    cells, names = table(tuple(MODELS)), [name for name in classes() if name in MODELS]
    lines = ["# Which denoisers can be shared how", "", INTRODUCTION, "", f"| class | {' | '.join(MODES)} |"]
    lines.append("|---" * (len(MODES) + 1) + "|")
    for name in names:
        lines.append(_row(cells, name))
    lines += ["", *(f"`{name}` is not tested here: {reason}." for name, reason in LEFT_OUT.items())]
    others = [f"`{name}`" for name in classes() if name not in MODELS.keys() | LEFT_OUT]
    if others:
        lines += ["", f"Of the other {len(others)} no tiny model has been written: {', '.join(others)}."]
    return "\n".join(lines) + "\n"


INTRODUCTION = """Every UNet and transformer that diffusers exports, each tiny and random, on two processes without a
GPU; made by `make tables`. "works": the unpatched result, at every call with the same inputs. "refused": one error on
every rank of this package that says why and what else to take; nothing is patched then. "fails": another error, of the
model itself, say. "steps" are [steps side by side](steps.md): the unpatched result where all steps are exact, and steps
that do run side by side otherwise."""


# First, since it writes what the others read.
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_the_page():
    text = page()
    if os.environ.get("ASYNCDIFF_FAST_TABLES"):
        PAGE.write_text(text)
    assert "WRONG" not in text
    assert PAGE.read_text() == text


def test_some_classes_are_as_the_page_says():
    text = PAGE.read_text()
    cells = table(FEW)
    for name in FEW:
        assert _row(cells, name) in text, _row(cells, name)


def test_the_page_has_all_classes():
    text = PAGE.read_text()
    rows = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")} - {"class"}
    assert rows == set(MODELS) and rows | set(re.findall(r"`(\w+)`", text)) == set(classes())


def _read():
    """{(class, mode): cell} of the page."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {(row[0], mode): cell for row in rows for mode, cell in zip(rows[0][1:], row[1:], strict=False)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_class_in_one_mode():
    """In turn, so that each mode has its share."""
    found = _shared(list(zip([n for n in MODELS if n not in ALIKE], itertools.cycle(SHARED), strict=False)))
    written = _read()
    assert found == {place: written[place] for place in found}, "run `make tables`"
