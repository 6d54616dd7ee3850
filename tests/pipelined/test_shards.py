"""Divided weights between other things: sizes, adapters, gradients, ranks that are gone."""

import functools
import os
import pickle

import pytest
import ranks
import tiny_denoisers
import torch
from peft import LoraConfig, inject_adapter_in_model
from workers import collect

import asyncdiff_fast

CLOSE = 2e-5
OPTIONS = dict(num_stages=2, shard_weights=True, timeout_s=30)


@torch.no_grad()
def _call(model, height=16, batch=2, times=(900, 700)):
    generator = torch.Generator().manual_seed(height)
    x, text = torch.randn(batch, 4, height, 8, generator=generator), torch.randn(batch, 5, 32, generator=generator)
    conditions = {"resolution": None, "aspect_ratio": None}
    for t in times:
        out = model(x, text, timestep=torch.full((batch,), t), added_cond_kwargs=conditions).sample.chunk(2, 1)[0]
        x = x - 0.3 * out
    return x


def _adapted(model):
    """An adapter that changes something, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), model)


def _error(a, b):
    return float((a - b).abs().max() / b.abs().max())


def _sizes(rank):
    model = tiny_denoisers.pixart_transformer()
    plain = [_call(model, h, b) for h, b in ((16, 2), (24, 1), (16, 2))]
    asyncdiff_fast.patch(model, pipeline_patches=2, warmup_steps=9, **OPTIONS)
    found = [_call(model, h, b) for h, b in ((16, 2), (24, 1), (16, 2))]
    asyncdiff_fast.unpatch(model)
    return max(map(_error, found, plain))


def _adapters(rank):
    model = tiny_denoisers.pixart_transformer()
    runtime = asyncdiff_fast.patch(model, pipeline_patches=1, warmup_steps=1, **OPTIONS)
    before = _call(model)
    held = sum(p.untyped_storage().nbytes() for p in model.parameters())
    _adapted(model)
    after = _call(model)
    more = sum(p.untyped_storage().nbytes() for p in model.parameters()) - held
    planned = runtime.plan.held_bytes(rank) - held
    asyncdiff_fast.unpatch(model)
    other = tiny_denoisers.pixart_transformer()
    plain = _call(other)
    _adapted(other)
    return _error(before, plain), _error(after, _call(other)), _error(_call(model), _call(other)), more, planned


def _gradients(rank):
    model = tiny_denoisers.pixart_transformer().requires_grad_(True)
    asyncdiff_fast.patch(model, pipeline_patches=1, warmup_steps=1, **OPTIONS)
    _call(model)
    with torch.enable_grad():
        try:
            _call.__wrapped__(model)
        except ValueError as error:
            message = str(error)
    asyncdiff_fast.unpatch(model)
    return message


def _all(rank):
    return dict(sizes=_sizes(rank), adapters=_adapters(rank), gradients=_gradients(rank))


@functools.cache
def results():
    return collect(ranks.start(2, _all), 200)


def test_sizes_after_the_division():
    for rank in results():
        assert rank["sizes"] <= CLOSE


def test_adapters_go_with_their_modules():
    for rank in results():
        before, after, unpatched, more, planned = rank["adapters"]
        assert max(before, after, unpatched) <= CLOSE
        assert more <= planned + 4096


def test_gradients_need_all_weights():
    for rank in results():
        assert "gradients need all weights" in rank["gradients"]


def _left_alone(rank):
    """Rank 1 goes in the middle of a call; what rank 0 is told."""
    model = tiny_denoisers.pixart_transformer()
    asyncdiff_fast.patch(model, pipeline_patches=4, warmup_steps=1, **OPTIONS)
    _call(model)
    calls = []

    def count(module, args):
        calls.append(None)
        if len(calls) > 5:
            os._exit(0)

    if rank == 1:
        model.transformer_blocks[-1].register_forward_pre_hook(count)
    try:
        _call(model, times=(900, 700, 500))
    except asyncdiff_fast.ExchangeError as error:
        return str(error)


def test_a_rank_that_is_gone_is_named_with_the_micro_step():
    started = ranks.start(2, _left_alone)
    pipe = started[0][1]
    assert pipe.poll(100)
    error, message = pickle.loads(pipe.recv_bytes())
    for process, _ in started:
        process.kill()
    assert error is None and "rank 1" in message and "micro-step" in message, (error, message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.complex64])
def test_a_stand_in_takes_one_number(dtype):
    from asyncdiff_fast.pipelined.shards import stand_in

    found = stand_in((3, 4), dtype, "cpu")
    assert found.shape == (3, 4) and found.dtype == dtype and found.untyped_storage().nbytes() == dtype.itemsize
