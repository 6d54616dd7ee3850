"""docs/coverage.md: which denoiser classes of diffusers can be shared how, as found here; `make tables` writes it."""

import functools
import os
import re
from pathlib import Path

import coverage_models
import diffusers
import pytest
import ranks
import torch
from coverage_models import MODELS
from torch.utils._pytree import tree_leaves

import asyncdiff_fast

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
# Each with the largest difference, relative to the largest element, of repeated calls with the same inputs.
MODES = {
    "one device": (dict(), 1e-5),
    "stages, exact": (dict(num_stages=2, warmup_steps=9), 1e-5),
    "stages, displaced": (dict(num_stages=2, warmup_steps=1), 1e-5),
    "patches, synchronous": (dict(num_patches=2, exchange="sync"), 1e-4),
    "patches, displaced": (dict(num_patches=2, warmup_steps=1), 1e-4),
    "halves of guidance": (dict(cfg_parallel=True), 1e-4),
}
REASONS = {
    "cannot be shared out as patches": "rows are combined",
    "does not run on patch": "does not run on a patch",
    "needs a latent": "latents in a list",
    "gives another result on half": "halves differ",
    "leads": "rows change by slices or filters",
}
FEW = ("UNet2DConditionModel", "Lumina2Transformer2DModel", "SanaTransformer2DModel", "DiTTransformer2DModel")


@torch.no_grad()
def _cell(name, options, limit):
    """What becomes of a model of a class under one way to share it, in words."""
    model, inputs = coverage_models.build(name), coverage_models.inputs(name)

    def results():
        return [x for x in tree_leaves(model(**inputs)) if isinstance(x, torch.Tensor)]

    plain = results()
    try:
        asyncdiff_fast.patch(model, timeout_s=30, **options)
        apart = 0.0
        for _ in range(4):
            apart = max(
                apart, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results(), plain, strict=True))
            )
        found = "works" if apart <= limit else f"WRONG by {apart:.0e}"
    except asyncdiff_fast.ExchangeError:
        raise
    except (ValueError, TypeError) as error:
        found = "refused: " + next((reason for text, reason in REASONS.items() if text in str(error)), str(error)[:60])
    except Exception as error:
        found = f"fails: {type(error).__name__}"
    if "_asyncdiff_fast" in vars(model):
        asyncdiff_fast.unpatch(model)
    return found


def _cells(rank, names, modes):
    torch.set_num_threads(1)
    return {(name, mode): _cell(name, *MODES[mode]) for name in names for mode in modes}


@functools.cache
def table(names):
    """{(class, mode): what becomes of it}."""
    shared = tuple(mode for mode in MODES if mode != "one device")
    (alone,), both = (
        ranks.run(1, _cells, names, ("one device",), timeout=280),
        ranks.run(2, _cells, names, shared, timeout=580),
    )
    assert both[0] == both[1], "ranks disagree"
    return alone | both[0]


def classes():
    """Names of all denoiser classes that diffusers exports."""
    found = [n for n in dir(diffusers) if re.search(r"Transformer\w*Model$|DiT2DModel$|^UNet|UNet$|UVit2DModel$", n)]
    return [n for n in found if "ControlNet" not in n and "Pipeline" not in n]


def page():
    """The text of the page."""
    cells, names = table(tuple(MODELS)), classes()
    lines = ["# Which denoisers can be shared how", "", INTRODUCTION, "", f"| class | {' | '.join(MODES)} |"]
    lines.append("|---" * (len(MODES) + 1) + "|")
    for name in names:
        lines.append(f"| {name} | {' | '.join(cells.get((name, mode), '') for mode in MODES)} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """Every UNet and transformer that diffusers exports, each tiny and random, on two processes without a
GPU; made by `make tables`. "works": the unpatched result, at every call with the same inputs. "refused": one error on
every rank that says why and what else to take; nothing is patched then. "fails": an error of the model's own. A cell
that no test has looked at is empty. Steps side by side need nothing of a class, see [steps.md](steps.md)."""


def test_some_classes_are_as_the_page_says():
    text = PAGE.read_text()
    cells = table(FEW)
    for name in FEW:
        row = f"| {name} | {' | '.join(cells[name, mode] for mode in MODES)} |"
        assert row in text, row


def test_the_page_has_all_classes():
    rows = {line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")} - {"class"}
    assert rows == set(classes())
    assert set(MODELS) <= rows


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page():
    text = page()
    if os.environ.get("ASYNCDIFF_FAST_TABLES"):
        PAGE.write_text(text)
    assert "WRONG" not in text
    assert PAGE.read_text() == text
