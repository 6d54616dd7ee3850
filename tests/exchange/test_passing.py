"""What ranks tell in passing: the same is no matter, the other is found by who looks later, and nobody waits."""

import time

import pytest
import torch.distributed as dist

from asyncdiff_fast.exchange.passing import MOST, Passing


def _pair():
    store = dist.HashStore()
    return [Passing(store, rank, (0, 1), 3) for rank in (0, 1)], store


def _eventually(passing):
    """What it finds within a second."""
    ends = time.monotonic() + 1
    while time.monotonic() < ends:
        found = passing.look()
        if found is not None:
            return found
        time.sleep(0.01)
    return None


def test_the_same_values_are_no_matter():
    both, _ = _pair()
    for passing in both:
        passing.tell(1, [5, 6])
        passing.tell(2, [7, 8])
    for passing in (*both, *both):
        assert _eventually(passing) is None


@pytest.mark.parametrize("first", [0, 1])
def test_another_value_is_found_by_both(first):
    both, _ = _pair()
    both[first].tell(4, [1])
    assert both[first].look() is None
    both[1 - first].tell(4, [2])
    assert _eventually(both[1 - first]) == (4, first)
    assert _eventually(both[first]) == (4, 1 - first)


def test_what_only_one_tells_is_no_matter_and_not_kept_for_ever():
    (one, _), store = _pair()
    for number in range(3 * MOST):
        one.tell(number, number)
        one.look()
    assert _eventually(one) is None
    assert not store.check(["passing/3/0/0"]) and store.check([f"passing/3/{3 * MOST - 1}/0"])
    one.forget()
    time.sleep(0.2)
    assert not store.check([f"passing/3/{3 * MOST - 1}/0"])
