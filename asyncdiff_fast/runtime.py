"""A patched denoiser: times and routes each of its calls, through CFG halves, patches and stages.

Everything that ranks must agree on is agreed on here: at the first call of a generation, and at new plans.
"""

import contextlib
import functools
import logging
from dataclasses import replace

import torch
from torch.utils._pytree import tree_leaves

from .calls.containers import Given, opened, opening
from .calls.schedule import Mode, PatchMode
from .calls.signature import CallSignature, copied, device_of, inputs_key
from .calls.watch import unwatch_schedulers, watch_schedulers
from .exchange.world import device
from .fused.device_layers import DeviceLayers
from .generations import Generations
from .halves.calls import Unguided
from .modules import attached, is_compiled, on_pipeline_end, own, step_cache, structure, told
from .parts import Parts
from .shared import Shared

log = logging.getLogger(__name__)


class Runtime:
    """One patched denoiser on one rank.

    `plan` is the latest plan (None before the first call), `stats()` what was exchanged, `close()` undoes everything.
    """

    def __init__(self, denoiser, config, world, scheduler=None, steps=None, number=0, pipeline=lambda: None):
        self.denoiser, self.config, self.world = denoiser, config, world
        # The steps of the pipeline, and which of its denoisers this is.
        self._steps, self._number = steps, number
        self.on_refused = self._forward_error = self._structure = None
        # The `Decoder` of the pipeline's autoencoder, where it is shared.
        self.decoder = None
        self._pipeline = pipeline
        # What was compiled as a whole keeps its layers.
        inside = replace(config, kernels="torch") if is_compiled(denoiser) else config
        self._signature = CallSignature(own(denoiser))
        where = _device(denoiser)
        # Beneath every hook of ours.
        self._layers = DeviceLayers(denoiser, inside, world, where.type, self._signature)
        shared = Shared(denoiser, config, self._signature, self._layers.packed, self._layers.choice, scheduler)
        try:
            self._parts = Parts(shared, world, where, steps)
        except BaseException:
            self._layers.remove()
            raise
        self._generations = Generations(world, denoiser, pipeline, scheduler, alike_to_the_end=not config.run_ahead)
        if steps is not None:
            steps.on_ended = self._generations.stop
        # The result of the latest call.
        self._last = None
        self._calls = dict.fromkeys(Mode, 0)
        watch_schedulers()
        self._undo_end = on_pipeline_end(own(denoiser), self._end)
        self._root = attached(denoiser, self._entry())
        # As it was at the last generation, or is now.
        self._was = structure(denoiser)

    def _entry(self):
        """What the denoiser's forward runs."""

        # Looked up at each call: a profile puts something in its place.
        def call(*given):
            return self._call(*given)

        # Sites of patches are found by what torch's functions are called with, which a compiled whole would not show.
        return torch.compiler.disable(call) if self.config.num_patches > 1 else call

    @property
    def plan(self):
        """The latest plan, None before the first call; `patching.plan` says of which classes."""
        return self._parts.plan

    @property
    def exchange_kind(self):
        """How slots travel: "nccl", "shm" or "torch.distributed"; None on one device."""
        return self._parts.exchange_kind

    @property
    def is_sharded(self):
        """True if this rank holds a part of the weights only."""
        return self._parts.shards is not None and not self._parts.shards.complete

    def gather_weights(self):
        """Bring the weights that other ranks hold back to this one. Collective over the stages."""
        if self.is_sharded:
            self._parts.shards.gather()

    # One call of the denoiser.

    def _call(self, forward, args, kwargs):
        alone = self.world.size == 1
        if self._generations.is_inside or (alone and (not self._layers.keeps or self._generations.is_taken)):
            return forward(*args, **kwargs)
        forward, (args, kwargs) = opening(forward), opened((args, kwargs))
        if self._needs_gradients(args, kwargs):
            if self.is_sharded:
                raise ValueError(
                    "calls with gradients need all weights on every rank: got shard_weights=True; call within "
                    "torch.no_grad(), or unpatch() first"
                )
            self._end()
            return forward(*args, **kwargs)
        key = inputs_key(args, kwargs)
        timestep = self._signature.timestep(args, kwargs)
        tick = self._generations.tick(timestep, key, lambda: self._signature.named(args, kwargs))
        try:
            if tick.begins:
                self._begin_generation(args, kwargs)
            self._generations.count(tick, self._signature.latent(args, kwargs))
            whole = functools.partial(self._on_halves, tick, key, forward, args, kwargs)
            self._last = whole() if self._steps is None else self._steps.call(self._number, timestep, key, whole)
            return self._last
        except BaseException as error:
            self._generations.fail(error, has_result=self._last is not None)
            # The pipeline makes nothing more of it.
            return self._last
        finally:
            self._generations.leave()

    def _end(self):
        """The pipeline has ended, or calls follow that are none of ours."""
        self._generations.end()
        if not self._generations.interrupted:
            self._parts.drop_begun()
        self._last = None
        if self._steps is not None:
            self._steps.pipeline_ended()

    def _guided(self):
        """Whether the pipeline uses guidance, where it tells."""
        return getattr(self._pipeline(), "do_classifier_free_guidance", True)

    def _on_halves(self, tick, key, forward, args, kwargs):
        """This call, shared by the halves of guidance: of all steps, or of this rank's."""
        if self._parts.halves is None:
            return self._on_patches(tick, key, forward, args, kwargs)

        def run(tick, args, kwargs):
            return self._on_patches(tick, inputs_key(args, kwargs), forward, args, kwargs)

        with self._planning(forward, parts=True) as quiet:
            return self._parts.halves.call(tick, key, quiet, run, args, kwargs, self._guided())

    def _on_patches(self, tick, key, forward, args, kwargs):
        """This call, shared by the patches: of the whole batch, or of this rank's half of the guidance."""
        if self._parts.patches is None:
            return self._on_stages(tick, key, forward, args, kwargs)
        with self._planning(forward, parts=True) as quiet:
            counted = self._parts.patches.hooks.counted(quiet)

            def run(args, kwargs):
                return self._on_stages(tick, inputs_key(args, kwargs), counted, args, kwargs)

            return self._parts.patches.call(tick, key, quiet, run, args, kwargs)

    def _on_stages(self, tick, key, forward, args, kwargs):
        """This call, shared by the stages: of the whole picture, or of this rank's patch."""
        kept = self._layers.during(forward, self._signature.latent)
        sharing = self._parts.stages or self._parts.pipeline
        if sharing is None:
            result, mode = kept(*args, **kwargs), Mode.EXACT
            if self._parts.patches is not None and self._parts.patches.mode is not PatchMode.SYNC:
                mode = Mode.COMPUTE
        else:
            alone = self._parts.patches is self._parts.halves is self._parts.pipeline is None
            planning = functools.partial(self._planning, forward, learning=alone)
            result, mode = sharing.call(tick, key, planning, kept, args, kwargs)
        self._calls[mode] += 1
        return result

    @contextlib.contextmanager
    def _planning(self, forward, learning=False, parts=False):
        """What this denoiser cannot be patched with shows at its first call at the latest: then leave it as it was.

        Yields the forward, such that an error of its own is told from one of ours. With `learning` all ranks run the
        same forward in it, so that kernels can be chosen for it.
        """

        def quiet(*args, **kwargs):
            args, kwargs = copied(args, kwargs)
            named = self._signature.named(args, kwargs)
            given = Given(named)
            try:
                result = forward(*args, **kwargs)
                written = given.written(named) if parts else ()
            except Exception as error:
                self._forward_error = error
                raise
            finally:
                given.restore()
            if written:
                raise ValueError(
                    f"{type(own(self.denoiser)).__name__} puts something into its arguments ({', '.join(written)}), of "
                    "which each rank would have its own part only: make it a result, or use num_stages or "
                    "parallel_steps instead"
                )
            return result

        try:
            with self._layers.learning() if learning else contextlib.nullcontext():
                yield quiet
        except (ValueError, TypeError) as error:
            refused = error is not self._forward_error and not isinstance(error, Unguided)
            # Without its weights a denoiser cannot be left as it was.
            if self.on_refused is not None and refused and not self.is_sharded:
                self.on_refused()
            raise

    # The beginning of a generation.

    def _begin_generation(self, args, kwargs):
        if self.world.size == 1:
            self._layers.begin()
            return
        if step_cache(self.denoiser):
            raise ValueError(
                "a step cache of diffusers was enabled after patch(): both reuse activations; call disable_cache()"
            )
        where = device_of(args, kwargs)

        now = structure(self.denoiser)

        def state():
            return {
                "modules": (now != self._was, told(self.denoiser)),
                "interrupted": self._steps is not None and self._steps.interrupted,
                # The weights were elsewhere at `patch`, or have been moved since.
                "moved": where is not None and _placed(where) != self._parts.device,
            }

        everyone = self._generations.begin(self._signature.named(args, kwargs), state)
        self._layers.begin()
        self._last = None
        if not self._generations.is_whole(everyone):
            self._parts.restart("interrupted")
            self._generations.interrupted = False
        elif any(report["moved"] for report in everyone):
            self._parts.device = self._parts.device if where is None else _placed(where)
            self._parts.restart()
        self._generations.check(everyone)
        self._was = now
        if now != self._structure:
            if self._structure is not None:
                log.info("%s is traced again: modules were added or replaced", type(self.denoiser).__name__)
                self._parts.drop_begun()
                # The last one's hooks lie on top.
                for part in reversed(list(self._parts)):
                    part.forget()
            self._structure = now
        for part in self._parts:
            part.begin_generation()

    def _needs_gradients(self, args, kwargs):
        if not torch.is_grad_enabled():
            return False
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        return any(x.requires_grad for x in (*tensors, *self.denoiser.parameters()))

    def stats(self):
        """Dict: calls by mode, bytes sent and time waited by this rank, since `clear_stats`; kernels in use; and the
        latest relative errors of what was predicted, and of reuse, by what it is (waits for the device).
        """
        calls = {f"{mode.name.lower()}_calls": n for mode, n in self._calls.items()}
        return calls | {"kernels": self._layers.summary()} | self._parts.stats()

    def clear_stats(self):
        """Begin to count anew."""
        self._calls = dict.fromkeys(Mode, 0)
        if self._steps is not None:
            self._steps.counts.clear()
        for part in self._parts:
            part.exchange.clear_stats()

    def close(self, why=None):
        """Take every hook off and free every buffer; the denoiser is as it was. `why` if it ends by a failure."""
        self._root.remove()
        self._undo_end()
        unwatch_schedulers()
        self._generations.end()
        try:
            self._parts.close(why or ("interrupted" if self._generations.interrupted else None))
        finally:
            self._layers.remove()


def _device(denoiser):
    """Where a denoiser will run, as far as its weights and hooks tell."""
    target = getattr(getattr(denoiser, "_hf_hook", None), "execution_device", None)
    if target is None:
        target = next((x.device for x in denoiser.parameters() if x.device.type != "meta"), device())
    return _placed(torch.device(target))


def _placed(where):
    """A device with its number."""
    return torch.device("cuda", torch.cuda.current_device()) if str(where) == "cuda" else where
