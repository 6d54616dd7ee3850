"""Drives the double of CUDA and NCCL: memory, kernels and streams of several ranks, all from one thread.

with Double(path, delay_us=300, seed=1) as gpu:
    memory = gpu.memory(64, "x")
    gpu.kernel(gpu.stream(0), "produce", writes=[memory.filled(7)])
    assert gpu.drain() == [] and gpu.races() == []
"""

import contextlib
import ctypes
from dataclasses import dataclass

_FIRST_CONTEXT = 0x50000001
_NON_BLOCKING = 1
# Longer than any report.
_REPORT_BYTES = 1 << 20


class DoubleError(RuntimeError):
    """A driver or NCCL call of the double answered with an error; `code` is the answer."""

    def __init__(self, name, code):
        super().__init__(f"{name} answered {code}")
        self.code = code


class Range(ctypes.Structure):
    """Bytes that a kernel touches. `value`: what each byte should be, or becomes; -1: any, or left as it is."""

    _fields_ = (("begin", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("value", ctypes.c_int))


class Memory:
    """Memory of the host that plays device memory; `label` names it in reports."""

    def __init__(self, block, nbytes):
        self._block, self.nbytes = block, nbytes
        self.address = ctypes.addressof(block)

    def part(self, begin=0, nbytes=None, value=-1):
        """A `Range` of it."""
        return Range(self.address + begin, self.nbytes - begin if nbytes is None else nbytes, value)

    def filled(self, value):
        """All of it, with `value` in every byte."""
        return self.part(value=value)

    def tobytes(self):
        return ctypes.string_at(self.address, self.nbytes)


@dataclass(frozen=True)
class Race:
    """Two accesses that no edge orders; `kind` is RAW, WAR or WAW by the order in which the host issued them."""

    kind: str
    first: str
    second: str
    memory: str


class Double:
    """The double, emptied. A context manager: at the end it is emptied again, whatever is stuck.

    Args:
        path: libfake_gpu.so.
        delay_us: operations take up to so much longer, by random numbers of `seed`.
        enquiries: so many times NCCL answers "in progress" after a group of a communicator that does not block.
    """

    def __init__(self, path, delay_us=0, seed=0, enquiries=1):
        self.path, self.library = str(path), ctypes.CDLL(str(path))
        self._memory = []
        self.library.fake_reset()
        self.library.cuCtxSetCurrent(None)
        self.library.fake_delays(delay_us, seed)
        self.library.fake_enquiries(enquiries)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.library.fake_reset()

    def call(self, name, *args):
        """Call an entry point of the driver, of NCCL or of the double that answers with a code.

        Raises: DoubleError unless it answers 0.
        """
        code = getattr(self.library, name)(*args)
        if code:
            raise DoubleError(name, code)

    def made(self, name, *args):
        """What an entry point writes through its first argument: a handle."""
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle), *args)
        return handle

    @contextlib.contextmanager
    def rank(self, rank):
        """Calls inside are made by a rank: its context is the current one."""
        before = ctypes.c_void_p()
        self.library.cuCtxGetCurrent(ctypes.byref(before))
        self.library.cuCtxSetCurrent(ctypes.c_void_p(_FIRST_CONTEXT + rank))
        try:
            yield
        finally:
            self.library.cuCtxSetCurrent(before)

    def stream(self, rank):
        """A new stream of a rank: its handle, an int."""
        with self.rank(rank):
            return self.made("cuStreamCreateWithPriority", _NON_BLOCKING, 0).value

    def memory(self, nbytes, label):
        """`Memory` of zeros, which lives as long as the double."""
        block = (ctypes.c_char * nbytes)()
        self._memory.append(block)
        self.name(ctypes.addressof(block), nbytes, label)
        return Memory(block, nbytes)

    def name(self, address, nbytes, label):
        """Reports call these bytes by `label`."""
        self.library.fake_name(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), label.encode())

    def kernel(self, stream, name, reads=(), writes=()):
        """Queue a kernel that reads, then writes `Range`s on a stream."""
        self.call("fake_launch", ctypes.c_void_p(stream), name.encode(), *_ranges(reads), *_ranges(writes))

    def host(self, rank, name, reads=(), writes=()):
        """Touch memory at once, as this thread of a rank."""
        with self.rank(rank):
            self.library.fake_host(name.encode(), *_ranges(reads), *_ranges(writes))

    def record(self, event, stream):
        """cuEventRecord, for handles."""
        self.call("cuEventRecord", event, ctypes.c_void_p(stream))

    def wait(self, stream, event):
        """cuStreamWaitEvent, for handles."""
        self.call("cuStreamWaitEvent", ctypes.c_void_p(stream), event, 0)

    def event(self, rank):
        """A new event of a rank."""
        with self.rank(rank):
            return self.made("cuEventCreate", 2)

    def join(self, waiting, awaited, rank):
        """One stream of a rank waits for what is on another one."""
        event = self.event(rank)
        self.record(event, awaited)
        self.wait(waiting, event)

    def drain(self, grace_ms=100):
        """Let all streams run dry. Returns what each is stuck in, if none has been able to move for `grace_ms`."""
        return self._lines("fake_drain", grace_ms)

    def races(self):
        """Every pair of racing accesses: list of `Race`, in the order of issue."""
        return [Race(*line.split("\t")) for line in self._lines("fake_races")]

    def wrong_reads(self):
        """What kernels found in memory and did not expect."""
        return self._lines("fake_wrong_reads")

    def misuses(self):
        """Calls that the real libraries would block in, fail or punish."""
        return self._lines("fake_misuses")

    def calls(self):
        """{entry point of the driver or NCCL: how often this thread has called it since it asked last}."""
        return {name: int(count) for name, count in (line.split() for line in self._lines("fake_calls"))}

    def fail(self, rank, result):
        """Give every communicator of a rank an asynchronous error."""
        self.library.fake_fail(rank, result)

    def _lines(self, function, *args):
        buffer = ctypes.create_string_buffer(_REPORT_BYTES)
        getattr(self.library, function)(*args, buffer, ctypes.c_size_t(_REPORT_BYTES))
        return buffer.value.decode().splitlines()


def _ranges(ranges):
    return (Range * len(ranges))(*ranges), len(ranges)
