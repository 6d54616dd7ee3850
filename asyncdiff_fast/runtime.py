"""The state of one patched denoiser: places each call in time, and has it carried out."""

import contextlib
import logging

import torch
from torch.utils._pytree import tree_leaves

from . import fingerprint, schedule
from .buffers import Placeholders
from .clock import Clock, last_scheduler, unwatch_schedulers, watch_schedulers
from .exchange import TorchExchange
from .fused import Fusion
from .modules import Attachment, on_pipeline_end, step_cache, structure
from .op_choice import KernelChoice
from .passes import Pass
from .planning import make_plan
from .schedule import Mode
from .signature import CallSignature
from .timesteps import Timesteps

log = logging.getLogger(__name__)
# Plans kept for inputs seen before, per denoiser.
KEPT_PASSES = 8


class Runtime:
    """One patched denoiser on one rank.

    `plan` is the latest plan (None before the first call), `stats()` what was exchanged, `close()` undoes everything.
    """

    def __init__(self, denoiser, config, world, scheduler=None):
        self.denoiser, self.config, self.world = denoiser, config, world
        self.plan = self.on_refused = None
        self._scheduler = scheduler
        self._signature = CallSignature(denoiser)
        self._clock = Clock()
        self._exchange = TorchExchange(world) if world.size > 1 else None
        self._passes, self._units, self._placeholders = {}, {}, {}
        self._structure = None
        self._active = self._forward_error = None
        self._interrupted, self._phases = False, 0
        self._calls = dict.fromkeys(Mode, 0)
        # Beneath every hook of ours.
        self._fusion = Fusion(denoiser, KernelChoice(config.kernels, world))
        watch_schedulers()
        self._undo_end = on_pipeline_end(denoiser, self._clock.end)
        self._root = Attachment(denoiser, self._call)

    # One call of the denoiser.

    def _call(self, forward, args, kwargs):
        if self._exchange is None or self._active is not None:
            return forward(*args, **kwargs)
        if self._needs_gradients(args, kwargs):
            self._clock.end()
            return forward(*args, **kwargs)
        timestep = self._signature.timestep(args, kwargs)
        signature = self._inputs_key(args, kwargs)
        tick = self._clock.tick(timestep, signature)
        try:
            if tick.begins:
                self._begin_generation(args, kwargs)
            current = self._pass_for(tick, signature, forward, args, kwargs)
            return self._carry_out(current, tick, timestep, forward, args, kwargs)
        except BaseException:
            self._interrupted = True
            self._clock.end()
            raise

    def _carry_out(self, current, tick, timestep, forward, args, kwargs):
        mode = schedule.mode(self.config, tick.step, current.last_step == tick.step - 1)
        offset = self._follow_timesteps(current, mode, tick, timestep)
        current.last_step = tick.step
        self._calls[mode] += 1
        if mode is Mode.REPEAT:
            result = current.repeat()
        else:
            if mode is Mode.COMPUTE:
                args, kwargs = self._retimed(current, offset, timestep, args, kwargs)
            # After warm-up every exact call leaves behind what the next one may read.
            current.begin(mode, keep=tick.step >= self.config.warmup_steps - 1)
            self._active = current
            try:
                result = current.end(forward(*args, **kwargs))
            finally:
                self._active = None
        current.previous_timestep = timestep
        if not current.intact:
            self._forget_plans("its modules or hooks have changed")
            self._clock.end()
        return result

    def _follow_timesteps(self, current, mode, tick, timestep):
        """Keep the place in the scheduler's list up to date; returns the offset this rank computes with."""
        if self.config.stride == 1:
            return schedule.timestep_offset(self.config, self.world.rank, False)
        if mode is Mode.EXACT:
            with self._refusing():
                if tick.step == 0 or current.timesteps is None:
                    current.timesteps = Timesteps(self._scheduler or last_scheduler())
                current.timesteps.see(timestep)
        else:
            current.timesteps.skip()
        return schedule.timestep_offset(self.config, self.world.rank, current.timesteps.is_last)

    def _retimed(self, current, offset, timestep, args, kwargs):
        if offset == 0:
            return args, kwargs
        other = current.previous_timestep if offset < 0 else current.timesteps.following(timestep)
        return self._signature.with_timestep(args, kwargs, other)

    def _run_unit(self, name, forward, args, kwargs):
        if self._active is None:
            return forward(*args, **kwargs)
        return self._active.run_unit(name, forward, args, kwargs)

    # The beginning of a generation.

    def _begin_generation(self, args, kwargs):
        if step_cache(self.denoiser):
            raise ValueError(
                "a step cache of diffusers was enabled after patch(): both reuse activations; call disable_cache()"
            )
        mine = {
            "inputs": fingerprint.input_digests(self._signature.named(args, kwargs)),
            "interrupted": self._interrupted,
        }
        everyone = self.world.gather(mine, "the start of a generation")
        if any(report["interrupted"] for report in everyone):
            self._restart_exchange()
        self._compare_inputs([report["inputs"] for report in everyone])
        now = structure(self.denoiser)
        if now != self._structure:
            if self._structure is not None:
                self._forget_plans("modules were added or replaced")
            self._structure = now
        for current in self._passes.values():
            current.last_step = -1

    def _compare_inputs(self, inputs):
        first = inputs[0]
        for rank, theirs in enumerate(inputs):
            different = sorted(n for n in {*first, *theirs} if first.get(n) != theirs.get(n))
            if different:
                raise ValueError(
                    f"every rank must call the denoiser with the same inputs: {', '.join(different)} differ between "
                    f"rank 0 and rank {rank}; use the same prompt, size and seed on all ranks "
                    "(generator=torch.Generator().manual_seed(0))"
                )

    def _restart_exchange(self):
        """After an exception inside a call, messages are left half-way: begin again with a new group."""
        self._exchange.abort("interrupted")
        self._exchange.close()
        self._exchange = TorchExchange(self.world)
        self._passes.clear()
        self._interrupted = False

    def _forget_plans(self, why):
        log.info("%s is traced again: %s", type(self.denoiser).__name__, why)
        for current in self._passes.values():
            self._exchange.release(current.phase)
        self._passes.clear()
        for attachment in self._units.values():
            attachment.remove()
        self._units.clear()
        self.plan = None

    # Plans.

    def _pass_for(self, tick, signature, forward, args, kwargs):
        key = (tick.call, signature)
        if key not in self._passes:
            known = None
            if self.plan is not None:
                known = {u.key: s for u, s in zip(self.plan.graph.units, self.plan.division.owner, strict=True)}
            with self._refusing(), self._fusion.choice.learning():
                plan = make_plan(
                    self.denoiser,
                    self._noting(forward),
                    args,
                    kwargs,
                    self.config,
                    self.world,
                    known if tick.call else None,
                )
            self._attach(plan)
            device = next(x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
            placeholders = self._placeholders.setdefault(device, Placeholders(device))
            current = Pass(plan, self.config, self.world.rank, device, placeholders)
            current.bind(self._exchange, f"call {tick.call}, plan {self._phases}")
            self._phases += 1
            self._passes[key] = current
            if tick.call == 0:
                self.plan = plan
            self._evict(tick)
        return self._passes[key]

    @contextlib.contextmanager
    def _refusing(self):
        """What this denoiser cannot be patched with shows at its first call at the latest: then leave it as it was."""
        try:
            yield
        except (ValueError, TypeError) as error:
            if self.on_refused is not None and error is not self._forward_error:
                self.on_refused()
            raise

    def _noting(self, forward):
        """The forward; an error of its own is not one of ours."""

        def run(*args, **kwargs):
            try:
                return forward(*args, **kwargs)
            except Exception as error:
                self._forward_error = error
                raise

        return run

    def _evict(self, tick):
        for key in list(self._passes)[:-KEPT_PASSES]:
            if tick.step == 0 and self._passes[key].last_step < 0:
                self._exchange.release(self._passes.pop(key).phase)

    def _attach(self, plan):
        modules = dict(self.denoiser.named_modules())
        for name in dict.fromkeys(unit.name for unit in plan.graph.units):
            if name not in self._units:

                def handler(forward, args, kwargs, name=name):
                    return self._run_unit(name, forward, args, kwargs)

                self._units[name] = Attachment(modules[name], handler)

    def _inputs_key(self, args, kwargs):
        """Changes when cached values no longer fit: structure, shapes, dtypes and flags of the inputs, not numbers."""
        kind = next((x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)), "cpu")
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return autocast, _key((args, kwargs))

    def _needs_gradients(self, args, kwargs):
        if not torch.is_grad_enabled():
            return False
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        return any(x.requires_grad for x in (*tensors, *self.denoiser.parameters()))

    def stats(self):
        """Dict: calls by mode, bytes sent and time waited by this rank, since `clear_stats`; kernels in use."""
        calls = {f"{mode.name.lower()}_calls": n for mode, n in self._calls.items()}
        calls["kernels"] = self._fusion.summary()
        return calls | (self._exchange.stats() if self._exchange is not None else {})

    def clear_stats(self):
        """Begin to count anew."""
        self._calls = dict.fromkeys(Mode, 0)
        if self._exchange is not None:
            self._exchange.clear_stats()

    def close(self):
        """Take every hook off and free every buffer; the denoiser is as it was."""
        self._root.remove()
        self._undo_end()
        for attachment in self._units.values():
            attachment.remove()
        self._units.clear()
        self._fusion.remove()
        unwatch_schedulers()
        if self._exchange is not None:
            if self._interrupted:
                self._exchange.abort("interrupted")
            self._exchange.close()
        self._passes.clear()


def _key(x):
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.dtype, x.device
    if isinstance(x, list | tuple):
        return tuple(_key(item) for item in x)
    if isinstance(x, dict):
        return tuple((name, _key(item)) for name, item in sorted(x.items()))
    if isinstance(x, bool | str) or x is None:
        return x
    return type(x).__name__
