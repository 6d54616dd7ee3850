"""What a patch computes, allocates and sends at a displaced step; what plans of real sizes say about it."""

import functools
import math
import sys
import time
from pathlib import Path

import pytest
import ranks
import tiny_denoisers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import asyncdiff_fast

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import real_models

# Rows and columns for which no patch has as many tokens as a whole picture of a coarser resolution.
HEIGHT, WIDTH = 48, 21


@functools.cache
def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _unet(model, t):
    return model(_random(1, 4, HEIGHT, WIDTH), t, encoder_hidden_states=_random(1, 5, 32)).sample


def _pixart(model, t):
    conditions, text = {"resolution": None, "aspect_ratio": None}, _random(1, 5, 32)
    x, timestep = _random(1, 4, HEIGHT, WIDTH - 1), torch.full((1,), t)
    return model(x, text, timestep=timestep, added_cond_kwargs=conditions).sample


@functools.cache
def _places(rows, columns):
    ids = torch.zeros(rows * columns, 3)
    ids[:, 1], ids[:, 2] = torch.arange(len(ids)) // columns, torch.arange(len(ids)) % columns
    return ids


def _flux(model, t):
    ids = _places(HEIGHT // 2, 11)
    numbers = dict(timestep=torch.full((1,), t / 1000), guidance=torch.ones(1), pooled_projections=_random(1, 32))
    text = dict(encoder_hidden_states=_random(1, 5, 32), txt_ids=torch.zeros(5, 3))
    return model(_random(1, len(ids), 16), img_ids=ids, **numbers, **text).sample


# How a denoiser is made and called, and its whole pictures: {(rows, columns)}
MODELS = {
    "unet": (tiny_denoisers.sd15_unet, _unet, [(48, 21), (24, 11), (12, 6)]),
    "pixart": (tiny_denoisers.pixart_transformer, _pixart, [(48, 20), (24, 10)]),
    "flux": (tiny_denoisers.flux_transformer, _flux, [(24, 11)]),
}


class Allocated(TorchDispatchMode):
    """Shapes of the tensors that are made in new memory."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self.shapes += [
            tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor) and _memory(x) not in given
        ]
        return result


def _memory(x):
    return x.untyped_storage().data_ptr()


def _buffers(patch):
    """What the sites of a patch send, receive and read."""
    for state in patch._order:
        for x in (*state.sends(), *state.recvs()):
            yield x[1]
        for part in state.received:
            yield from part.buffers


def _counter():
    """Counts attention on the CPU too, which torch's own counter leaves out."""

    def attention(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    )


@torch.no_grad()
def _displaced(rank, name, num_patches):
    """Of one call: share of the unpatched FLOPs; shapes allocated; shape of the result; bytes sent by stats, by posts
    and by plan; of buffers, bytes and those planned; the plan.
    """
    make, call, _ = MODELS[name]
    model = make()
    with _counter() as whole:
        call(model, 900)
    runtime = asyncdiff_fast.patch(model, num_patches=num_patches, warmup_steps=1, timeout_s=60, predict="none")
    for t in (900, 800, 700):
        call(model, t)
    with _counter() as mine:
        call(model, 600)
    with Allocated() as allocated:
        result = call(model, 500)
    posted, exchange = [], runtime._parts.patches.exchange
    post = exchange.post

    def counted(slot):
        posted.append(slot.nbytes)
        post(slot)

    exchange.post = counted
    runtime.clear_stats()
    call(model, 400)
    sent_bytes, plan = runtime.stats()["sent_bytes"], runtime.plan
    (patch,) = runtime._parts.patches._patches.values()
    buffers = {_memory(x): x.untyped_storage().nbytes() for x in _buffers(patch)}
    held = sum(buffers.values()) + runtime._layers.projections.nbytes
    start, stop = plan.rows.held[rank]
    of_result = result.nbytes * (stop - start) // plan.rows.size * (num_patches - 1)
    planned = plan.sent_bytes(rank) + of_result
    asyncdiff_fast.unpatch(model)
    share = mine.get_total_flops() / whole.get_total_flops()
    memory_bytes = held, plan.memory_bytes(rank)
    return share, allocated.shapes, tuple(result.shape), sent_bytes, sum(posted), planned, memory_bytes, str(plan)


CASES = [("unet", 2), ("unet", 4), ("pixart", 2), ("pixart", 4), ("flux", 2)]
cases = pytest.mark.parametrize(
    "name, num_patches", [pytest.param(*c, marks=[pytest.mark.exhaustive] * (c[1] > 2)) for c in CASES]
)


@functools.cache
def displaced(name, num_patches):
    return ranks.run(num_patches, _displaced, name, num_patches)


@cases
def test_a_patch_computes_its_share(name, num_patches):
    """The rest is what every rank does alike: timestep, text."""
    for rank, (share, *_) in enumerate(displaced(name, num_patches)):
        assert 0.5 / num_patches < share <= 1.05 / num_patches, f"rank {rank} computes {share:.3f} of all"


@cases
def test_nothing_of_the_whole_picture_is_allocated(name, num_patches):
    _, _, pictures = MODELS[name]
    tokens = {height * width for height, width in pictures}
    for rank, (_, shapes, result, *_) in enumerate(displaced(name, num_patches)):
        whole = [s for s in shapes if s[-2:] in pictures or tokens & set(s) or tokens & {n - 5 for n in s}]
        assert set(whole) <= {result}, f"rank {rank} allocates {set(whole)}"
        assert whole == [result], "the result is made once"


@cases
def test_the_plan_says_what_is_sent(name, num_patches):
    for sent_bytes, posted, planned in (rank[3:6] for rank in displaced(name, num_patches)):
        assert sent_bytes == posted == planned > 0


@cases
def test_the_plan_says_what_is_kept(name, num_patches):
    for held, planned in (rank[6] for rank in displaced(name, num_patches)):
        # Whole storages: of a ring, also the keys and values of the text.
        assert held == pytest.approx(planned, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_needs_no_ranks(name):
    make, call, _ = MODELS[name]
    model, found = make(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        plain = call(model, 900)
        args, kwargs = found[0]
        names = (
            "hidden_states" if name != "unet" else "sample",
            "timestep" if name == "unet" else "encoder_hidden_states",
        )
        plan = asyncdiff_fast.plan(model, dict(zip(names, args, strict=False)) | kwargs, num_patches=2, predict="none")
        assert str(plan) == displaced(name, 2)[0][7]
        assert torch.equal(call(model, 900), plain)


# SDXL at real sizes, on the meta device: pixels: MB of keys and values, and of an inner patch's halos, in fp16 for one
# sample and step.
SDXL = {1024: (419.4, 8.2), 2048: (1677.7, 16.4), 3840: (5898.2, 30.7)}


@functools.cache
def sdxl_plan(pixels, num_patches):
    denoiser = real_models.build("sdxl")
    inputs = real_models.inputs("sdxl", denoiser, height=pixels, width=pixels)
    began = time.monotonic()
    plan = asyncdiff_fast.plan(denoiser, inputs, num_patches=num_patches, predict="none")
    assert time.monotonic() - began < 120
    return plan


@pytest.mark.parametrize(
    "pixels, num_patches",
    [
        pytest.param(p, n, marks=[pytest.mark.exhaustive] * ((p, n) != (1024, 2) and (p, n) != (2048, 4)))
        for p in SDXL
        for n in (2, 4, 8)
    ],
)
def test_sdxl(pixels, num_patches):
    plan = sdxl_plan(pixels, num_patches)
    keys_mb, halo_mb = SDXL[pixels]
    for patch in range(num_patches):
        # The plan is of a batch of two.
        keys = plan.sent_bytes(patch, "attention") / 2e6
        assert keys == pytest.approx(keys_mb * (num_patches - 1) / num_patches, rel=0.02)
        # The figures are of a row from each side; a stride-2 convolution reads none from below, so none is sent up.
        edge = patch in (0, num_patches - 1)
        halved = [s for s in plan.sites if s.kind == "convolution" and s.after.size * 2 == s.before.size]
        assert len(halved) == 2 and all(set(s.sent(patch)) == {patch + 1} - {num_patches} for s in halved)
        unread = sum(math.prod(s.rows_shape(patch, 1)) * s.item for s in halved) if patch else 0
        halos = (plan.sent_bytes(patch, "convolution") + unread) / 2e6
        assert halos == pytest.approx(halo_mb / 2 if edge else halo_mb, rel=0.01)
    lines = str(plan).splitlines()
    for patch, line in enumerate(lines[2 : 2 + num_patches]):
        assert line.split()[1] == "-".join(map(str, plan.rows.held[patch]))
        assert line.endswith(f"{plan.memory_bytes(patch) / 1e6:.1f} MB")


@pytest.mark.parametrize("num_patches", [2, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_what_is_posted_together_fits_a_slot_and_is_worth_a_post(num_patches):
    """By the bytes for one other patch: with more patches they are fewer, and so are the posts."""
    plan = sdxl_plan(1024, num_patches)
    groups = plan.groups(range(len(plan.sites)))
    assert [i for group in groups for i in group] == [i for i in range(len(plan.sites)) if plan.displaced(i)]
    assert 60 < len(groups) < 90 if num_patches == 2 else len(groups) < 60
    for group in groups:
        assert sum(plan.sites[i].messages_of_one for i in group) <= 256 and len(group) <= 32
        assert sum(plan.sites[i].message_bytes for i in group[:-1]) < 2 << 20


def test_halos_go_to_neighbours_only():
    plan = sdxl_plan(2048, 4)
    for site in plan.sites:
        for patch in range(4):
            targets = set(site.sent(patch))
            if site.kind == "convolution":
                assert targets <= {patch - 1, patch + 1}
            elif site.exchanges:
                assert targets == set(range(4)) - {patch}


def test_memory_is_that_of_the_buffers():
    """Keys and values of all patches and of the text, statistics of all, halos sent and received."""
    plan = sdxl_plan(1024, 2)
    keys = sum(
        2 * 2 * math.prod(s.key[1:]) * s.tokens.rows.size * s.tokens.inner * 2
        for s in plan.sites
        if s.kind == "attention" and s.exchanges
    )
    assert keys / 2e6 == pytest.approx(SDXL[1024][0], rel=1e-3)
    for patch in range(2):
        halos = 2 * plan.sent_bytes(patch, "convolution")
        norms = 2 * plan.sent_bytes(patch, "norm")
        assert plan.memory_bytes(patch) == pytest.approx(keys + halos + norms + plan.kept_bytes, rel=0.01)
    # Two prompts of 77 tokens, in fp16, in 10 layers of 640 features and 60 of 1280.
    assert plan.kept_bytes == 2 * 77 * 2 * (10 * 640 + 60 * 1280) * 2
