"""Where ranks first meet: the store of a new process group, once all have come."""

import errno
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .errors import ExchangeError
from .presence import Missing
from .processes import Siblings, has_launcher
from .rounds import LOOK_S, Rounds
from .waiting import within

_rounds = None


def meet(rank, size, timeout_s):
    """The store for a new group, once all ranks have come. Raises: ExchangeError that names those which have not."""
    global _rounds
    began, why = time.monotonic(), None
    try:
        if _rounds is None:
            # One store for the life of the process: a second group starts while other ranks still leave the first.
            store = _store(rank, timeout_s)
            _rounds = Rounds(
                dist.PrefixStore("asyncdiff_fast starts", store), rank, range(size), rank == 0 and not has_launcher()
            )
        left = max(0.1, timeout_s - (time.monotonic() - began))
        number, _ = _rounds.begin(size, "a process group", left)
        return dist.PrefixStore(f"start {number}", _rounds.store)
    except Missing as error:
        missing, why = error, error.__cause__
    seconds = time.monotonic() - began
    raise ExchangeError(f"rank {rank} waited {seconds:.3g} s for {missing} to call patch(); {missing.fate}") from why


def _store(rank, timeout_s):
    """The launcher's store, or one that rank 0 keeps. Raises: Missing if rank 0 does not come; ExchangeError."""
    ends, limit = time.monotonic() + timeout_s, timedelta(seconds=timeout_s)
    place = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", 29500))
    # torch waits inside its constructor, deaf to everything; and rank 0 would hide why it cannot listen.
    if rank == 0 and not has_launcher():
        return within(timeout_s + 1, lambda stop: _kept(place, limit))
    siblings = Siblings()
    while not _listens(place):
        if not has_launcher() and siblings.too_few((), 1):
            raise Missing([0], died=True)
        if time.monotonic() > ends:
            raise Missing([0])
        time.sleep(LOOK_S)
    try:
        # It is told of one rank only, so as not to wait for the others: they are missed by name.
        return within(timeout_s + 1, lambda stop: next(rendezvous("env://?world_size=1", timeout=limit))[0])
    except (RuntimeError, TimeoutError) as error:
        raise Missing([0]) from error


def _listens(place):
    try:
        socket.create_connection(place, timeout=1).close()
        return True
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise ExchangeError(f"the store of the ranks cannot be reached: {error.strerror}") from error
        return False


def _kept(place, limit):
    """A store in this process, which no other host reaches if its address is this host's own."""
    host, port = place
    try:
        listener = _listener(host, port)
    except OSError as error:
        raise ExchangeError(
            f"rank 0 cannot listen on {host}, port {port}: {error}; another job uses it, or has left it behind: set "
            "MASTER_PORT to a free port for all ranks"
        ) from error
    # Whoever starts torch.distributed in this process later has the same address, and gets the same server.
    own = dict(wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach(), use_libuv=True)
    return dist.TCPStore(host, port, None, True, limit, **own)


def _listener(host, port):
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if address[0].startswith("127.") or address[0] == "::1":
        return socket.create_server(address[:2], family=family, backlog=1024)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)


def connect(rank, others, timeout_s, start):
    """What `start()` returns. Raises: ExchangeError if torch.distributed does not reach the others in time."""
    try:
        return within(timeout_s + 1, lambda stop: start())
    except (RuntimeError, TimeoutError) as error:
        raise ExchangeError(
            f"rank {rank} waited {timeout_s:g} s for rank {', '.join(map(str, others))} to connect by "
            f"torch.distributed and failed: {str(error).splitlines()[0]}; a rank died or hangs: see its log, or raise "
            "timeout_s"
        ) from error
