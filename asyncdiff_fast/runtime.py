"""A patched denoiser: times each of its calls and sends it on its route, through CFG halves, patches and stages.

Everything that ranks must agree on is agreed on here: at the first call of a generation, and at new plans.
"""

import logging
from dataclasses import replace

import torch
from torch.utils._pytree import tree_leaves

from .advice import Advice
from .calls.containers import opened, opening
from .calls.schedule import Mode
from .calls.signature import CallSignature, device_of, inputs_key
from .calls.watch import unwatch_schedulers, watch_schedulers
from .exchange.engine import described
from .exchange.world import device
from .fused.device_layers import DeviceLayers
from .generations import Generations
from .halves.trees import fresh
from .hooks import attached, on_pipeline_end
from .modules import is_compiled, own, step_cache
from .parts import Parts
from .route import Route
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
        self._structure = None
        # The `Decoder` of the pipeline's autoencoder, where it is shared.
        self.decoder = None
        self._pipeline = pipeline
        # What was compiled as a whole keeps its layers.
        inside = replace(config, kernels="torch") if is_compiled(denoiser) else config
        self._signature = CallSignature(own(denoiser))
        where = _device(denoiser)
        # Beneath every hook of ours.
        self._layers = DeviceLayers(denoiser, inside, world, where.type, self._signature)
        layers = self._layers.packed, self._layers.choice
        shared = Shared(denoiser, config, self._signature, *layers, scheduler, self._layers.graphs)
        try:
            self._parts = Parts(shared, world, where, steps)
        except BaseException:
            self._layers.remove()
            raise
        self._generations = Generations(world, denoiser, pipeline, scheduler, alike_to_the_end=not config.run_ahead)
        if steps is not None:
            steps.on_ended = self._generations.stop
        self._advice = Advice(config, type(own(denoiser)).__name__, world.rank)
        # The result of the latest call.
        self._last = None
        self.route = Route(denoiser, self._parts, self._layers, self._signature, pipeline)
        watch_schedulers()
        self._undo_end = on_pipeline_end(own(denoiser), self._end)
        self._root = attached(denoiser, self._entry())

    def __repr__(self):
        size = self.world.size
        where = "one device" if size == 1 else f"rank {self.world.rank} of {size}, {self.config.ways}"
        return f"<Runtime of {type(own(self.denoiser)).__name__}: {where}>"

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

    def gather_weights(self):
        """Bring the weights that other ranks hold back to this one. Collective over the stages."""
        if self._parts.is_sharded:
            self._parts.shards.gather()

    # One call of the denoiser.

    def _call(self, forward, args, kwargs):
        alone = self.world.size == 1
        if self._generations.is_inside or (alone and (not self._layers.keeps or self._generations.is_taken)):
            return forward(*args, **kwargs)
        forward, (args, kwargs) = opening(forward), opened((args, kwargs))
        if self._needs_gradients(args, kwargs):
            if self._parts.is_sharded:
                raise ValueError(
                    "calls with gradients need all weights on every rank: got shard_weights=True; call within "
                    "torch.no_grad(), or unpatch() first"
                )
            self._advice.gradients()
            self._end()
            return forward(*args, **kwargs)
        key = inputs_key(args, kwargs)
        timestep = self._signature.timestep(args, kwargs)
        tick = self._generations.tick(timestep, key, lambda: self._signature.named(args, kwargs))
        try:
            if tick.begins:
                self._begin_generation(forward, args, kwargs)
            self._advice.call(tick.step)
            self._generations.count(tick, self._signature.latent(args, kwargs))

            def whole(exact):
                return self.route.call(replace(tick, exact=exact), key, forward, args, kwargs)

            steps = self._steps
            self._last = whole(False) if steps is None else steps.call(self._number, timestep, key, whole)
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
        self._gained()
        if not self._generations.interrupted:
            self._parts.drop_begun()
        self._last = None
        if self._steps is not None:
            self._steps.pipeline_ended()

    def abandon(self, error):
        """Tell the other ranks that an exception has left the pipeline, where no call of the denoiser has told it."""
        self._generations.abandon(described(error))

    # The beginning of a generation.

    def _begin_generation(self, forward, args, kwargs):
        if self.world.size == 1:
            self._layers.begin()
            return
        if step_cache(self.denoiser):
            raise ValueError(
                "a step cache of diffusers was enabled after patch(): both reuse activations; call disable_cache()"
            )
        self._gained()
        where = device_of(args, kwargs)

        def state():
            return {
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
        if not self._parts.is_sharded:
            given = self._signature.as_call(fresh(self._signature.named(args, kwargs)), args, kwargs)
            self._generations.check_hooks(everyone, lambda: forward(*given[0], **given[1]))
        now = self._generations.structure
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

    def _gained(self):
        """A generation is over: where nothing was shared, its user hears of it."""
        steps = None if self._steps is None else self._steps.counts
        self._advice.generation_over(self.route.calls, steps, whole=not self._generations.interrupted)

    def _needs_gradients(self, args, kwargs):
        if not torch.is_grad_enabled():
            return False
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        return any(x.requires_grad for x in (*tensors, *self.denoiser.parameters()))

    def stats(self):
        """Dict: calls by mode, bytes sent and time waited by this rank, since `clear_stats`; kernels in use; and the
        latest relative errors of what was predicted, and of reuse, by what it is (waits for the device). A call is
        exact here if nothing in it is of another step; whether its latents were predicted, `["steps"]` says.
        """
        calls = {f"{mode.name.lower()}_calls": n for mode, n in self.route.calls.items()}
        return calls | {"kernels": self._layers.summary()} | self._parts.stats()

    def clear_stats(self):
        """Begin to count anew."""
        self._advice.counts_anew()
        self.route.calls = dict.fromkeys(Mode, 0)
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
