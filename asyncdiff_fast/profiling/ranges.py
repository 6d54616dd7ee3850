"""What a profile names: methods that are wrapped in ranges of torch's profiler, and are their own again afterwards."""

import contextlib
import functools

from torch.profiler import record_function

from ..calls import watch
from ..calls.schedule import Mode, PatchMode
from ..exchange.engine import Engine
from ..exchange.over_torch import TorchExchange
from ..exchange.world import World
from ..patches.hooks import Hooks
from ..patches.patch import Patch
from ..pipelined.calls import PipelineCalls
from ..pipelined.micro import MicroStep
from ..runtime import Runtime
from ..stages.calls import StageCalls
from ..stages.passes import Pass
from ..steps.sampling import Sampling
from .words import AGREE, BLOCK, CALL, MICRO, POST, REPLAY, SAMPLER, SITE, STALE, UNIT, WAIT, text


@contextlib.contextmanager
def named():
    """Within it everything below has its range."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in _WRAPPED]
    for owner, name, wrap in _WRAPPED:
        setattr(owner, name, wrap(vars(owner)[name]))
    try:
        yield
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)


def _ranged(name_of):
    """A wrapper: a method within the range `name_of(its arguments)`."""

    def wrap(method):
        @functools.wraps(method)
        def run(*args, **kwargs):
            with record_function(name_of(*args, **kwargs)):
                return method(*args, **kwargs)

        return run

    return wrap


def _marked(name_of):
    """A wrapper: after a method comes the mark `name_of(its result, its arguments)`, unless that is None."""

    def wrap(method):
        @functools.wraps(method)
        def run(*args, **kwargs):
            result = method(*args, **kwargs)
            name = name_of(result, *args)
            if name is not None:
                with record_function(name):
                    pass
            return result

        return run

    return wrap


def _post(exchange, slot):
    ranks = exchange.world.ranks
    to = ",".join(f"{ranks[send.peer]}:{send.buffers[0].nbytes}" for send in slot.sends)
    return text(POST, slot.name, phase=slot.phase, epoch=slot.epoch, to=to)


def _wait(exchange, slot, lag=0):
    return text(WAIT, slot.name, phase=slot.phase, epoch=slot.epoch - 1 - lag, peers=_peers(exchange, slot.recvs))


def _acquire(exchange, slot):
    return text(WAIT, f"{slot.name}, sent before", phase=slot.phase, peers=_peers(exchange, slot.sends))


def _drain(exchange, phases=None):
    return text(WAIT, "everything under way")


def _peers(exchange, moves):
    return ",".join(dict.fromkeys(str(exchange.world.ranks[move.peer]) for move in moves))


def _agree(world, value, what):
    return text(AGREE, what, peers=",".join(str(rank) for rank in world.ranks if rank != world.name))


def _site(patch, index, *_):
    return text(SITE, patch.plan.sites[index].label)


def _stale(result, *_):
    return None if result[1] is Mode.EXACT else text(STALE)


def _displaced(result, hooks, patch, signature, mode, *_):
    return text(STALE) if mode in (PatchMode.DISPLACED, PatchMode.FROZEN) else None


def _block(block, *_):
    return (
        None
        if block is None
        else text(BLOCK, f"steps {block.first} to {block.first + block.length - 1}", n=block.length)
    )


_UNIT = _ranged(lambda owner, name, *_: text(UNIT, name))
_WRAPPED = (
    (Runtime, "_call", _ranged(lambda runtime, *_: text(CALL, type(runtime.denoiser).__name__))),
    (watch, "_carried_out", _ranged(lambda method, scheduler, *_: text(SAMPLER, type(scheduler).__name__))),
    (Pass, "_computed", _UNIT),
    (MicroStep, "_spared", _UNIT),
    (Patch, "_at_site", _ranged(_site)),
    (PipelineCalls, "micro_step", _ranged(lambda calls, p, *_: text(MICRO, p))),
    (Sampling, "_replay", _ranged(lambda *_: text(REPLAY, "the sampler's steps"))),
    (Sampling, "_next_block", _marked(_block)),
    (StageCalls, "call", _marked(_stale)),
    (PipelineCalls, "call", _marked(_stale)),
    (Hooks, "on_patch", _marked(_displaced)),
    (World, "begin", _ranged(_agree)),
    (World, "gather", _ranged(_agree)),
    *((kind, "post", _ranged(_post)) for kind in (Engine, TorchExchange)),
    *((kind, "wait", _ranged(_wait)) for kind in (Engine, TorchExchange)),
    *((kind, "acquire", _ranged(_acquire)) for kind in (Engine, TorchExchange)),
    *((kind, "drain", _ranged(_drain)) for kind in (Engine, TorchExchange)),
)
