"""Tensors of one block's steps on all ranks: each from the rank that evaluated it, or all from the first."""

import torch

from ..exchange.slots import Recv, Send

# Slots that are kept: three for a shape of outputs, the errors' among them.
KEPT_SLOTS = 12


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
        buffers = self._exchanged(mine, range(self._world.size))
        # A scheduler may keep outputs for longer than they stay in the buffers.
        return [mine if rank == self._world.rank else x.clone() for rank, x in enumerate(buffers)]

    def first(self, mine):
        """The first rank's tensor, in memory of its own; of the others only shape and dtype matter. Collective."""
        (buffer,) = self._exchanged(mine, range(1))
        return mine if self._world.rank == 0 else buffer.clone()

    def _exchanged(self, mine, senders):
        """The buffers of those ranks that send, filled."""
        key = tuple(mine.shape), mine.dtype, mine.device, senders
        if key not in self._slots:
            self._slots[key] = self._bound(mine, senders)
            for old in list(self._slots)[:-KEPT_SLOTS]:
                self._exchange.release(self._slots.pop(old)[0].phase)
        slot, buffers = self._slots[key]
        if self._world.rank in senders:
            self._exchange.acquire(slot)
            buffers[self._world.rank].copy_(mine)
        self._exchange.post(slot)
        self._exchange.wait(slot)
        return buffers

    def forget(self):
        """The exchange is a new one."""
        self._slots.clear()

    def _bound(self, like, senders):
        with torch.inference_mode(False):
            buffers = [torch.zeros(like.shape, dtype=like.dtype, device=like.device) for _ in senders]
        mine, sends = self._world.rank, []
        if mine in senders:
            sends = [Send(rank, (buffers[mine],)) for rank in range(self._world.size) if rank != mine]
        recvs = [Recv(rank, (buffers[rank],)) for rank in senders if rank != mine]
        slot = self._exchange.slot("outputs", sends, recvs, depth=1)
        self._exchange.freeze(f"steps, plan {self._phases}")
        self._phases += 1
        return slot, buffers
