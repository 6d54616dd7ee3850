"""Small denoisers on patches: a few steps, and what became of them."""

import time

import patch_nets
import torch

import asyncdiff_fast

TIMES = (900, 700, 500, 300, 100)


class Attending(patch_nets.Net):
    """A convolution, a norm, attention over all, a convolution."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.GroupNorm(4, patch_nets.WIDTH)

    def mix(self, h, t):
        h = self.norm(h) + t / 1000
        return h + self.picture(torch.nn.functional.scaled_dot_product_attention(*self.heads(h)), h)


def attending():
    """An `Attending`, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attending().eval().requires_grad_(False)


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return patch_nets.NETS[name]().eval().requires_grad_(False)


@torch.no_grad()
def predictions(net, size=(16, 8), batch=1, change=None, times=TIMES, seed=0, dtype=torch.float32):
    """Of a few steps; `change(step, x)` may give another latent."""
    x = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = []
    for step, t in enumerate(times):
        x = x if change is None else change(step, x)
        found.append(net(x, t))
        x = x - 0.2 * found[-1]
    return found


def difference(a, b):
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


def _state(model):
    return {name: set(vars(m)) for name, m in model.named_modules()}


def outcome(model, run, **options):
    """What `run()` gives on a patched model, or (type, message, seconds, what was left) of its refusal."""
    before, began = _state(model), time.monotonic()
    try:
        asyncdiff_fast.patch(model, **{"num_patches": 2, "timeout_s": 60} | options)
        found = run()
    except Exception as error:
        found = type(error).__name__, str(error), time.monotonic() - began
        left = [name for name, m in model.named_modules() if set(vars(m)) != before[name]]
        if "_asyncdiff_fast" in vars(model):
            asyncdiff_fast.unpatch(model)
        return *found, left
    asyncdiff_fast.unpatch(model)
    return found


def twice(net, steps, **options):
    """(How far they are from those unpatched, their results) of two generations on patches, `steps(net, seed)` each;
    the refusal in place of both. The second has other inputs of the same shapes.
    """

    def both():
        return [y for seed in (0, 1) for y in steps(net, seed)]

    plain = both()
    found = outcome(net, both, **options)
    return (difference(found, plain) if isinstance(found, list) else found), found


def assert_refused(outcomes, *words, kind="ValueError"):
    for rank, found in enumerate(outcomes):
        assert isinstance(found, tuple), f"rank {rank} was not refused"
        name, message, seconds, left = found
        assert name == kind, f"rank {rank}: {name}: {message}"
        assert all(word in message for word in words), f"rank {rank}: {message}"
        assert seconds < 30 and not left, f"rank {rank}: {seconds:.0f} s, left {left}"
