"""The outputs of one block's steps, each from the rank that evaluated it, on all of them."""

import torch

from ..exchange.slots import Recv, Send

# Shapes of outputs whose buffers are kept.
KEPT_SHAPES = 4


class SharedOutputs:
    """Exchanges one tensor of each rank. Every shape has a slot of its own, made when it is first met."""

    def __init__(self, world, exchange):
        self._world, self._exchange = world, exchange
        self._slots, self._phases = {}, 0

    def all(self, mine, word=0):
        """[every rank's tensor, in order of ranks], in memory of their own. Collective.

        Args:
            mine: this rank's; where it has evaluated nothing, any of the others' shape and dtype.
            word: a number that goes with it, see `words`.
        """
        key = tuple(mine.shape), mine.dtype, mine.device
        if key not in self._slots:
            self._slots[key] = self._bound(mine)
            for old in list(self._slots)[:-KEPT_SHAPES]:
                self._exchange.release(self._slots.pop(old)[0].phase)
        slot, buffers, self._words = self._slots[key]
        self._exchange.acquire(slot)
        buffers[self._world.rank].copy_(mine)
        self._words[self._world.rank].fill_(word)
        self._exchange.post(slot)
        self._exchange.wait(slot)
        # A scheduler may keep outputs for longer than they stay in the buffers.
        return [mine if rank == self._world.rank else x.clone() for rank, x in enumerate(buffers)]

    def words(self):
        """[every rank's number], of the latest `all`. Waits for the device."""
        return torch.cat(self._words).tolist()

    def forget(self):
        """The exchange is a new one."""
        self._slots.clear()

    def _bound(self, like):
        with torch.inference_mode(False):
            buffers = [torch.zeros(like.shape, dtype=like.dtype, device=like.device) for _ in self._world.ranks]
            words = [torch.zeros(1, dtype=torch.int32, device=like.device) for _ in self._world.ranks]
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        sends = [Send(rank, (x[self._world.rank],)) for rank in others for x in (buffers, words)]
        recvs = [Recv(rank, (x[rank],)) for rank in others for x in (buffers, words)]
        slot = self._exchange.slot("outputs", sends, recvs, depth=1)
        self._exchange.freeze(f"steps, plan {self._phases}")
        self._phases += 1
        return slot, buffers, words
