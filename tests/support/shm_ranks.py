"""Ranks over shared memory without torch: processes of `_C` alone, told by the test what to do, killed if they hang."""

import ctypes
import multiprocessing
import time
import traceback
from multiprocessing.connection import wait

import building

PATIENCE_S = 240


class Buffers:
    """`depth` blocks of memory, each filled with one number."""

    def __init__(self, nbytes, depth):
        self.nbytes, self.depth = nbytes, depth
        self._blocks = [(ctypes.c_ubyte * max(1, nbytes))() for _ in range(depth)]
        self.addresses = [ctypes.addressof(block) for block in self._blocks]

    def fill(self, epoch, value):
        ctypes.memset(self.addresses[epoch % self.depth], value % 256, self.nbytes)

    def holds(self, epoch, value):
        """True if every byte of an epoch's block is `value`."""
        return bytes(self._blocks[epoch % self.depth])[: self.nbytes] == bytes([value % 256]) * self.nbytes


class Rank:
    """One rank in its own process: `channel`, and slots in it."""

    def __init__(self, pipe, rank, size, options):
        self._pipe, self.rank, self.size = pipe, rank, size
        self.C = building.load()[1]
        transport = {k: options.pop(k) for k in ("ring_bytes", "futex", "direct") if k in options}
        self.transport = self.C.ShmTransport(rank, size, 4711, **transport)
        addresses = self.meet(self.transport.address())
        self.transport.connect(addresses)
        pids = [pid * (r != rank) for r, (pid, _) in enumerate(addresses)]
        self.channel = self.C.Channel(self.transport, **{"timeout_s": 20.0, "pids": pids} | options)
        # The channel knows addresses only: their memory must be there until it is gone. Attributes go in this order.
        self.kept = []
        self.meet()

    def meet(self, value=None):
        """The values of all ranks, once all have come."""
        self._pipe.send(("meet", value))
        return self._pipe.recv()

    def slot(self, name, sends=(), recvs=(), nbytes=64, depth=2):
        """(number, {peer: Buffers to send}, {peer: Buffers received})."""
        out, into = ({peer: Buffers(nbytes, depth) for peer in peers} for peers in (sends, recvs))
        self.kept += [out, into]
        listed = [[(peer, b.addresses, nbytes) for peer, b in side.items()] for side in (out, into)]
        return self.channel.add(name, *listed, depth), out, into

    def error(self, action, *args):
        """(text of the ExchangeError that an action raises or None, seconds it took)."""
        began = time.monotonic()
        try:
            action(*args)
        except self.C.ExchangeError as error:
            return str(error), time.monotonic() - began
        return None, time.monotonic() - began


def _main(pipe, rank, size, target, options, args):
    try:
        result = target(Rank(pipe, rank, size, options), *args)
        pipe.send(("result", result))
    except BaseException:
        pipe.send(("failed", f"rank {rank}: {traceback.format_exc()}"))


class Started:
    """Processes of `size` ranks that run `target(rank, *args)`; they meet while `results` is running."""

    def __init__(self, size, target, *args, **options):
        building.build()
        context = multiprocessing.get_context("spawn")
        self.processes, self._pipes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_main, args=(there, rank, size, target, dict(options), args), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self._pipes.append(here)

    def results(self):
        """What the ranks return, in order; None for one that died."""
        found, met, alive = {}, {}, dict(enumerate(self._pipes))
        deadline = time.monotonic() + PATIENCE_S
        try:
            while len(found) < len(alive):
                ready = wait([p for r, p in alive.items() if r not in found], max(0, deadline - time.monotonic()))
                assert ready, f"only ranks {sorted(found)} came to an end"
                for rank in [r for r, p in alive.items() if p in ready]:
                    try:
                        kind, value = alive[rank].recv()
                    except EOFError:
                        del alive[rank]
                        continue
                    assert kind != "failed", value
                    (met if kind == "meet" else found)[rank] = value
                if met and len(met) == len(alive) - len(found):
                    for rank in met:
                        alive[rank].send([met.get(r) for r in range(len(self._pipes))])
                    met = {}
        finally:
            for process in self.processes:
                process.join(5 if len(found) == len(alive) else 0)
                process.kill()
        return [found.get(rank) for rank in range(len(self._pipes))]


def run(size, target, *args, **options):
    """What `target(rank, *args)` returns on each of `size` ranks; `options` go to their transport and channel."""
    return Started(size, target, *args, **options).results()
