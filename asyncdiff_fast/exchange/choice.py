"""Which way slots travel between ranks: chosen once, by all ranks alike, and logged once.

`_C` carries CUDA tensors by NCCL and CPU tensors of one host through shared memory; torch.distributed does the rest.
"""

import logging
import os

import torch

from ..environment import ENGINE_CHOICES, EXCHANGE_VARIABLE
from . import engine
from .connecting import Unavailable, open_engine
from .errors import ExchangeError
from .over_torch import TorchExchange
from .processes import host
from .slots import Recv, Send, Slot

__all__ = ["Recv", "Send", "Slot", "TorchExchange", "choose", "open_exchange"]

log = logging.getLogger(__name__)
# What takes the place of a way that these ranks cannot have.
_NEXT = {"nccl-puts": "nccl", "nccl": "torch", "shm": "torch"}
_NAMES = {
    "torch": "torch.distributed",
    "shm": "shared memory",
    "nccl": "NCCL",
    "nccl-puts": "one-sided puts of NCCL",
}
_logged = set()


def open_exchange(world, device):
    """The exchange of these ranks for tensors on a device of each, which need not be the current one. Collective.

    Raises: ExchangeError if ranks want different ways, or ASYNCDIFF_FAST_EXCHANGE=engine cannot be had.
    """
    device = torch.device(device)
    everyone = world.gather(_report(device.type), "the way to exchange")
    kind, why = choose(everyone, world.ranks)
    exchange = None
    while kind != "torch" and exchange is None:
        try:
            exchange = open_engine(world, kind, device)
        except Unavailable as error:
            if everyone[0]["wanted"] == "engine":
                raise ExchangeError(f"{EXCHANGE_VARIABLE}=engine cannot be had: {error}") from error
            kind, why = _NEXT[kind], str(error)
    _log_once(world, kind, why)
    return exchange or _over_torch(world)


def _over_torch(world):
    """Made by all ranks, or by none. Raises: ExchangeError."""
    exchange, problem = None, None
    try:
        exchange = TorchExchange(world)
    except (RuntimeError, OSError) as error:
        problem = str(error)
    problems = world.gather(problem, "torch.distributed")
    if not any(problems):
        return exchange
    if exchange is not None:
        exchange.abort("another rank has none")
        exchange.close()
    rank, text = next((rank, text) for rank, text in zip(world.ranks, problems, strict=True) if text)
    raise ExchangeError(f"rank {rank} cannot connect by torch.distributed: {text}")


def choose(reports, ranks=None):
    """("nccl-puts", "nccl", "shm" or "torch", why) from what every rank reports; the same on every rank.

    Raises: ExchangeError, see `open_exchange`.
    """
    wanted = [report["wanted"] for report in reports]
    if len(set(wanted)) > 1 or wanted[0] not in ENGINE_CHOICES:
        raise ExchangeError(
            f"{EXCHANGE_VARIABLE} must be the same on every rank, {' or '.join(filter(None, ENGINE_CHOICES))}: "
            f"got {', '.join(repr(w) for w in wanted)}"
        )
    if wanted[0] == "torch":
        return "torch", f"{EXCHANGE_VARIABLE}=torch"
    kind, why = _best(reports, range(len(reports)) if ranks is None else ranks)
    if kind == "torch" and wanted[0] == "engine":
        raise ExchangeError(f"{EXCHANGE_VARIABLE}=engine cannot be had: {why}; unset it, or set it to torch")
    if wanted[0] == "nccl-puts":
        return _with_puts(reports, kind, why)
    return kind, why


def _with_puts(reports, kind, why):
    if kind != "nccl":
        return kind, f"{why}, and puts are for CUDA tensors"
    if len({report["host"] for report in reports}) > 1:
        return kind, f"{why} on several hosts, and puts are for one"
    return "nccl-puts", f"{EXCHANGE_VARIABLE}=nccl-puts"


def _best(reports, ranks):
    missing = [(rank, report["missing"]) for rank, report in zip(ranks, reports, strict=True) if report["missing"]]
    if missing:
        return "torch", f"rank {missing[0][0]} has no engine: {missing[0][1]}"
    devices = {report["device"] for report in reports}
    if devices == {"cuda"}:
        return "nccl", "CUDA tensors"
    if devices != {"cpu"}:
        return "torch", f"the tensors are on {' and '.join(sorted(devices))}"
    if len({report["host"] for report in reports}) > 1:
        return "torch", "CPU tensors on several hosts"
    return "shm", "CPU tensors on one host"


def _report(device_type):
    """What this rank has to offer."""
    return {
        "wanted": os.environ.get(EXCHANGE_VARIABLE, ""),
        "device": device_type,
        "host": tuple(host()),
        "missing": engine.missing(),
    }


def _log_once(world, kind, why):
    if (kind, why) in _logged:
        return
    _logged.add((kind, why))
    level = logging.WARNING if kind == "torch" and engine.missing() and world.rank == 0 else logging.INFO
    log.log(level, "asyncdiff_fast exchanges by %s: %s", _NAMES[kind], why)
