"""NCCL calls on the double, without `_C`: for tests of the double itself."""

import contextlib
import ctypes

from double import DoubleError

INT8 = 0
IN_PROGRESS = 7


class UniqueId(ctypes.Structure):
    """ncclUniqueId."""

    _fields_ = (("text", ctypes.c_char * 128),)


class Config(ctypes.Structure):
    """ncclConfig_t, up to what the double reads."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


class SignalAwaited(ctypes.Structure):
    """ncclWaitSignalDesc_t."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("count", "peer", "index", "context"))


def config(blocking=0):
    """A configuration of communicators, which do not block: one thread plays all ranks."""
    return Config(ctypes.sizeof(Config), 0xCAFEBEEF, 23203, blocking)


class Ranks:
    """One communicator and one stream for it, per rank; calls take the rank that makes them.

    With `patient`, each call or group enquires until it is launched.
    """

    def __init__(self, gpu, size, patient=True):
        self.gpu, self.size, self._patient = gpu, size, patient
        self._grouped = None
        unique_id = UniqueId()
        gpu.call("ncclGetUniqueId", ctypes.byref(unique_id))
        self.comms, self.streams = [], []
        for rank in range(size):
            with gpu.rank(rank):
                comm = ctypes.c_void_p()
                function = gpu.library.ncclCommInitRankConfig
                answer = function(ctypes.byref(comm), size, unique_id, rank, ctypes.byref(config()))
            assert answer == (0 if rank == size - 1 else IN_PROGRESS)
            self.comms.append(comm)
            self.streams.append(gpu.stream(rank))

    def error(self, rank):
        """The asynchronous error of a rank's communicator."""
        error = ctypes.c_int()
        self.gpu.call("ncclCommGetAsyncError", self.comms[rank], ctypes.byref(error))
        return error.value

    def _on(self, rank, stream):
        return self.comms[rank], ctypes.c_void_p(self.streams[rank] if stream is None else stream)

    @contextlib.contextmanager
    def group(self):
        """The calls inside are one group. Answers 0 or "in progress"."""
        self.gpu.call("ncclGroupStart")
        self._grouped = set()
        yield
        ranks, self._grouped = self._grouped, None
        self._launched(self.gpu.library.ncclGroupEnd(), "ncclGroupEnd", ranks)

    def send(self, rank, peer, memory, stream=None):
        size = ctypes.c_size_t(memory.nbytes)
        self._issue(rank, "ncclSend", ctypes.c_void_p(memory.address), size, INT8, peer, stream=stream)

    def recv(self, rank, peer, memory, stream=None):
        size = ctypes.c_size_t(memory.nbytes)
        self._issue(rank, "ncclRecv", ctypes.c_void_p(memory.address), size, INT8, peer, stream=stream)

    def _issue(self, rank, name, *args, stream=None):
        code = getattr(self.gpu.library, name)(*args, *self._on(rank, stream))
        if self._grouped is not None:
            self._grouped.add(rank)
        self._launched(code, name, {rank})

    def _launched(self, code, name, ranks):
        if code not in (0, IN_PROGRESS):
            raise DoubleError(name, code)
        while self._patient and code and any([self.error(rank) == IN_PROGRESS for rank in ranks]):
            pass

    def window(self, rank, nbytes, label, flags=1):
        """(address, handle) of new registered memory of a rank; the handle is there once every rank has come."""
        with self.gpu.rank(rank):
            block = self.gpu.made("ncclMemAlloc", ctypes.c_size_t(nbytes))
        self.gpu.name(block.value, nbytes, label)
        window, function = ctypes.c_void_p(), self.gpu.library.ncclCommWindowRegister
        answer = function(self.comms[rank], block, ctypes.c_size_t(nbytes), ctypes.byref(window), flags)
        if answer not in (0, IN_PROGRESS):
            raise DoubleError("ncclCommWindowRegister", answer)
        return block.value, window

    def put(self, rank, peer, address, nbytes, window, offset):
        """ncclPutSignal of memory of this rank at an offset of the peer's part of a window."""
        sizes = ctypes.c_size_t(nbytes), INT8, peer, window, ctypes.c_size_t(offset), 0, 0, 0
        self._issue(rank, "ncclPutSignal", ctypes.c_void_p(address), *sizes)

    def wait_signal(self, rank, peer, count=1):
        awaited = SignalAwaited(count, peer, 0, 0)
        self._issue(rank, "ncclWaitSignal", 1, ctypes.byref(awaited))

    def signal(self, rank, peer):
        self._issue(rank, "ncclSignal", peer, 0, 0, 0)

    def abort(self, rank):
        self.gpu.call("ncclCommAbort", self.comms[rank])
