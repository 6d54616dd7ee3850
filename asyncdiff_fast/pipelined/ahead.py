"""The next call's first patches, made from this call's predictions before the sampler has been given them.

While the last patches of a call pass through the later stages, the first stages have nothing to do. But what lies
between two calls works element by element with most samplers: so the rows of a patch at the next step follow from its
prediction alone. `Ahead` learns from calls that have been what the pipeline and its sampler do in between: how halves
of guidance are put together, what a step makes of the result, what the next call is given. It foretells each call, and
is believed once it has foretold one to the last bit; whatever was foretold is compared with the call that comes.
"""

from typing import NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_leaves

from ..calls import watch
from ..calls.timesteps import Timesteps
from ..steps.given import OUTPUT, SAMPLE, TIMESTEP, Step, tensors
from ..steps.snapshot import Draws, Snapshot
from ..versions import version

# Numbers of guidance are written with as many digits.
DIGITS = 6


class Combination(NamedTuple):
    """How the denoiser's result becomes what the sampler is given: `scale` of guidance by halves, or None."""

    scale: float | None
    channels: int

    def __call__(self, raw):
        """Of a result, or of rows of it."""
        raw = raw[:, : self.channels] if raw.dim() > 3 else raw
        if self.scale is None:
            return raw
        without, guided = raw.chunk(2)
        return without + self.scale * (guided - without)


def combination(raw, output):
    """The `Combination` that makes `output` of `raw` to the last bit, or None."""
    channels = output.shape[1]
    if raw.shape == output.shape:
        return Combination(None, channels) if torch.equal(raw, output) else None
    plain = Combination(None, channels)
    if plain(raw).shape == output.shape:
        return plain if torch.equal(plain(raw), output) else None
    if plain(raw).shape != (2 * len(output), *output.shape[1:]):
        return None
    without, guided = plain(raw).double().chunk(2)
    change = guided - without
    scale = float((change * (output.double() - without)).sum() / change.square().sum())
    for digits in range(DIGITS + 1):
        found = Combination(round(scale, digits), channels) if scale == scale else None
        if found is not None and torch.equal(found(raw), output):
            return found
    return None


