"""Displaced patches, generation after generation: each is what a fresh patch gives, whatever came before it."""

import gc
import weakref

import pytest
import ranks
import tiny_denoisers
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig

import asyncdiff_fast

TIMES = (900, 700, 500, 300)


def _text(seed, n, width=32):
    return torch.randn(n, 5, width, generator=torch.Generator().manual_seed(seed))


def _unet(model, x, t, text):
    return model(x, t, encoder_hidden_states=text).sample


def _pixart(model, x, t, text):
    conditions = {"resolution": None, "aspect_ratio": None}
    timestep = torch.full((len(x),), t)
    return model(x, text, timestep=timestep, added_cond_kwargs=conditions).sample.chunk(2, 1)[0]


MODELS = {
    "unet": (tiny_denoisers.sd15_unet, _unet),
    "pixart": (tiny_denoisers.pixart_transformer, _pixart),
}


@torch.no_grad()
def generate(name, model, seed=0, prompt=0, size=(16, 8), batch=1, times=TIMES, stop_at=None):
    """The latent after a few steps; `stop_at` ends them at a step, in the way of a user's interruption."""
    x = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed))
    for step, t in enumerate(times):
        if step == stop_at:
            return None
        x = x - 0.2 * MODELS[name][1](model, x, t, _text(prompt, batch))
    return x


RUNS = [
    {},
    dict(prompt=1),
    dict(size=(24, 10)),
    dict(batch=3, prompt=2),
    dict(stop_at=2, seed=1),
    dict(size=(24, 10), prompt=3),
    dict(times=TIMES[1:], seed=2),
    {},
]


def _in_a_row(rank, name, options):
    """[(latent of a run among others, of the same by a fresh patch, unpatched)]"""
    model = MODELS[name][0]()
    fresh = []
    for run in RUNS[:-1]:
        asyncdiff_fast.patch(model, timeout_s=60, **options)
        fresh.append(generate(name, model, **run))
        asyncdiff_fast.unpatch(model)
    fresh.append(fresh[0])
    asyncdiff_fast.patch(model, timeout_s=60, **options)
    among = [generate(name, model, **run) for run in RUNS]
    asyncdiff_fast.unpatch(model)
    return [(a, b, generate(name, model, **run)) for a, b, run in zip(among, fresh, RUNS, strict=True) if a is not None]


@pytest.mark.parametrize(
    "name, num_patches, options",
    [
        ("unet", 2, {}),
        pytest.param("pixart", 2, {}, marks=pytest.mark.exhaustive),
        pytest.param("unet", 3, dict(group_norm="stale"), marks=pytest.mark.exhaustive),
        pytest.param("pixart", 3, {}, marks=pytest.mark.exhaustive),
        pytest.param("unet", 2, dict(exchange="none"), marks=pytest.mark.exhaustive),
        pytest.param("unet", 2, dict(exchange="none", warmup_steps=0), marks=pytest.mark.exhaustive),
    ],
)
def test_each_generation_is_that_of_a_fresh_patch(name, num_patches, options):
    options = dict(num_patches=num_patches, warmup_steps=1) | options
    results = ranks.run(num_patches, _in_a_row, name, options, timeout=250)
    for number, (among, fresh, plain) in enumerate(results[0]):
        assert torch.equal(among, fresh), f"run {number}"
        assert all(torch.equal(rank[number][0], among) for rank in results), f"run {number}"
        error = float((among - plain).abs().max() / plain.abs().max())
        assert 1e-5 < error < 0.5, f"run {number}: {error:.1e} from the unpatched result"


# What changes in the model between generations.


def _adapter(model):
    torch.manual_seed(7)
    targets = ["to_q", "to_v", "conv_in", "conv2"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False), "style")


CHANGES = {
    "adapter": _adapter,
    "adapter off": lambda model: model.disable_adapters(),
    "adapter on": lambda model: model.enable_adapters(),
    "adapter gone": lambda model: model.delete_adapters("style"),
    "fused projections": lambda model: model.fuse_qkv_projections(),
    "weights": lambda model: model.conv_out.weight.data.mul_(1.5),
}


