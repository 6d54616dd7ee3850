"""How ranks come to share an engine: they meet through torch's store, and all have it or none."""

import contextlib
import importlib.util
import logging
import os
import secrets
import threading
import time
import weakref

import torch

from . import engine
from .errors import ExchangeError
from .processes import host
from .slots import Recv, Send

log = logging.getLogger(__name__)
STORE_PERIOD_S = 0.25
# NCCL's kernels hold so many processors of the GPU while they wait for a peer, by itself up to 32; a few megabytes need
# no more. One rank has at most three exchanges: all that they wait with find room beside each other, so that no order
# among them need be agreed on.
MAX_CTAS = 4
# How long the end of an exchange waits for a store that may have stopped with its host.
LEAVING_S = 1.0


class Unavailable(RuntimeError):
    """The engine cannot be used by these ranks; the message names the first rank that failed, and why."""


def open_engine(world, kind, device):
    """The engine of these ranks by "nccl", "nccl-puts" or "shm". Collective. Raises: Unavailable, on all alike."""
    if kind != "shm":
        return _connect_nccl(world, kind, device)
    token = world.broadcast(secrets.randbits(63), "shared memory")
    made = []
    addresses = _together(world, "shared memory", lambda: made.append(_transport(world, token)) or made[0].address())
    pids = [0 if rank == world.rank else pid for rank, (pid, _) in enumerate(addresses)]

    def connect():
        made[0].connect(addresses)
        made.append(_channel(world, made[0], pids))

    _together(world, "connected memory", connect)
    return engine.Engine(world, kind, device, made[1])


def _channel(world, transport, pids):
    # Python's garbage collection does not see what the channel holds.
    look = weakref.WeakMethod(world.look)

    def pause():
        alive = look()
        if alive is not None:
            alive()

    return engine._C.Channel(transport, world.timeout_s, pids, ranks=world.ranks, pause=pause)


def _transport(world, token):
    return engine._C.ShmTransport(world.rank, world.size, token)


@contextlib.contextmanager
def _current(device):
    """Inside, a device and its context are the current ones of this thread."""
    with torch.cuda.device(device):
        torch.empty(1, device=device)
        yield


def _connect_nccl(world, kind, device):
    libraries = []

    def begin():
        libraries.append(engine._C.Libraries(nccl_package=nccl_package()))
        libraries[0].require_driver()
        if kind == "nccl-puts" and libraries[0].puts_missing:
            raise ExchangeError(libraries[0].puts_missing)
        return engine._C.unique_id(libraries[0]) if world.rank == 0 else b""

    def connect():
        with _current(device):
            transport = engine._C.NcclTransport(
                libraries[0], unique_id, world.rank, world.size, world.timeout_s, MAX_CTAS, puts=kind == "nccl-puts"
            )
        while not transport.ready():
            time.sleep(1e-3)
        return transport

    unique_id = _together(world, "NCCL", begin)[0]
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    transport, channels = [], []
    _together(world, "connecting by NCCL", lambda: transport.append(connect()))
    info = transport[0].info()
    log.info("NCCL %s from %s", info["version"], info["path"])
    everyone = world.gather((host(), os.getpid()), "processes")
    pids = [pid if rank != world.rank and at == host() else 0 for rank, (at, pid) in enumerate(everyone)]
    _together(world, "a channel", lambda: channels.append(_channel(world, transport[0], pids)))
    made = engine.Engine(world, kind, device, channels[0], _StoreWatch(world, channels[0]))
    if kind == "nccl-puts":
        try:
            _together(world, "one-sided puts", lambda: try_puts(made, device))
        except Unavailable:
            with contextlib.suppress(ExchangeError):
                made.close(0)
            raise
    return made


def try_puts(exchange, device):
    """Put a number from every rank to every other, so that what these devices cannot do is known before it is needed.

    NCCL makes ready for puts at the first one, with all ranks together: later a rank may well have none.
    Raises: ExchangeError if it fails, or another number arrives.
    """
    world = exchange.world
    peers = [rank for rank in range(world.size) if rank != world.rank]
    numbers = {rank: torch.full((1,), rank if rank == world.rank else -1, device=device) for rank in range(world.size)}
    sends = [Send(peer, (numbers[world.rank],)) for peer in peers]
    slot = exchange.slot("one number", sends, [Recv(peer, (numbers[peer],)) for peer in peers], depth=1)
    exchange.freeze("a first put")
    exchange.post(slot)
    exchange.wait(slot)
    exchange.release("a first put")
    wrong = [peer for peer in peers if int(numbers[peer]) != peer]
    if wrong:
        raise ExchangeError(f"a put from rank {wrong[0]} brought {int(numbers[wrong[0]])} instead of {wrong[0]}")


def nccl_package():
    """Path of libnccl in the installed NVIDIA package, or an empty string."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return ""
    for folder in (spec and spec.submodule_search_locations) or ():
        path = os.path.join(folder, "lib", "libnccl.so.2")
        if os.path.exists(path):
            return path
    return ""


def _together(world, what, attempt):
    """What `attempt()` returns on each rank; Unavailable on all ranks if it fails on one."""
    try:
        mine = attempt(), None
    except (RuntimeError, OSError) as error:
        # Of the system, too: no descriptors or threads left, say.
        mine = None, str(error)
    everyone = world.gather(mine, what)
    for rank, (_, error) in zip(world.ranks, everyone, strict=True):
        if error:
            raise Unavailable(f"rank {rank}: {error}")
    return [result for result, _ in everyone]


class _StoreWatch:
    """Tells ranks of failures that NCCL does not tell them of: each rank aborts its own communicator.

    Only its thread asks the store: while the store's host is stopped, a call never ends, and no other may begin.
    """

    def __init__(self, world, channel):
        self._world, self._store, self._channel = world, world.new_store("stopped"), channel
        self._leaving, self._ended = threading.Event(), threading.Event()
        self._peers = {rank for rank in range(world.size) if rank != world.rank}
        self._thread = threading.Thread(target=self._run, daemon=True, name="asyncdiff_fast store")
        self._thread.start()

    def leave(self):
        """This rank posts no more."""
        self._leaving.set()

    def end(self):
        """Leave, and hear no more of the others."""
        self._leaving.set()
        self._ended.set()
        self._thread.join(LEAVING_S)

    def _run(self):
        with contextlib.suppress(RuntimeError):
            ended = False
            while not ended:
                ended = self._ended.wait(STORE_PERIOD_S)
                if self._tell() or (not ended and self._hear()):
                    return

    def _tell(self):
        """What the others must know of this rank; True if it has stopped."""
        if self._leaving.is_set():
            self._store.set(f"left/{self._world.rank}", b"")
        reason = self._channel.broken()
        if reason:
            self._store.set("why", f"rank {self._world.name} stopped the exchange: {reason}")
        return bool(reason)

    def _hear(self):
        """What the others told; True if one of them has stopped."""
        if self._store.check(["why"]):
            self._channel.report(self._store.get("why").decode(errors="replace"))
            return True
        try:
            self._world.look()
        except ExchangeError as error:
            # Streams wait without a word: nobody else looks.
            self._channel.report(str(error))
            return True
        for peer in [peer for peer in self._peers if self._store.check([f"left/{peer}"])]:
            self._peers.discard(peer)
            self._channel.mark_left(peer)
        return False
