"""The small trained model of examples/shapes: its captions, its pictures, its judge and the pipeline itself."""

import importlib
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

SHAPES = Path(__file__).resolve().parent.parent / "examples" / "shapes"
LIMIT_BYTES = 8 * 10**6


@pytest.fixture(scope="module")
def shapes():
    """The example's modules, found as its scripts find them; off the path again afterwards."""
    sys.path.append(str(SHAPES))
    names = ("grammar", "render", "judge", "metrics", "sampling", "batches", "train", "train_forms")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(SHAPES))
    for name in names:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def pipe(shapes):
    return shapes["sampling"].load(SHAPES / "unet")


def draw_captions(grammar, n, seed, **options):
    rng = random.Random(seed)
    return [grammar.sample(rng, **options) for _ in range(n)]


def test_every_caption_reads_back(shapes):
    grammar = shapes["grammar"]
    captions = grammar.all_one_object() + draw_captions(grammar, 500, seed=0, num_objects=2)
    assert len(set(map(str, captions))) == len(set(captions))
    assert all(grammar.parse(str(caption)) == caption for caption in captions)


@pytest.mark.parametrize(
    "text",
    ["", "a red star", "red star, sky background", "a red cat, sky background", "a red star, moon background"],
)
def test_other_texts_are_refused(shapes, text):
    with pytest.raises(ValueError, match=r"not an? (caption|object) of this grammar"):
        shapes["grammar"].parse(text)


def test_held_out_captions_are_an_eighth_of_every_word(shapes):
    grammar = shapes["grammar"]
    everything = grammar.all_one_object()
    held_out = [caption for caption in everything if grammar.is_held_out(caption)]
    assert 0.1 < len(held_out) / len(everything) < 0.15
    for words in ("colour", "shape", "striped"):
        counts = Counter(getattr(caption.first, words) for caption in held_out)
        assert set(counts) == {getattr(caption.first, words) for caption in everything}
        assert max(counts.values()) <= 1.5 * min(counts.values())


def test_training_never_draws_a_held_out_caption(shapes):
    grammar = shapes["grammar"]
    assert not any(grammar.is_held_out(caption) for caption in draw_captions(grammar, 2000, seed=1))
    for num_objects in (1, 2):
        captions = grammar.held_out_set(128, num_objects)
        assert captions == grammar.held_out_set(128, num_objects)
        assert all(grammar.is_held_out(caption) and len(caption.things) == num_objects for caption in captions)


def test_pictures_depend_on_captions_and_seed_alone(shapes):
    captions = draw_captions(shapes["grammar"], 12, seed=2)
    first, again, other = (shapes["render"].render(captions, seed) for seed in (3, 3, 4))
    assert first.shape == (12, 3, 64, 64)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_first_thing_lies_where_the_caption_says(shapes):
    """A white thing on a night sky is the bright part of the picture: its centre is measured, not read."""
    grammar = shapes["grammar"]
    white, blue = grammar.Thing("white", "square"), grammar.Thing("blue", "circle")
    signs = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    captions = [grammar.Caption("night", white, relation, blue) for relation in signs]
    red = shapes["render"].render(captions, seed=0)[:, 0].double() / 255
    bright = (red > 0.5).double()
    bright = bright / bright.sum((1, 2), keepdim=True)
    place = torch.arange(64).double() - 31.5
    x, y = bright.sum(1) @ place, bright.sum(2) @ place
    for idx, (sign_x, sign_y) in enumerate(signs.values()):
        assert x[idx].sign() == sign_x if sign_x else abs(x[idx]) < 6
        assert y[idx].sign() == sign_y if sign_y else abs(y[idx]) < 6


def test_judge_reads_rendered_pictures(shapes):
    """The judge must be right on nearly all truth, and must not call a wrong caption obeyed."""
    captions = draw_captions(shapes["grammar"], 256, seed=5) + shapes["grammar"].held_out_set(128, 2)
    pictures = shapes["render"].render(captions, seed=6)
    judge = shapes["judge"].load()
    right = shapes["judge"].verdicts(judge, pictures, captions)
    assert {name for name, verdict in right.items() if verdict.float().mean() < 0.97} == set()
    wrong = shapes["judge"].verdicts(judge, pictures, captions[1:] + captions[:1])
    assert wrong["all"].float().mean() < 0.02


