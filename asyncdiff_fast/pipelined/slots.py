"""What one rank sends and receives in a call of micro-steps: a slot for each transfer of each of them."""

from ..exchange.slots import Recv, Send
from ..stages.buffers import Buffer
from ..stages.in_order import InOrder
from .order import in_order

# A buffer is written again in the next call, when its readers are over.
DEPTH = 1


class MicroSlots(InOrder):
    """Buffers and slots of a rank for one `Route`. Collective to make.

    Args:
        phase: name under which ranks compare the slots.
    """

    def __init__(self, route, rank, device, exchange, phase):
        super().__init__(exchange)
        self.phase, self._micro, self._buffers = phase, route.micro, {}
        numbers = []
        for place, (p, n) in enumerate(in_order([m.transfers for m in route.micro])):
            if self._register(p, n, rank, device):
                self._order.append((p, n))
                numbers.append(place)
        exchange.freeze(phase, numbers)

    def begin(self):
        """A call begins."""
        self._cursor = 0
        self._post_receives()

    def send(self, p, n, tensors):
        """Post a transfer of a micro-step; `tensors` by value."""

        def fill():
            for v in self._micro[p].transfers[n].values:
                self._buffers[p, n, v].view(0).copy_(tensors[v])

        self._send((p, n), fill)

    def view(self, p, n, v):
        """Where a value is received, or sent from."""
        return self._buffers[p, n, v].view(0)

    def received(self, p, n):
        """[value] of a transfer that this rank receives."""
        return [v for q, m, v in self._buffers if (q, m) == (p, n)]

    def wait(self, p, n):
        """What this call sends has arrived after this."""
        self._exchange.wait(self._slots[p, n])

    def release(self):
        """Forget the slots."""
        self._exchange.release(self.phase)

    def _register(self, p, n, rank, device):
        transfer, micro = self._micro[p].transfers[n], self._micro[p]
        sends = recvs = ()
        if transfer.source == rank:
            mine = transfer.values
        else:
            mine = tuple(v for target, values in transfer.targets if target == rank for v in values)
        for v in mine:
            self._buffers[p, n, v] = Buffer(micro.ref(transfer, v), device, DEPTH)
        if transfer.source == rank:
            sends = [Send(t, self._buffers[p, n, v].flat) for t, values in transfer.targets for v in values]
        else:
            recvs = [Recv(transfer.source, self._buffers[p, n, v].flat) for v in mine]
        if not sends and not recvs:
            return False
        self._slots[p, n] = self._exchange.slot(f"{transfer.name}, micro-step {p}", sends, recvs, DEPTH)
        return True
