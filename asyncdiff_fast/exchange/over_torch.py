"""Slots over torch.distributed: across hosts, where `_C` is not built, and what the engine is compared with."""

import contextlib
import time
from datetime import timedelta

import torch.distributed as dist

from .errors import ExchangeError
from .rounds import LOOK_S
from .slots import Slot, compare
from .waiting import Helper


class TorchExchange:
    """The slots of one rank over a process group (gloo for CPU tensors, NCCL for CUDA tensors)."""

    kind, device_type = "torch.distributed", None

    def __init__(self, world):
        self.world = world
        self.group = world.new_group()
        self._slots, self._unfrozen, self._phases, self._cursors = [], [], {}, {}
        self._tags = 0
        self._broken, self._helper = None, Helper()
        self.clear_stats()

    def slot(self, name, sends=(), recvs=(), depth=2):
        """Register a slot; it can be posted after `freeze`. Returns `Slot`."""
        slot = Slot(name, tuple(sends), tuple(recvs), depth, -1, pending=[[] for _ in range(depth)])
        self._unfrozen.append(slot)
        return slot

    def freeze(self, phase, order=None):
        """Fix the order of the slots made since the last freeze and compare it with every peer. Collective.

        Args:
            phase: name of this set of slots; each phase has its own order.
            order: number of each slot in an order that all ranks share (tags of the messages); default: its place.
        Raises: ExchangeError if two ranks list different slots, orders or sizes for each other.
        """
        slots, self._unfrozen = self._unfrozen, []
        order = range(len(slots)) if order is None else order
        for place, (slot, number) in enumerate(zip(slots, order, strict=True)):
            slot.phase, slot.place, slot.tag = phase, place, self._tags + number
        self._tags += 1 + max(compare(self.world, slots, max(order, default=-1), phase))
        self._slots += slots
        self._phases[phase], self._cursors[phase] = slots, 0

    def acquire(self, slot):
        """Before writing the next send buffer: its last use must be over."""
        self._finish(slot, slot.epoch - slot.depth)

    def post(self, slot):
        """Begin the slot's sends and receives: what was written on the current stream until now is what travels."""
        self.check()
        slots, cursor = self._phases[slot.phase], self._cursors[slot.phase]
        if slots[cursor] is not slot:
            raise ExchangeError(
                f"slots are posted in their frozen order: {slots[cursor].name!r} is next, not {slot.name!r}"
            )
        self._cursors[slot.phase] = (cursor + 1) % len(slots)
        self._finish(slot, slot.epoch - slot.depth)
        parity = slot.epoch % slot.depth
        try:
            slot.pending[parity] = self._start(slot, parity)
        except RuntimeError as error:
            self._fail(slot, [x.peer for x in (*slot.sends, *slot.recvs)], error)
        slot.epoch += 1
        self._sent_bytes += slot.nbytes
        self._posts += 1

    def _start(self, slot, parity):
        """[(peer, work)] of one epoch; grouped for NCCL, since its operations run in one stream."""
        ranks = self.world.ranks
        moves = [(dist.isend, x.peer, x.buffers[parity]) for x in slot.sends]
        moves += [(dist.irecv, x.peer, x.buffers[parity]) for x in slot.recvs]
        if moves and moves[0][2].is_cuda:
            grouped = [dist.P2POp(op, buffer, ranks[peer], self.group) for op, peer, buffer in moves]
            works = dist.batch_isend_irecv(grouped)
            return [(moves[0][1], work) for work in works]
        return [(peer, op(buffer, ranks[peer], group=self.group, tag=slot.tag)) for op, peer, buffer in moves]

    def wait(self, slot, lag=0):
        """Make the current stream (the host, for CPU tensors) wait for the epoch `lag` posts before the latest."""
        self.check()
        if not 0 <= lag < slot.depth:
            raise ValueError(
                f"lag must be less than the depth: got lag={lag}, depth={slot.depth} for slot {slot.name!r}"
            )
        began = time.perf_counter()
        self._finish(slot, slot.epoch - 1 - lag, on_host=False)
        waited = time.perf_counter() - began
        self._wait_s += waited
        self._waits[slot.name] = self._waits.get(slot.name, 0.0) + waited

    def _finish(self, slot, epoch, on_host=True):
        """Wait for the works of one epoch, unless it is too old to be remembered: then it is over.

        CUDA works order the current stream; with `on_host` the host waits too, so that a peer that hangs is named.
        """
        if epoch < 0 or epoch < slot.epoch - slot.depth:
            return
        parity = epoch % slot.depth
        for peer, work in slot.pending[parity]:
            try:
                if slot_device(slot).type == "cpu":
                    self._wait_for(work)
                else:
                    work.wait()
                    if on_host:
                        self._poll(work)
            except ExchangeError:
                raise
            except RuntimeError as error:
                self._fail(slot, [peer], error)
        if on_host or slot_device(slot).type == "cpu":
            slot.pending[parity] = []

    def _wait_for(self, work):
        """Wait for a CPU work, which hears neither signals nor of other ranks. Raises: RuntimeError; ExchangeError."""
        limit_s = self.world.timeout_s
        asked, ends = self._helper.ask(lambda stop: work.wait(timedelta(seconds=limit_s))), time.monotonic() + limit_s
        while True:
            try:
                return asked.result(LOOK_S)
            except TimeoutError:
                if time.monotonic() > ends + 1:
                    raise RuntimeError(f"not done after {limit_s:g} s") from None
            try:
                self.world.look()
            except ExchangeError as error:
                self.abort(str(error))
                raise

    def _poll(self, work):
        """Let the host wait for a CUDA work, at most `timeout_s`."""
        deadline = time.monotonic() + self.world.timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"not done after {self.world.timeout_s:g} s")
            time.sleep(1e-4)
            self.world.look()

    def _fail(self, slot, peers, error):
        named = ", ".join(str(self.world.ranks[peer]) for peer in peers)
        self.abort(
            f"rank {self.world.name} waited for rank {named} in slot {slot.name!r} "
            f"(exchange {slot.epoch}) and failed: {str(error).splitlines()[0]}; that rank died or hangs: see its "
            f"log, or raise timeout_s (now {self.world.timeout_s:g})"
        )
        raise ExchangeError(self._broken) from error

    def drain(self, phases=None):
        """Wait for everything that is under way; both sides must have posted it."""
        for slot in self._slots:
            if phases is None or slot.phase in phases:
                for epoch in range(slot.epoch - slot.depth, slot.epoch):
                    self._finish(slot, epoch)

    def release(self, phase):
        """Forget the slots of a phase, after `drain`."""
        self.drain({phase})
        self._cursors.pop(phase)
        gone = self._phases.pop(phase)
        self._slots = [slot for slot in self._slots if all(slot is not other for other in gone)]

    def check(self):
        """Raises: ExchangeError if the exchange has failed before."""
        if self._broken:
            raise ExchangeError(self._broken)

    def abort(self, reason):
        """Make every later call raise; what is under way is left to the process group."""
        self._broken = self._broken or reason

    def step(self):
        """Around one call; if it raises, the peers hear of it from `World.leave`."""
        return contextlib.nullcontext()

    def stats(self):
        """Dict: sent_bytes, posts, wait_s (host time in `wait`), wait_s_by_slot; since `clear_stats`."""
        return {
            "sent_bytes": self._sent_bytes,
            "posts": self._posts,
            "wait_s": self._wait_s,
            "wait_s_by_slot": dict(self._waits),
        }

    def clear_stats(self):
        """Begin to count anew."""
        self._sent_bytes = self._posts = 0
        self._wait_s, self._waits = 0.0, {}

    def close(self):
        """Wait for what is under way, if the exchange is whole, and drop group and buffers."""
        try:
            if self._broken is None:
                self.drain()
        finally:
            self._broken = self._broken or "the exchange is closed"
            for slot in self._slots:
                # Each work keeps its group alive, and with it threads.
                slot.pending = [[] for _ in range(slot.depth)]
            self._slots, self._unfrozen, self._phases = [], [], {}
            self._helper.close()
            group, self.group = self.group, None
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)


def slot_device(slot):
    """Device of a slot's buffers."""
    return (slot.sends or slot.recvs)[0].buffers[0].device
