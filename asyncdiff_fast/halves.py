"""Classifier-free guidance on two ranks: each computes one half, of the batch or of the two calls between two steps."""

from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from .exchange import wire
from .exchange.slots import Recv, Send

# How far half a batch may be from the same rows of the whole, of the largest element: other kernels for other sizes.
CLOSE = 2e-2


class Halves:
    """The half of one denoiser's guidance that this rank computes (0 or 1).

    A batch of even size is cut in two. Otherwise the pipeline calls twice between steps: call 0 belongs to half 0,
    call 1 to half 1. From the second step on both are computed at call 0, since what call 1 will be given is known: it
    differs from call 0 as it did at the step before; call 1 then only checks that, and returns the result.
    """

    def __init__(self, shared, world, exchange):
        self.denoiser, self.world, self.exchange = shared.denoiser, world, exchange
        self.half = world.rank
        self._signature = shared.signature
        self._slots, self._phases = {}, 0
        # Where guidance was used once, it may end in the middle of a generation: half 0 then computes for both.
        self._was_guided = False
        self.begin_generation()

    def begin_generation(self):
        """Forget what the calls of an earlier generation were given."""
        # {call: its arguments} of the latest step; what call 1 will be given; and its result.
        self._given, self._expected, self._kept = {}, None, None

    def forget(self, released=False):
        """Drop all buffers; the slots too, unless they are `released`."""
        for slot, _, _ in () if released else self._slots.values():
            self.exchange.release(slot.phase)
        self._slots.clear()
        self.begin_generation()

    def call(self, tick, key, forward, run, args, kwargs, guided=True):
        """What the denoiser returns for both halves. Collective over the two.

        Args:
            tick: the call's place in time.
            key: changes with the inputs' shapes.
            forward: the denoiser's own, for a first comparison.
            run: `run(tick, args, kwargs)` computes one half.
            guided: False if the pipeline says that it uses no guidance.
        Raises: ValueError if there is nothing to share out.
        """
        batch = self._signature.latent(args, kwargs).shape[0]
        if batch % 2 == 0:
            self._was_guided = True
            with self.exchange.step():
                return self._on_batch(batch, key, forward, run, tick, args, kwargs)
        self._was_guided |= tick.call > 0
        if not self._was_guided and (not guided or tick.step > 0):
            raise ValueError(
                f"cfg_parallel needs classifier-free guidance, in one batch of even size or in two calls for each "
                f"step: got a batch of {batch} and one call; pass cfg_parallel=False, or a guidance_scale above 1"
            )
        with self.exchange.step():
            return self._on_calls(tick, key, run, args, kwargs)

    # One batch of two halves.

    def _on_batch(self, batch, key, forward, run, tick, args, kwargs):
        cut_args, cut_kwargs = half_of(self.half, batch, args, kwargs)
        if ("batch", tick.call, key) not in self._slots:
            with torch.no_grad():
                self._compare(forward(*args, **kwargs), forward(*cut_args, **cut_kwargs))
        halves = self._share(("batch", tick.call, key), run(tick, cut_args, cut_kwargs), (0, 1))
        leaves, spec = zip(*map(tree_flatten, halves), strict=True)
        pairs = zip(*leaves, strict=True)
        return tree_unflatten([torch.cat(p) if isinstance(p[0], torch.Tensor) else p[0] for p in pairs], spec[0])

    def _compare(self, whole, part):
        """The halves must be what the batch gives."""
        error = 0.0
        for a, b in zip(_tensors(whole), _tensors(part), strict=True):
            fits = a.shape[1:] == b.shape[1:] and a.shape[0] == 2 * b.shape[0]
            mine = a.narrow(0, self.half * b.shape[0], b.shape[0]) if fits else None
            error = max(error, float((mine - b).abs().max() / a.abs().max().clamp(min=1e-12)) if fits else torch.inf)
        worst = max(self.world.gather(error, "the first result of the CFG halves"))
        if not worst <= CLOSE:
            raise ValueError(
                f"{type(self.denoiser).__name__} gives another result on half of its batch than on the whole (they "
                f"differ by {worst:.1e} of the largest element): pass cfg_parallel=False"
            )

    # Two calls between two steps.

    def _on_calls(self, tick, key, run, args, kwargs):
        named = self._signature.named(args, kwargs)
        if tick.call == 0:
            self._expected = _foreseen(self._given, named)
            self._given, self._kept = {0: named}, None
            if self._expected is not None:
                mine = (args, kwargs) if self.half == 0 else self._signature.as_call(self._expected, args, kwargs)
                result = run(replace(tick, call=self.half), *mine)
                first, self._kept = self._share(("calls", key), result, (0, 1))
                return first
        else:
            self._given[tick.call] = named
            if tick.call == 1 and self._kept is not None and _same(self._expected, named):
                return self._kept
        owner = tick.call % 2
        result = run(tick, args, kwargs) if self.half == owner else None
        return self._share(("call", owner, key), result, (owner,))[owner]

    # Exchange.

    def _share(self, place, result, senders):
        """[result of half 0, of half 1] on both, of those halves that send; own tensors are not copied. Collective."""
        if place not in self._slots:
            self._slots[place] = self._bound(place, result, senders)
        slot, spec, buffers = self._slots[place]
        found = [None, None]
        if self.half in senders:
            self.exchange.acquire(slot)
            for buffer, x in zip(buffers[self.half], _tensors(result), strict=True):
                buffer.copy_(x)
        self.exchange.post(slot)
        self.exchange.wait(slot)
        for half in senders:
            found[half] = result if half == self.half else _filled(spec, buffers[half])
        return found

    def _bound(self, place, result, senders):
        """(slot, structure of a result, {half: buffers})."""
        mine = None if result is None else _told(tree_map(_Like.of, result))
        spec = _heard(next(s for s in self.world.gather(mine, "the structure of a result") if s is not None))
        device = next(self.denoiser.parameters()).device
        with torch.inference_mode(False):
            buffers = {h: [x.empty(device) for x in tree_leaves(spec) if isinstance(x, _Like)] for h in senders}
        sends = [Send(1 - self.half, (x,)) for x in buffers.get(self.half, ())]
        recvs = [Recv(1 - self.half, (x,)) for x in buffers.get(1 - self.half, ())]
        slot = self.exchange.slot("result", sends, recvs, depth=1)
        self.exchange.freeze(f"halves, plan {self._phases}")
        self._phases += 1
        return slot, spec, buffers