def test_judge_notices_each_single_change(shapes):
    """One word of the caption is changed: that word's verdict falls, the others' stay."""
    grammar = shapes["grammar"]
    captions = draw_captions(grammar, 64, seed=7, num_objects=1)
    pictures = shapes["render"].render(captions, seed=8)
    changes = {
        "colour": lambda thing: grammar.Thing("green" if thing.colour == "red" else "red", thing.shape, thing.striped),
        "shape": lambda thing: grammar.Thing(thing.colour, "ring" if thing.shape == "star" else "star", thing.striped),
        "striped": lambda thing: grammar.Thing(thing.colour, thing.shape, not thing.striped),
    }
    for changed, change in changes.items():
        others = [grammar.Caption(caption.background, change(caption.first)) for caption in captions]
        verdicts = shapes["judge"].verdicts(shapes["judge"].load(), pictures, others)
        assert verdicts.pop("all").float().mean() < 0.05
        assert verdicts.pop(changed).float().mean() < 0.05
        assert all(verdict.float().mean() > 0.95 for verdict in verdicts.values())


def test_metrics_know_equal_and_shifted_pictures(shapes):
    metrics = shapes["metrics"]
    rng = np.random.default_rng(0)
    exact = rng.random((3, 3, 64, 64), dtype=np.float32)
    assert (metrics.psnr(exact, exact) == metrics.PSNR_CAP_DB).all()
    assert np.allclose(metrics.ssim(exact, exact), 1)
    # A difference of 0.1 everywhere is an error of 20 dB.
    assert np.allclose(metrics.psnr(exact * 0.5 + 0.1, exact * 0.5), 20, atol=1e-3)
    features = rng.normal(size=(4000, 4))
    mean, covariance = features.mean(0), np.cov(features, rowvar=False)
    assert abs(metrics.frechet(features, mean, covariance)) < 1e-6
    assert metrics.frechet(features + 3, mean, covariance) == pytest.approx(36, abs=1e-6)


def test_quality_reads_configurations(shapes, monkeypatch):
    monkeypatch.syspath_prepend(SHAPES.parent.parent / "benchmarks")
    quality = importlib.import_module("quality")
    assert quality.parse_configuration("exact@25") == (None, 25)
    name = "num_stages=3,stride=2,warmup_steps=1,time_shift=true@50"
    options = {"predict": "none", "num_stages": 3, "stride": 2, "warmup_steps": 1, "time_shift": True}
    assert quality.parse_configuration(name) == (options, 50)
    assert quality.parse_configuration("num_patches=2,predict=linear@50")[0]["predict"] == "linear"
    assert (quality.world_size("exact@25"), quality.world_size(name)) == (1, 4)
    with pytest.raises(ValueError, match="exact@STEPS or OPTIONS@STEPS"):
        quality.parse_configuration("num_stages=2")


def test_batches_depend_on_seed_and_number_alone(shapes, pipe, monkeypatch):
    """A run that starts in the middle sees what a run from the beginning saw."""
    monkeypatch.setattr(shapes["batches"], "POOL_PICTURES", 16)
    whole = shapes["batches"].Batches(pipe, 8, seed="0 0")
    seen = [whole[batch_idx] for batch_idx in range(10)]
    resumed = shapes["batches"].Batches(pipe, 8, seed="0 0")[9]
    assert all(torch.equal(a, b) for a, b in zip(seen[9], resumed, strict=True))
    assert not torch.equal(seen[0][0], seen[9][0])