def _changed(rank):
    """{change: (without it, with it, with it by a fresh patch, unpatched with it)}"""
    model, other, found = tiny_denoisers.sd15_unet(), tiny_denoisers.sd15_unet(), {}
    asyncdiff_fast.patch(model, num_patches=2, warmup_steps=1, timeout_s=60)
    before = generate("unet", model)
    for name, change in CHANGES.items():
        change(model)
        change(other)
        plain = generate("unet", other)
        asyncdiff_fast.patch(other, num_patches=2, warmup_steps=1, timeout_s=60)
        fresh = generate("unet", other)
        asyncdiff_fast.unpatch(other)
        now = generate("unet", model)
        found[name] = before, now, fresh, plain
        before = now
    asyncdiff_fast.unpatch(model)
    return found


def test_a_changed_model_is_looked_at_again():
    for found in ranks.run(2, _changed, timeout=200):
        for name, (before, now, fresh, plain) in found.items():
            assert torch.equal(now, fresh), name
            assert not torch.equal(now, before) or name == "fused projections", name
            assert (now - plain).abs().max() < 0.3 * plain.abs().max(), name


REFUSED_LATER = {
    "processor": (lambda model: model.set_attn_processor(AttnProcessor()), "calls scaled_dot_product_attention"),
    "freeu": (lambda model: model.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2), "cannot be shared out as patches"),
}


def _refused_later(rank):
    """{change: (type, message, the result afterwards as unpatched)} of changes that patches cannot follow."""
    found = {}
    for name, (change, _) in REFUSED_LATER.items():
        model, other = tiny_denoisers.sd15_unet(), tiny_denoisers.sd15_unet()
        asyncdiff_fast.patch(model, num_patches=2, warmup_steps=1, timeout_s=60)
        generate("unet", model)
        change(model)
        change(other)
        with pytest.raises(Exception) as error:
            generate("unet", model)
        left = "_asyncdiff_fast" in vars(model)
        found[name] = (
            error.typename,
            str(error.value),
            left,
            torch.equal(generate("unet", model), generate("unet", other)),
        )
    asyncdiff_fast.patch(tiny_denoisers.sd15_unet(), num_patches=2, timeout_s=60)
    return found


def test_changes_that_patches_cannot_follow_are_refused():
    for found in ranks.run(2, _refused_later, timeout=200):
        for name, (kind, message, left, same) in found.items():
            assert kind == "ValueError" and REFUSED_LATER[name][1] in message, message
            assert not left and same, name


# What is left.


def _tensors():
    gc.collect()
    return {id(x): x for x in gc.get_objects() if isinstance(x, torch.Tensor)}


def _memory(rank, name):
    """(tensors that came with patches, bytes planned, those that outlive `unpatch`, unpatched result as before)"""
    model = MODELS[name][0]()
    plain = generate(name, model)
    before = {key: set(vars(m)) for key, m in model.named_modules()}
    known = _tensors()
    runtime = asyncdiff_fast.patch(model, num_patches=2, warmup_steps=1, timeout_s=60)
    generate(name, model)
    generate(name, model, size=(24, 10))
    planned = runtime.plan.memory_bytes(rank)
    new = [weakref.ref(x) for key, x in _tensors().items() if key not in known]
    held = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (r() for r in new)}.values())
    asyncdiff_fast.unpatch(model)
    del runtime
    gc.collect()
    outlive = [tuple(x.shape) for x in (ref() for ref in new) if x is not None]
    left = [key for key, m in model.named_modules() if set(vars(m)) != before[key]]
    return len(new), planned, held, outlive, left, torch.equal(generate(name, model), plain)


@pytest.mark.parametrize("name", ["unet", pytest.param("pixart", marks=pytest.mark.exhaustive)])
def test_unpatch_restores_and_releases(name):
    for count, planned, held, outlive, left, same in ranks.run(2, _memory, name):
        assert count > 10 and held >= planned > 0
        assert not outlive, f"these tensors outlive unpatch: {outlive}"
        assert not left and same