def half_of(half, batch, args, kwargs):
    """(args, kwargs) of one half: of every tensor whose first dimension is the batch, or frames of it."""

    def cut(x):
        frames = x.dim() >= 3 and x.shape[0] % batch == 0
        if x.dim() == 0 or not (x.shape[0] == batch or frames):
            return x
        size = x.shape[0] // 2
        return x.narrow(0, half * size, size)

    return tree_map_only(torch.Tensor, cut, (args, kwargs))


@wire.register
@dataclass(frozen=True)
class _Like:
    """Stands for a tensor of a result."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x):
        """For tensors; anything else stands for itself."""
        return cls(tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x

    def empty(self, device):
        """A tensor of this kind."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def _told(tree):
    """A tree of plain leaves as ranks tell it each other: only classes that torch knows as trees come back."""
    leaves, spec = tree_flatten(tree)
    try:
        return treespec_dumps(spec), leaves
    except NotImplementedError as error:
        raise ValueError(
            f"cfg_parallel cannot pass on what the denoiser returns ({error}): return tensors, a tuple, a "
            "dict or an output class of diffusers, or pass cfg_parallel=False"
        ) from None


def _heard(told):
    spec, leaves = told
    return tree_unflatten(leaves, treespec_loads(spec))


def _filled(spec, buffers):
    """A result with copies of the buffers in it: a scheduler may keep a prediction for longer than they do."""
    received = iter(buffers)
    return tree_map(lambda x: next(received).clone() if isinstance(x, _Like) else x, spec)


def _foreseen(given, named):
    """What call 1 will be given after a call 0 with `named`, by what both were given at the step before; or None."""
    if 1 not in given:
        return None
    now, _ = tree_flatten(named)
    (before, spec), (other, other_spec) = tree_flatten(given[0]), tree_flatten(given[1])
    if spec != other_spec or len(now) != len(before):
        return None
    return tree_unflatten([n if _equal(o, b) else o for n, b, o in zip(now, before, other, strict=True)], other_spec)


def _same(a, b):
    (left, spec), (right, other_spec) = tree_flatten(a), tree_flatten(b)
    return spec == other_spec and all(map(_equal, left, right))


def _equal(a, b):
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and (a is b or a == b)
    if a is b:
        return True
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
