"""Slots: long-lived buffers that travel between ranks.

A slot is posted once per asynchronous call on every rank that takes part, in one frozen order; each post is an epoch
and uses the next of `depth` buffers. `wait(slot, lag)` makes the current stream wait for the epoch `lag` posts ago.
Modules know no more of communication than this.
"""

from dataclasses import dataclass, field

import torch

from .errors import ExchangeError


@dataclass(frozen=True)
class Send:
    """Send to `peer`; `buffers` are `depth` contiguous tensors, used in turn."""

    peer: int
    buffers: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Recv:
    """Receive from `peer` into the next of `buffers`."""

    peer: int
    buffers: tuple[torch.Tensor, ...]


@dataclass
class Slot:
    """Tensors that are posted together.

    `epoch` counts the posts; `tag` is the transport's number for it; `pending[e % depth]` are the (peer, work) of one.
    """

    name: str
    sends: tuple[Send, ...]
    recvs: tuple[Recv, ...]
    depth: int
    tag: int
    phase: str = ""
    place: int = -1
    epoch: int = 0
    pending: list = field(default_factory=list)

    def __post_init__(self):
        buffers = [x.buffers for x in (*self.sends, *self.recvs)]
        if any(len(turns) != self.depth or not all(b.is_contiguous() for b in turns) for turns in buffers):
            raise ValueError(f"slot {self.name!r} needs {self.depth} contiguous buffers for each send and receive")

    @property
    def nbytes(self):
        """Bytes that this rank sends with one post."""
        return sum(s.buffers[0].nbytes for s in self.sends)

    def describe(self, rank, ranks):
        """[(peer, direction, name, bytes)] as the other side must list it too."""
        lines = [(s.peer, (rank, s.peer), self.name, s.buffers[0].nbytes) for s in self.sends]
        lines += [(r.peer, (r.peer, rank), self.name, r.buffers[0].nbytes) for r in self.recvs]
        return sorted(lines, key=lambda line: line[1])


def compare(world, slots, told, phase):
    """Compare the order of a phase's slots with every peer; returns what each rank has `told`. Collective.

    Raises: ExchangeError if two ranks list different slots, orders or sizes for each other.
    """
    listed = [line for slot in slots for line in slot.describe(world.rank, world.ranks)]
    everyone = world.gather((told, listed), f"the slots of {phase}")
    for peer, (_, theirs) in enumerate(everyone):
        mine = [line[1:] for line in listed if line[0] == peer]
        theirs = [line[1:] for line in theirs if line[0] == world.rank]
        if mine != theirs:
            place = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), -1)
            first = (
                f"first at place {place}: {mine[place]} here, {theirs[place]} there" if place >= 0 else "one has more"
            )
            raise ExchangeError(
                f"rank {world.name} and rank {world.ranks[peer]} list different slots for each other in {phase}: "
                f"{len(mine)} here, {len(theirs)} there, {first}; ranks must patch the same model with the same options"
            )
    return [told for told, _ in everyone]
