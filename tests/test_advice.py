"""Where several ranks run and nobody is spared anything, the user hears why; options that do not fit say what does."""

import contextlib
import logging

import pytest
import ranks
import torch
from bare import DOWN, Bare, loop, noise
from refusals import attempt

import asyncdiff_fast

QUIET = "quiet"
CASES = {
    "stages": (dict(num_stages=2), "all were warm-up, with warmup_steps=4: pass a smaller one"),
    "more than there are": (dict(num_stages=2, warmup_steps=9), "in 4 steps of Bare; all were warm-up"),
    "enough": (dict(num_stages=2, warmup_steps=1), QUIET),
    "patches": (dict(num_patches=2), QUIET),
    "option of patches": (
        dict(num_stages=2, warmup_steps=1, bessel=True),
        "bessel=True changes nothing here: it is of ",
    ),
}


class Failing(Bare):
    """Raises at the third step."""

    def forward(self, x, t):
        if t == DOWN[2]:
            raise ArithmeticError("at the third step")
        return super().forward(x, t)


def _warnings(rank):
    lines, found = [], {}
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("asyncdiff_fast").addHandler(handler)
    for name, (options, _) in CASES.items():
        model = Bare()
        runtime = asyncdiff_fast.patch(model, timeout_s=60, **options)
        for _ in range(2):
            loop(model, DOWN[:4])
        # The end of the second is the beginning of this one.
        loop(model)
        asyncdiff_fast.unpatch(model)
        found[name] = lines.copy()
        found[f"{name}, shown"] = repr(runtime)
        lines.clear()
    model = Failing()
    asyncdiff_fast.patch(model, num_stages=2, timeout_s=60)
    for _ in range(2):
        # The next begins where this one is over.
        with contextlib.suppress(ArithmeticError):
            loop(model)
    asyncdiff_fast.unpatch(model)
    found["failed"] = lines.copy()
    lines.clear()
    model = Bare()
    asyncdiff_fast.patch(model, num_stages=2, timeout_s=60)
    for t in DOWN:
        model(noise(), t)
    asyncdiff_fast.unpatch(model)
    found["gradients"] = lines.copy()
    found["errors"] = [attempt(model, **options)[1] for options in ({}, dict(num_stages=2, parallel_steps=2))]
    return found


@pytest.fixture(scope="module")
def found():
    return ranks.run(2, _warnings)


@pytest.mark.parametrize("name", CASES)
def test_the_first_rank_says_once_that_nothing_was_gained(found, name):
    words = CASES[name][1]
    first, other = (rank[name] for rank in found)
    assert not other and len(first) == (words is not QUIET)
    assert all(words in line for line in first)


def test_a_runtime_shows_how_calls_are_shared(found):
    assert found[1]["patches, shown"] == "<Runtime of Bare: rank 1 of 2, num_patches=2>"


def test_a_generation_that_fails_says_nothing_of_it(found):
    assert not found[0]["failed"] and not found[1]["failed"]


def test_gradients_are_named(found):
    (line,), other = (rank["gradients"] for rank in found)
    assert "torch.no_grad()" in line and not other


def test_a_wrong_number_of_ranks_says_what_fits(found):
    for rank in found:
        none, two = rank["errors"]
        assert "pass parallel_steps=2, or cfg_parallel=True" in none
        assert "start 4 processes" in two and "or pass parallel_steps=1" in two


@torch.no_grad()
def test_one_process_leaves_out_what_shares():
    assert "or leave out parallel_steps, num_patches" in attempt(Bare(), parallel_steps=2, num_patches=2)[1]
