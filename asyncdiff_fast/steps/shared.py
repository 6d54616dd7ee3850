"""Tensors of one block's steps on all ranks: each from the rank that evaluated it, or all from the first."""

import torch

from ..exchange.slots import Recv, Send

# Slots that are kept: two for a shape of outputs, and the errors'.
KEPT_SLOTS = 9


class SharedOutputs:
    """Exchanges one tensor of each rank, or the first one's. Every shape has slots of its own, made when first met."""

    def __init__(self, world, exchange):
        self._world, self._exchange = world, exchange
        self._slots, self._phases = {}, 0

    def all(self, mine):
        """[every rank's tensor, in order of ranks], in memory of their own. Collective.

        Args:
            mine: this rank's; where it has evaluated nothing, any of the others' shape and dtype.
        """
        return self._copies(mine, self._exchanged(mine, None, range(self._world.size))[0])

    def numbered(self, mine, number):
        """(what `all` gives, a tensor of the whole number that each rank has sent with its own). Collective."""
        buffers, numbers = self._exchanged(mine, number, range(self._world.size))
        return self._copies(mine, buffers), torch.cat(numbers)

    def _copies(self, mine, buffers):
        # A scheduler may keep outputs for longer than they stay in the buffers.
        return [mine if rank == self._world.rank else x.clone() for rank, x in enumerate(buffers)]

    def first(self, mine):
        """The first rank's tensor, in memory of its own; of the others only shape and dtype matter. Collective."""
        (buffer,), _ = self._exchanged(mine, None, range(1))
        return mine if self._world.rank == 0 else buffer.clone()

    def _exchanged(self, mine, number, senders):
        """(the buffers of those ranks that send, filled; those of their numbers, none without a `number`)."""
        key = tuple(mine.shape), mine.dtype, mine.device, senders, number is None
        if key not in self._slots:
            self._slots[key] = self._bound(mine, senders, number is not None)
            for old in list(self._slots)[:-KEPT_SLOTS]:
                self._exchange.release(self._slots.pop(old)[0].phase)
        slot, buffers, numbers = self._slots[key]
        if self._world.rank in senders:
            self._exchange.acquire(slot)
            buffers[self._world.rank].copy_(mine)
            if numbers:
                numbers[self._world.rank].fill_(number)
        self._exchange.post(slot)
        self._exchange.wait(slot)
        return buffers, numbers

    def forget(self):
        """The exchange is a new one."""
        self._slots.clear()

    def _bound(self, like, senders, with_numbers):
        mine = self._world.rank
        with torch.inference_mode(False):
            buffers = [torch.zeros(like.shape, dtype=like.dtype, device=like.device) for _ in senders]
            numbers = [torch.zeros(1, dtype=torch.int32, device=like.device) for _ in senders if with_numbers]
        parts = [buffers, numbers] if with_numbers else [buffers]
        others = [rank for rank in range(self._world.size) if rank != mine]
        sends = [Send(rank, (x[mine],)) for rank in others for x in parts] if mine in senders else []
        recvs = [Recv(rank, (x[rank],)) for rank in senders if rank != mine for x in parts]
        slot = self._exchange.slot("outputs", sends, recvs, depth=1)
        self._exchange.freeze(f"steps, plan {self._phases}")
        self._phases += 1
        return slot, buffers, numbers
