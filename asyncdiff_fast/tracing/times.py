"""How long each unit of a denoiser takes, on the device."""

import math
import time

import torch
from torch.utils._pytree import tree_map_only

from . import side_effects
from .trace import copied_whole


def measure(denoiser, forward, keys, args, kwargs, repeats):
    """Seconds of each unit, the least of `repeats` forwards on copies of the inputs.

    Args:
        keys: (name, call) of each unit.
    Returns: dict of key to seconds.
    """
    modules, wanted, best, calls, started = dict(denoiser.named_modules()), set(keys), {}, {}, {}
    cuda = any(p.is_cuda for p in denoiser.parameters())

    def now():
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def enter(name):
        started[name] = now()

    def leave(name):
        key = (name, calls.get(name, 0))
        calls[name] = key[1] + 1
        if key in wanted:
            best[key] = min(best.get(key, math.inf), now() - started[name])

    handles = []
    for name in {name for name, _ in wanted}:
        handles.append(modules[name].register_forward_pre_hook(lambda m, a, name=name: enter(name)))
        handles.append(modules[name].register_forward_hook(lambda m, a, o, name=name: leave(name)))
    try:
        for _ in range(repeats):
            calls.clear()
            copies = tree_map_only(torch.Tensor, copied_whole, (args, kwargs))
            with torch.no_grad(), side_effects.restored(denoiser):
                forward(*copies[0], **copies[1])
    finally:
        for handle in handles:
            handle.remove()
    return best