class Ahead:
    """What is known of one generation's sampler; an observer of `calls.watch`.

    `why` it is not to be foretold any more, `is_believed` once a call was.
    """

    def __init__(self, signature):
        self._signature = signature
        self.begin()

    def begin(self):
        """A generation begins."""
        self.why, self.foretold, self.is_believed = "", None, False
        self._thread = self._timesteps = self._combination = self._raw = None
        self._scheduler = self._sample = self._step = None

    def came(self, tick, args, kwargs):
        """A call has come: True if it is the one that was foretold."""
        foretold, self.foretold = self.foretold, None
        self._thread = watch.this_thread()
        agrees = foretold is not None and tick.call == 0 and foretold.is_call(args, kwargs)
        if self.is_believed and not agrees and not self.why:
            self.why = "a call was given something else than its sampler's step foretells"
        self.is_believed = agrees
        if tick.call:
            self.why = "more than one call of the denoiser belongs to a step"
        self._follow(args, kwargs)
        return agrees

    def _follow(self, args, kwargs):
        """Find this call's timestep in the sampler's list."""
        scheduler = watch.last_scheduler()
        try:
            if self._timesteps is None and scheduler is not None:
                self._timesteps = Timesteps(scheduler)
            if self._timesteps is not None:
                self._timesteps.see(self._signature.timestep(args, kwargs))
        except ValueError:
            self.why = "timesteps are not those of the sampler's list"

    def foretell(self, args, kwargs, dim, rows):
        """A `Foretold` next call, to be told the predictions of its first patches; None if it cannot be known.

        Args:
            dim, rows: of the denoiser's result and its latent: where rows lie, and (start, stop) of each patch.
        """
        known = None not in (self._sample, self._combination, self._timesteps)
        if self.why or not known or self._timesteps.is_last:
            return None
        latent = self._signature.latent(args, kwargs)
        if self._sample.shape[1:] != latent.shape[1:] or len(latent) % len(self._sample):
            self.why = "the sampler's latents are not laid out as the denoiser's"
            return None
        self.foretold = Foretold(self, args, kwargs, dim, rows)
        return self.foretold

    def returned(self, result):
        """This call has given that."""
        self._raw = next(x for x in tree_leaves(result) if isinstance(x, torch.Tensor)).clone()

    # As an observer.

    def stepping(self, scheduler, method, args, kwargs):
        """The sampler is about to step."""
        if self._thread != watch.this_thread() or self._raw is None:
            return
        step = Step(method, scheduler, args, kwargs)
        if step.reason is not None:
            self.why = step.reason
            return
        self._scheduler, self._method, self._step = scheduler, method, step
        if self._combination is None:
            self._combination = combination(self._raw, step.output)

    def stepped(self, result):
        """It has returned that."""
        if self._thread == watch.this_thread() and self._step is not None and self._raw is not None:
            self._sample, self._raw = tensors(result)[0], None

    # What the sampler will do.

    def next_latent(self, raw, like, dim, start, stop):
        """Rows of the next call's latent, from those of this call's result; None if they do not follow from them."""
        sample = self._sample
        twin = _on_rows(self._scheduler, sample.shape, dim, start, stop)
        times, index = self._scheduler.timesteps, self._timesteps.index
        now = times[index] if isinstance(self._step.named[TIMESTEP], torch.Tensor) else times[index].item()
        rows = sample.narrow(dim, start, stop - start)
        named = {**self._step.named, OUTPUT: self._combination(raw), SAMPLE: rows, TIMESTEP: now}
        draws = Draws(named, rows.device)
        with watch.aside():
            made = tensors(self._method(twin, **named))[0]
        used = draws.used()
        if used:
            draws.restore(used)
            self.why = "the sampler draws random numbers"
            return None
        if hasattr(twin, "scale_model_input"):
            made = twin.scale_model_input(made, times[index + 1])
        return torch.cat([made] * (len(like) // len(made))).to(like.dtype)

    def next_timestep(self, timestep):
        """The next call's, as this one's is given."""
        return self._timesteps.following(timestep)


class Foretold:
    """The next call as it will be, as far as predictions have come."""

    def __init__(self, ahead, args, kwargs, dim, rows):
        signature = ahead._signature
        self._ahead, self._signature, self._dim, self.rows = ahead, signature, dim, rows
        self._latent, self._told = signature.latent(args, kwargs).clone(), 0
        timestep = signature.timestep(args, kwargs)
        given = signature.with_timestep(args, kwargs, ahead.next_timestep(timestep))
        self.call = signature.with_latent(*given, self._latent)
        self._versions = [version(x) for x in tree_leaves(self.call)]

    def tell(self, raw):
        """The next patch's prediction."""
        if self._ahead.why:
            return
        start, stop = self.rows[self._told]
        rows = self._latent.narrow(self._dim, start, stop - start)
        made = self._ahead.next_latent(raw, rows, self._dim, start, stop)
        if made is not None:
            rows.copy_(made)
            self._told += 1

    def is_call(self, args, kwargs):
        """True if a call is what was foretold, in the rows that were."""
        latent = self._signature.latent(args, kwargs)
        if not isinstance(latent, torch.Tensor) or latent.shape != self._latent.shape or self._told < len(self.rows):
            return False
        for start, stop in self.rows:
            mine, theirs = (x.narrow(self._dim, start, stop - start) for x in (self._latent, latent))
            if not torch.equal(mine, theirs):
                return False
        mine, spec = tree_flatten(self.call)
        theirs, other = tree_flatten((tuple(args), kwargs))
        return spec == other and all(
            b is latent or _same(a, b, was) for a, b, was in zip(mine, theirs, self._versions, strict=True)
        )


def _same(mine, theirs, was):
    """Whether an argument is what it was; `was`: its version then."""
    if isinstance(mine, torch.Tensor):
        if mine is theirs:
            return version(mine) == was
        alike = isinstance(theirs, torch.Tensor) and mine.shape == theirs.shape and mine.dtype == theirs.dtype
        return alike and version(mine) == was and torch.equal(mine, theirs)
    return mine is theirs or (type(mine) is type(theirs) and mine == theirs)


def _on_rows(scheduler, shape, dim, start, stop):
    """A copy of a scheduler; of what it keeps of whole latents it has these rows."""
    twin = object.__new__(type(scheduler))
    Snapshot(scheduler, lambda x: x.narrow(dim, start, stop - start) if x.shape == shape else x).restore(twin)
    return twin
