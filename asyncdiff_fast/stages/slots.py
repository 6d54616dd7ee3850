"""What one pass on one rank sends and receives: buffers, slots in the plan's order, predictions of what is stale."""

import torch

from ..exchange.slots import Recv, Send
from ..prediction.trend import extrapolate
from .buffers import DEPTH, Buffer
from .in_order import InOrder


class PassSlots(InOrder):
    """Buffers and slots of a rank for one plan. `epoch` is the number of the next asynchronous exchange.

    Args:
        predicts: whether stale values are read with their trend carried on.
        check: the `CallCheck` that sees them.
        phase: name under which ranks compare the slots; that is collective.
        held: whether stale calls read what has come where it always lies, as graphs do: a copy, of buffers that take
            turns. A graph for each turn would spare the copy, and be captured two or three times.
    """

    def __init__(self, plan, rank, device, predicts, check, exchange, phase, held=False):
        super().__init__(exchange)
        self._plan, self._rank, self._device = plan, rank, device
        self._predicts, self._check = predicts, check
        self.phase, self.epoch = phase, 0
        self._buffers, self._ready, self._held = {}, set(), {}
        self._numbers = {t.name: n for n, t in enumerate(plan.transfers) if t.unit < 0}
        for number in range(len(plan.transfers)):
            self._register(number)
        exchange.freeze(phase, self._order)
        if predicts:
            received = (number for number in plan.program(rank).receives.values())
            check.bind({key: self._label(*key) for number in received for key in self._predicted(number)}, device)
        if held:
            self._hold(set(plan.program(rank).receives.values()))

    def begin(self, stale, keep):
        """A call begins; with `keep`, an exact one leaves behind what a stale one will read."""
        self._cursor, self._ready = 0, set()
        if stale:
            self._post_receives()
        elif keep:
            self._exchange.drain({self.phase})

    def end(self):
        """A stale call has sent all that it sends."""
        self._post_receives()
        self.epoch += 1

    def send(self, number, tensors):
        """Post a transfer: its number, or the name of a result. `tensors`: by value."""
        number = self._numbers.get(number, number)

        def fill():
            for v in self._plan.transfers[number].values:
                self._buffers[number, v].view(self.epoch).copy_(tensors[v])

        self._send(number, fill)

    def received(self, name):
        """The tensors of a result that was sent in this call; the next but one overwrites them."""
        number = self._numbers[name]
        self._exchange.wait(self._slots[number])
        return [self._buffers[number, v].view(self.epoch - 1) for v in self._plan.transfers[number].values]

    def learn(self, number, tensors):
        """Of an exact call: keep those of the values that a stale call would have received."""
        for v, x in tensors.items():
            buffer = self._buffers.get((number, v))
            if buffer is None:
                continue
            if self._predicts:
                buffer.view(self.epoch - 2).copy_(buffer.view(self.epoch - 1))
            buffer.view(self.epoch - 1).copy_(x)
            self._note((number, v), buffer)

    def stale(self, number):
        """{value: what a stale call reads}: the last received, or its prediction. First `wait_stale`."""
        return {
            v: self._held.get((n, v), self._read(buffer)) for (n, v), buffer in self._buffers.items() if n == number
        }

    def wait_stale(self, number, weight):
        """Wait for the epoch before this call's; it is the latest, or one back if this call's was posted already.

        Predictions are then made where the values of the epoch before that lie, which nothing reads any more.
        """
        slot = self._slots[number]
        self._exchange.wait(slot, slot.epoch - self.epoch)
        if number in self._ready:
            return
        self._ready.add(number)
        for key in self._predicted(number) if self._predicts else ():
            buffer = self._buffers[key]
            self._note(key, buffer)
            last, before = (buffer.flat[(self.epoch - back) % len(buffer.flat)] for back in (1, 2))
            extrapolate(before, last, weight)
        for key, place in self._held.items():
            if key[0] == number:
                place.copy_(self._read(self._buffers[key]))

    def _read(self, buffer):
        """The tensor of a buffer that a stale call reads."""
        return buffer.view(self.epoch - 1 - (self._predicts and buffer.predictable))

    def _hold(self, received):
        # Ordinary tensors, whatever mode the first call runs in: they are written in later ones too.
        with torch.inference_mode(False):
            for key, buffer in self._buffers.items():
                if key[0] in received:
                    self._held[key] = torch.empty_like(buffer.view(0))

    def _register(self, number):
        transfer = self._plan.transfers[number]
        sends = recvs = ()
        if transfer.source == self._rank:
            sends = [Send(t, self._buffer(number, v).flat) for t, values in transfer.targets for v in values]
        else:
            mine = [v for target, values in transfer.targets for v in values if target == self._rank]
            recvs = [Recv(transfer.source, self._buffer(number, v).flat) for v in mine]
        if sends or recvs:
            depth = len((*sends, *recvs)[0].buffers)
            self._slots[number] = self._exchange.slot(transfer.name, sends, recvs, depth)
            self._order.append(number)

    def _buffer(self, number, value):
        """The buffer of one value in one transfer; made when first asked for."""
        if (number, value) not in self._buffers:
            transfer = self._plan.transfers[number]
            stale = transfer.unit >= 0 and transfer.source != self._rank
            ref = self._plan.graph.values[value].ref if transfer.unit >= 0 else self._plan.outputs[value]
            # A received value is predicted where the one before the last lies, so that takes a place of its own.
            self._buffers[number, value] = Buffer(ref, self._device, DEPTH + (stale and self._predicts))
        return self._buffers[number, value]

    def _predicted(self, number):
        """[(number, value)] of a transfer's values that are predicted here."""
        return [key for key, buffer in self._buffers.items() if key[0] == number and buffer.predictable]

    def _label(self, number, value):
        transfer = self._plan.transfers[number]
        place = transfer.values.index(value)
        return transfer.name if place == 0 else f"{transfer.name}.{place}"

    def _note(self, key, buffer):
        if self._check.wants(key):
            self._check.note(key, buffer.flat[(self.epoch - 1) % len(buffer.flat)])
