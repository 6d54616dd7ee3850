"""Which arguments a half of the batch gets is decided by what the forward shows; ranks are threads."""

from types import SimpleNamespace

import batch_nets
import pytest
import torch
import virtual
from torch.utils._pytree import tree_leaves

from asyncdiff_fast.calls.clock import Tick
from asyncdiff_fast.calls.signature import CallSignature
from asyncdiff_fast.halves.calls import Halves
from asyncdiff_fast.halves.joins import difference
from asyncdiff_fast.halves.trees import fresh


class Rank:
    """One rank's half of a network's batch."""

    def __init__(self, world, kind):
        self.net = kind()
        shared = SimpleNamespace(denoiser=self.net, signature=CallSignature(self.net))
        self.halves = Halves(shared, world, virtual.VirtualExchange(world))

    def __call__(self, step, **named):
        def run(tick, args, kwargs):
            return self.net(*args, **kwargs)

        with torch.no_grad():
            return self.halves.call(Tick(step == 0, step, 0), "key", self.net.forward, run, (), named)


def _both(kind, *calls):
    """What both ranks say of several calls."""

    def target(world):
        rank = Rank(world, kind)
        return [rank(step, **fresh(named)) for step, named in enumerate(calls)]

    return virtual.run(2, target)


SHARED = [getattr(batch_nets, n) for n in ("Table", "Layers", "Weights", "Nested", "Lists", "Popped", "Frames")]


@pytest.mark.parametrize("kind", SHARED)
def test_halves_are_what_the_batch_gives(kind):
    named = batch_nets.inputs(kind)
    with torch.no_grad():
        right = kind()(**fresh(named))
    for results in _both(kind, named, named):
        # Other kernels for other sizes: rounding alone.
        assert all(difference(result, right) < 1e-5 for result in results)
        assert len(tree_leaves(results[0])) == len(tree_leaves(right))


@pytest.mark.parametrize("kind", [batch_nets.FramesFirst, batch_nets.Mean])
def test_what_cannot_be_halved_is_refused(kind):
    with pytest.raises(ValueError, match=r"on half of its batch.*cut.*cfg_parallel=False; parallel_steps=2"):
        _both(kind, batch_nets.inputs(kind))


def test_what_is_written_into_is_refused():
    with pytest.raises(ValueError, match=r"Writes writes into its arguments \(x\)"):
        _both(batch_nets.Writes, batch_nets.inputs(batch_nets.Writes))


def test_what_a_processor_keeps_is_refused():
    with pytest.raises(ValueError, match=r"processor of Keeps keeps something.*parallel_steps=2"):
        _both(batch_nets.Keeps, batch_nets.inputs(batch_nets.Keeps))


def test_what_was_zero_at_first_is_looked_at_again():
    """As of a control network that begins later: zeros say nothing of whose rows they are."""
    named = batch_nets.inputs(batch_nets.FramesFirst)
    silent = named | dict(hints=torch.zeros(4, 4, 1, 1))
    _both(batch_nets.FramesFirst, silent, silent)
    with pytest.raises(ValueError, match="on half of its batch"):
        _both(batch_nets.FramesFirst, silent, named)
