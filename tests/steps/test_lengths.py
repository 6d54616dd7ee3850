"""How long blocks are, and what outputs are expected: pure."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncdiff_fast.steps.lengths import Lengths, growth
from asyncdiff_fast.steps.loop import num_steps
from asyncdiff_fast.steps.outputs import DAMPING, Evaluated, Outputs, share


@given(st.integers(1, 9), st.integers(1, 5), st.floats(1e-4, 1.0), st.lists(st.floats(0, 2), max_size=8))
def test_a_block_is_as_long_as_its_errors_will_bear(most, warmup_steps, tolerance, errors):
    lengths = Lengths(most, warmup_steps, tolerance)
    assert [lengths.at(step, 50 - step) for step in range(8)] == [1] * 8, "nothing is known of errors yet"
    if errors:
        lengths.learn(errors[-1], len(errors))
    for step, left in itertools.product(range(8), range(1, 12)):
        length = lengths.at(step, left)
        assert 1 <= length <= max(1, min(most, left))
        if step < warmup_steps or not errors:
            assert length == 1
        else:
            one = errors[-1] / growth(len(errors))
            assert length == 1 or one * growth(length - 1) <= tolerance
            assert length == min(most, left) or one * growth(length) > tolerance


def test_errors_gather():
    assert [growth(n) for n in (1, 2, 3, 4)] == [1, 3, 6, 10]


def test_no_tolerance_bounds_a_block():
    lengths = Lengths(8, 1, 1e8)
    lengths.learn(0.5, 1)
    assert lengths.at(1, 40) == 8 and lengths.at(38, 2) == 2 and lengths.at(40, 0) == 1


# Outputs.


def plain(output):
    """An output of a sampler that is not known."""
    return Evaluated(output, torch.zeros_like(output), None)


def outputs(*values):
    found = Outputs()
    for value in values:
        found.add(plain(torch.as_tensor(value, dtype=torch.float32).view(-1, 1)))
    return found


def ahead(known, number):
    return known.ahead(number, plain(known._newest[-1]))


def test_the_newest_is_expected_where_nothing_tells_of_changes():
    for known in (outputs([1.0]), outputs([1.0], [2.0]), outputs([1.0], [3.0], [2.0])):
        assert ahead(known, 1).item() == ahead(known, 3).item() == known._newest[-1].item()


def test_changes_die_away_by_the_share_that_came_again():
    expected = outputs([0.0], [4.0], [6.0], [7.0])
    assert share(expected._newest).item() == pytest.approx(0.5)
    damped = 0.5 * DAMPING
    assert ahead(expected, 1).item() == pytest.approx(7 + damped)
    assert ahead(expected, 3).item() == pytest.approx(7 + damped + damped**2 + damped**3)


def test_each_picture_has_a_share_of_its_own():
    both = outputs([0.0, 0.0], [4.0, 1.0], [6.0, 2.0], [7.0, 3.0])
    alone = outputs([0.0], [4.0], [6.0], [7.0])
    assert ahead(both, 2)[0].item() == ahead(alone, 2).item() and ahead(both, 2)[1].item() > 3


def test_another_shape_begins_anew():
    known = outputs([0.0], [1.0], [2.0])
    known.add(plain(torch.zeros(2, 3)))
    assert ahead(known, 2).shape == (2, 3)


# The end of the loop.


class Listed:
    begin_index = None

    def __init__(self, *timesteps):
        self.timesteps = torch.tensor(timesteps)


@pytest.mark.parametrize(
    "scheduler, timestep, told, expected",
    [
        (Listed(900, 600, 300), torch.tensor(900), None, 3),
        (Listed(900, 600, 300), 600, None, 2),
        (Listed(900, 600, 300), torch.tensor([600.0, 600.0]), 1, 1),
        (Listed(900, 600, 300), torch.tensor(900), 9, 3),
        (Listed(900, 600, 300), torch.tensor(5), None, None),
        (Listed(900, 600, 300), torch.tensor(5), 7, 7),
        (object(), 900, None, None),
        (object(), None, 4, 4),
    ],
)
def test_length_of_a_loop(scheduler, timestep, told, expected):
    assert num_steps(scheduler, timestep, told) == expected