def test_an_interrupted_run_ends_with_the_same_weights(shapes, monkeypatch):
    monkeypatch.setattr(shapes["batches"], "POOL_PICTURES", 16)
    trainers = [shapes["train"].Trainer(SHAPES / "unet", batch_size=4, seed=0) for _ in range(3)]
    whole, first_part, second_part = trainers
    for _ in range(4):
        whole.step(num_steps=4)
    for _ in range(2):
        first_part.step(num_steps=4)
    second_part.load_state(first_part.state())
    for _ in range(2):
        second_part.step(num_steps=4)
    for name in ("net", "average"):
        expected, got = whole.state()[name], second_part.state()[name]
        assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_learning_rate_rises_stays_and_falls(shapes):
    train = shapes["train"]
    rates = [train.learning_rate(step_idx, 1000) for step_idx in range(1000)]
    assert rates[0] < rates[50] < rates[99] == rates[500] == train.LEARNING_RATE
    assert rates[600:] == sorted(rates[600:], reverse=True)
    assert rates[-1] < 0.02 * train.LEARNING_RATE


def test_pipeline_has_the_parts_whose_acceleration_matters(pipe):
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.unet.config.down_block_types == ["DownBlock2D", "CrossAttnDownBlock2D"]
    assert pipe.unet.config.up_block_types == ["CrossAttnUpBlock2D", "UpBlock2D"]
    names = [name for name, module in pipe.unet.named_modules() if type(module).__name__ == "BasicTransformerBlock"]
    assert {name.split(".")[0] for name in names} == {"down_blocks", "mid_block", "up_blocks"}
    assert all(part.dtype == torch.float32 for part in (pipe.unet, pipe.vae, pipe.text_encoder))


def test_committed_weights_are_small_and_half_precision(shapes):
    from safetensors import safe_open

    files = [path for path in SHAPES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    for path in (path for path in files if path.suffix == ".safetensors"):
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_pipeline_runs_as_loaded_without_options():
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(SHAPES / "unet")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a blue ring, sky background", num_inference_steps=2).images[0].size == (64, 64)


def test_pipeline_draws_what_the_caption_says(shapes, pipe):
    """Eight steps are enough for a picture that the judge reads; the same seed gives the same picture."""
    caption = shapes["grammar"].parse("a red circle, night background")
    first, again = (shapes["sampling"].draw(pipe, [caption], [0], steps=8) for _ in range(2))
    assert torch.equal(first, again)
    right = shapes["judge"].verdicts(shapes["judge"].load(), shapes["sampling"].to_bytes(first), [caption])
    assert right["colour"]
    assert right["background"]


@pytest.mark.parametrize("form", ["epsilon", "flow"])
def test_another_form_says_the_same_of_the_picture(shapes, pipe, form, monkeypatch):
    train_forms, generator = shapes["train_forms"], torch.Generator().manual_seed(0)
    monkeypatch.setattr(train_forms, "BEYOND", 0.0)
    noisy, velocity = torch.randn(2, 3, 8, 16, 16, generator=generator)
    timesteps, tokens = torch.tensor([20, 500, 980]), torch.zeros(3, 20, dtype=torch.long)
    teacher = train_forms.Teacher(pipe, form, [(noisy, timesteps, tokens, velocity)])
    latents, told, text, wanted = teacher[0]
    scheduler = train_forms.scheduler(form, pipe.scheduler)
    scheduler.set_timesteps(50)
    alpha = pipe.scheduler.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    said = pipe.unet(noisy, timesteps, text).sample
    picture, noise = alpha * noisy - sigma * said, sigma * noisy + alpha * said
    if form == "epsilon":
        assert torch.equal(told, timesteps) and torch.allclose(wanted, noise, atol=1e-5)
        assert scheduler.config.prediction_type == "epsilon"
        return
    share = (told / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(latents, (1 - share) * picture + share * noise, atol=1e-4)
    assert torch.allclose(wanted, noise - picture, atol=1e-3)
    assert scheduler.config.prediction_type == "flow_prediction" and scheduler.timesteps[0] > 990


def test_a_flow_is_taught_noisier_latents_than_its_start_has_seen(shapes, pipe):
    timesteps = torch.tensor([999, 999, 500])
    beyond = torch.tensor([0.0, 1.0, -1.0])
    alpha, sigma, told = shapes["train_forms"].levels("flow", timesteps, pipe.scheduler.alphas_cumprod, beyond)
    assert torch.allclose(alpha + sigma, torch.ones(3)) and torch.allclose(told, 1000 * sigma)
    assert 0.9 < sigma[0] < 0.95 and sigma[1] == 1 and sigma[2] < 0.9
