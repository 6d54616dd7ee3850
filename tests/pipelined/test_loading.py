"""Pipelines read from a folder by their stages: what is held, what is the same, what is refused."""

import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import ranks
import tiny_pipelines
import torch
from workers import collect

import asyncdiff_fast

# Of the largest element of a picture: other sizes of the same products.
CLOSE = 1e-3
NAMES = ("pixart", "sd15")


def _attempt(run):
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _one(rank, folder, name, options):
    kind = type(tiny_pipelines.build(name))
    pipe = asyncdiff_fast.load(kind, folder / name, num_stages=2, timeout_s=60, **options)
    denoiser = tiny_pipelines.denoiser(pipe)
    before = sum(p.untyped_storage().nbytes() for p in denoiser.parameters())
    images = [tiny_pipelines.generate(pipe, name, seed=seed) for seed in (0, 1)]
    runtime = denoiser._asyncdiff_fast
    held = sum(p.untyped_storage().nbytes() for p in denoiser.parameters())
    refused = _attempt(lambda: asyncdiff_fast.unpatch(pipe))
    found = images, before, held, runtime.plan.held_bytes(rank), refused
    # Not to be had again: the weights stay divided.
    runtime.close()
    return found


def _all(rank, folder):
    found = {}
    for name in NAMES:
        found[name] = _one(rank, folder, name, dict(warmup_steps=9))
    found["patches"] = _one(rank, folder, "pixart", dict(warmup_steps=2, pipeline_patches=2))
    kind = type(tiny_pipelines.build("pixart"))
    found["nowhere"] = _attempt(lambda: asyncdiff_fast.load(kind, folder / "nowhere", num_stages=2))
    found["empty"] = _attempt(lambda: asyncdiff_fast.load(kind, folder / "empty", num_stages=2))
    found["differs"] = _attempt(lambda: _one(rank, folder / f"of {rank}", "pixart", dict(warmup_steps=9)))
    return found


@functools.cache
def results():
    with tempfile.TemporaryDirectory() as name:
        folder, whole = Path(name), {}
        for kind in NAMES:
            pipe = tiny_pipelines.build(kind)
            pipe.save_pretrained(folder / kind)
            whole[kind] = [tiny_pipelines.generate(pipe, kind, seed=seed) for seed in (0, 1)]
        shutil.copytree(folder / "pixart", folder / "empty")
        for file in (folder / "empty" / "transformer").glob("*.safetensors"):
            file.unlink()
        for rank in range(2):
            shutil.copytree(folder / "pixart", folder / f"of {rank}" / "pixart")
        with torch.no_grad():
            model = tiny_pipelines.denoiser(tiny_pipelines.build("pixart"))
            next(iter(model.adaln_single.parameters())).add_(1)
            model.save_pretrained(folder / "of 1" / "pixart" / "transformer")
        return whole, collect(ranks.start(2, _all, folder), 250)


def _error(a, b):
    return float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max() / torch.as_tensor(b).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_those_of_the_whole_pipeline(name):
    whole, found = results()
    for rank in found:
        for mine, expected in zip(rank[name][0], whole[name], strict=True):
            assert _error(mine, expected) <= CLOSE


def test_patches_pass_through_what_was_loaded():
    whole, found = results()
    for rank in found:
        assert 0 < _error(rank["patches"][0][0], whole["pixart"][0]) < 0.5


@pytest.mark.parametrize("name", [*NAMES, "patches"])
def test_a_rank_holds_its_stage_only(name):
    for rank in results()[1]:
        _, before, held, planned, refused = rank[name]
        # Numbers that stand for what is not held are a few bytes each.
        assert before < 16384 and planned <= held <= planned + 16384
        assert "loaded by its stages" in refused


def test_what_cannot_be_loaded_is_refused():
    for rank in results()[1]:
        assert "model_index.json" in rank["nowhere"] and "nowhere" in rank["nowhere"]
        assert "no *.safetensors" in rank["empty"]
        assert "every rank must read the same weights" in rank["differs"]
