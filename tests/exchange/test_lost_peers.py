"""A lost peer is named, not waited for: one that dies, hangs or sleeps at any place of a run."""

import importlib
import os
import signal
import time

import pytest
import ranks
import torch
import torch.distributed as dist
from bare import Bare, loop
from torch.distributed import distributed_c10d as c10d

import asyncdiff_fast
from asyncdiff_fast.environment import EXCHANGE_VARIABLE

TIMEOUT_S = 5


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _stop():
    """Stopped as a whole, as a process in a debugger; the test kills it."""
    os.kill(os.getpid(), signal.SIGSTOP)


WAYS = {"exit": lambda: os._exit(3), "kill": _die, "stop": _stop}
PLACES = ("before patch", "warm-up", "middle", "between", "after patch")


def _lost(rank, lost, place, way):
    """What the others see when rank `lost` goes at `place`: (type, message, seconds, type and message of unpatch)."""
    model, lose = Bare(), WAYS[way] if rank == lost else lambda: None
    began, error = time.monotonic(), None
    try:
        if place == "before patch":
            lose()
        asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=TIMEOUT_S)
        if place == "after patch":
            lose()
        at = {"warm-up": 1, "middle": 3}.get(place)
        loop(model, stop=lambda step: lose() if step == at else None)
        began = time.monotonic()
        if place == "between":
            lose()
        loop(model)
    except Exception as lost_peer:
        error = lost_peer
    seconds = time.monotonic() - began
    assert error is not None, "the loss must not go unnoticed"
    left = None
    if "_asyncdiff_fast" in vars(model):
        asyncdiff_fast.unpatch(model)
        left = [n for n, m in model.named_modules() if "_diffusers_hook" in vars(m) or "forward" in vars(m)]
    loop(model)
    return type(error).__name__, str(error), seconds, left


def _survivors(world_size, lost, target, *args, timeout=TIMEOUT_S + 25):
    """Results of the ranks that are not lost; the lost one is killed at the end."""
    started = ranks.start(world_size, target, lost, *args)
    try:
        kept = [pair for rank, pair in enumerate(started) if rank != lost]
        return ranks.workers.collect(kept, timeout)
    finally:
        started[lost][0].kill()


def _assert_named(results, lost):
    for name, message, seconds, left in results:
        assert name == "ExchangeError", f"{name}: {message}"
        assert f"for rank {lost} " in message, message
        assert seconds < TIMEOUT_S + 4, f"{seconds:.1f} s: {message}"
        assert not left


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lost, way", [(1, "kill"), (0, "exit")])
def test_a_rank_dies(place, lost, way):
    _assert_named(_survivors(2, lost, _lost, place, way), lost)


# Each of these waits for the timeout.
HANGS = [(lost, place) for place in PLACES for lost in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("lost, place", HANGS)
def test_a_rank_hangs(lost, place):
    _assert_named(_survivors(2, lost, _lost, place, "stop"), lost)


def _stops_connecting(rank, lost, module, name):
    """As `_lost`; rank `lost` stops where it would connect by torch.distributed, and keeps its store waiting too."""
    os.environ[EXCHANGE_VARIABLE] = "torch"
    if rank == lost:
        setattr(importlib.import_module(module), name, lambda *_, **__: _stop())
    return _lost(rank, lost, "not here", "stop")


@pytest.mark.slow
@pytest.mark.parametrize("module, name", [(dist, "init_process_group"), (c10d, "_new_process_group_helper")])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_hangs_while_groups_connect(lost, module, name):
    _assert_named(_survivors(2, lost, _stops_connecting, module.__name__, name), lost)


def _sleeps(rank, seconds):
    """Rank 1 is late by `seconds` in an asynchronous step; then both begin anew."""
    model, messages = Bare(), []
    asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=TIMEOUT_S)
    good = loop(model)
    began = time.monotonic()
    try:
        loop(model, stop=lambda step: time.sleep(seconds) if step == 4 and rank == 1 else None)
    except asyncdiff_fast.ExchangeError as error:
        messages.append(str(error))
    waited = time.monotonic() - began
    if rank == 0:
        time.sleep(max(0, seconds + 0.5 - waited))
    asyncdiff_fast.unpatch(model)
    asyncdiff_fast.patch(model, num_stages=2, warmup_steps=2, timeout_s=TIMEOUT_S)
    again = loop(model)
    asyncdiff_fast.unpatch(model)
    return messages, waited, torch.equal(good, again)


def test_a_rank_sleeps_too_long_and_all_patch_again():
    (messages, waited, same), (_, _, theirs) = ranks.run(2, _sleeps, TIMEOUT_S + 3)
    assert len(messages) == 1 and "rank 0 waited for rank 1 " in messages[0] and waited < TIMEOUT_S + 2
    assert same and theirs


def test_a_rank_sleeps_less_than_the_timeout():
    for messages, _, same in ranks.run(2, _sleeps, 2):
        assert not messages and same
