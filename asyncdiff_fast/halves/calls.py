"""Classifier-free guidance on two ranks: each computes one half, of the batch or of the two calls between two steps."""

import logging
from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from ..calls.signature import device_of
from ..exchange import wire
from ..exchange.slots import Recv, Send
from ..modules import own, structure
from .cuts import silent, size_of
from .trees import fresh
from .trials import Trials

log = logging.getLogger(__name__)


class Unguided(ValueError):
    """A call without guidance: refused, though the denoiser stays patched."""


class Halves:
    """The half of one denoiser's guidance that this rank computes (0 or 1).

    A batch of even size is cut in two. Otherwise the pipeline calls twice between steps: call 0 belongs to half 0,
    call 1 to half 1. From the second step on both are computed at call 0, since what call 1 will be given is known: it
    differs from call 0 as it did at the step before; call 1 then only checks that, and returns the result. Where the
    model itself is changed between the two, as guiders do, they are computed in turn. A step with one call is half 0's.
    """

    def __init__(self, shared, world, exchange):
        self.denoiser, self.world, self.exchange = shared.denoiser, world, exchange
        self.half = world.rank
        self._signature = shared.signature
        self._slots, self._phases = {}, 0
        # {place: (how its arguments are cut, those of them that were zero, how results are joined)}
        self._cuts = {}
        # Whether any guidance was seen: ever, and in this generation (None at its begin).
        self._ever_guided, self._was_guided = False, None
        self._device = None
        self.begin_generation()

    def begin_generation(self):
        """Forget what the calls of an earlier generation were given."""
        if self._was_guided is False:
            log.warning(
                "cfg_parallel: %s was called without guidance in the last generation, so nothing was shared",
                type(self.denoiser).__name__,
            )
        self._was_guided = None
        # {call: its arguments} of the latest step; what call 1 will be given; and its result.
        self._given, self._expected, self._kept = {}, None, None
        # The model as it was at each call of the latest step.
        self._models = {}

    def forget(self, released=False):
        """Drop all buffers; the slots too, unless they are `released`."""
        for slot, _, _ in () if released else self._slots.values():
            self.exchange.release(slot.phase)
        self._slots.clear()
        self._cuts.clear()
        self.begin_generation()

    def call(self, tick, key, forward, run, args, kwargs, guided=True):
        """What the denoiser returns for both halves. Collective over the two.

        Args:
            tick: the call's place in time.
            key: changes with the inputs' shapes.
            forward: the denoiser's own, for a first comparison.
            run: `run(tick, args, kwargs)` computes one half.
            guided: False if the pipeline says that it uses no guidance.
        Raises: `Unguided` if the pipeline says that there is nothing to share out; ValueError if a half of the batch
            does not give what the whole gives.
        """
        latent = self._signature.latent(args, kwargs)
        # Weights may be elsewhere, as offloaded ones are.
        size, self._device = size_of(latent), device_of((latent,), {})
        if size % 2 == 0 and size:
            self._ever_guided = self._was_guided = True
            with self.exchange.step():
                return self._on_batch(size, key, forward, run, tick, args, kwargs)
        if not (guided or self._ever_guided or tick.call):
            raise Unguided(
                f"cfg_parallel needs classifier-free guidance, in one batch of even size or in two calls for each "
                f"step: got a batch of {size} and a pipeline that uses none; pass a guidance_scale above 1, or "
                "unpatch() and patch() with cfg_parallel=False"
            )
        self._was_guided = bool(self._was_guided or tick.call)
        self._ever_guided |= self._was_guided
        with self.exchange.step():
            return self._on_calls(tick, key, run, args, kwargs)

    # One batch of two halves.

    def _on_batch(self, size, key, forward, run, tick, args, kwargs):
        named, place = self._signature.named(args, kwargs), ("batch", tick.call, key)
        cut, zeros, join = self._cuts.get(place, (None, (), None))
        if cut is None or (zeros and silent(named, size, zeros) != zeros):
            # What was zero at first, as of a network that begins later, said nothing of its rows.
            def whole(named):
                as_args, as_kwargs = self._signature.as_call(named, args, kwargs)
                return forward(*as_args, **as_kwargs)

            latent_name = self._signature.latent_in(named)
            cut, join = Trials(self.world, own(self.denoiser), whole, named, size, latent_name).decide()
            log.info("cfg_parallel cuts of %s: %s", type(self.denoiser).__name__, cut)
            self._cuts[place] = cut, silent(named, size), join
        mine = self._signature.as_call(cut.half(self.half, named), args, kwargs)
        return join.together(*self._share(place, run(tick, *mine), (0, 1)))

    # Two calls between two steps.

    def _on_calls(self, tick, key, run, args, kwargs):
        # A forward may empty the lists that it is given.
        named = fresh(self._signature.named(args, kwargs))
        model = structure(own(self.denoiser))
        if tick.call == 0:
            same_model = self._models.get(0) == self._models.get(1) == model
            self._expected = _foreseen(self._given, named) if same_model else None
            self._given, self._models, self._kept = {0: named}, {0: model}, None
            if self._expected is not None:
                mine = (args, kwargs)
                if self.half == 1:
                    mine = self._signature.as_call(fresh(self._expected), args, kwargs)
                result = run(replace(tick, call=self.half), *mine)
                first, self._kept = self._share(("calls", key), result, (0, 1))
                return first
        else:
            self._given[tick.call], self._models[tick.call] = named, model
            foreseen = self._kept is not None and model == self._models[0]
            if tick.call == 1 and foreseen and _same(self._expected, named):
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
        with torch.inference_mode(False):
            buffers = {h: [x.empty(self._device) for x in tree_leaves(spec) if isinstance(x, _Like)] for h in senders}
        sends = [Send(1 - self.half, (x,)) for x in buffers.get(self.half, ())]
        recvs = [Recv(1 - self.half, (x,)) for x in buffers.get(1 - self.half, ())]
        slot = self.exchange.slot("result", sends, recvs, depth=1)
        self.exchange.freeze(f"halves, plan {self._phases}")
        self._phases += 1
        return slot, spec, buffers


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
