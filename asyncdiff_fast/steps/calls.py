"""Steps side by side, seen from one rank: a generation's calls of the denoiser and steps of its sampler, in order.

After some exact steps come blocks of n steps. Every rank walks the pipeline's own loop through the block. At its own
step it evaluates the denoiser; at the others the denoiser returns at once, and the sampler steps with a predicted
output instead. At the block's last step the ranks exchange what reached the sampler at their own steps, put the sampler
and its random numbers back to the block's beginning, and step again with the true outputs. So all ranks hold the same
latents after each block, whatever the sampler, and nothing of guidance or of the denoiser need be known.
Source: ParaStep (arXiv 2505.14741); here with outputs shared between ranks, any sampler, and blocks as long as the
errors of the last one allow.
"""

import logging

import torch
from torch.utils._pytree import tree_map_only

from ..calls import watch
from ..calls.clock import Clock
from ..exchange.engine import described
from ..exchange.errors import ExchangeError
from .given import Step
from .plan import StepPlan
from .sampling import Sampling
from .shared import SharedOutputs
from .stats import StepStats

log = logging.getLogger(__name__)


class StepCalls:
    """The steps of one pipeline's denoisers, which share its sampler. A listener of `calls.watch`.

    Args:
        world: the ranks that differ in their step only.
        told: returns the pipeline's own count of steps, or None.
        scheduler: the loop's, if it is not one of diffusers'.
    """

    def __init__(self, config, world, told=lambda: None, scheduler=None):
        self.config, self.world, self._scheduler = config, world, scheduler
        self.exchange = self._shared = self._thread = None
        self.counts, self.interrupted = StepStats(), False
        self._told, self._said = told, set()
        # Told that another rank has ended the generation: stops the pipeline, if it can be.
        self.on_ended = lambda ended: False
        # What the denoisers returned last, by denoiser, call and shapes.
        self._placeholders = {}
        self._output_bytes = None
        self._clock = Clock()
        self._begin()

    def open(self, exchange):
        """Begin to listen to samplers, with an exchange of these ranks."""
        self.exchange, self.interrupted = exchange, False
        self._shared = SharedOutputs(self.world, exchange)
        self._begin()
        watch.listen(self)
        self._unwatch = watch.watch_instance(self._scheduler)

    def forget(self, released=False):
        """Begin anew; if the exchange was `released`, listen no more."""
        self._begin()
        self._clock.end()
        if released:
            watch.unlisten(self)
            self._unwatch()
            self.exchange = self._shared = None

    def plan(self, each=None):
        """The `StepPlan`, once outputs have been seen; `each` is the plan of one call."""
        return None if self._output_bytes is None else StepPlan(self.config, self._output_bytes, each)

    def stats(self):
        """Dict of what was done since `clear_stats`."""
        return self.counts.as_dict()

    @property
    def expects_step(self):
        """True if a generation of these denoisers is under way in this thread."""
        return self._thread == watch.this_thread()

    # Calls of a denoiser.

    def call(self, name, timestep, key, run):
        """What a denoiser returns at this call, or a stand-in where another rank evaluates this step.

        Args:
            name: of the denoiser among those of the pipeline.
            key: changes with the inputs' shapes.
            run: `run(exact)` gives it; `exact` where all ranks evaluate the step, so that what they get is the same.
        """
        tick = self._clock.tick(timestep, key)
        if tick.begins:
            # A pipeline says when its loop ends: this one was left by an exception, and nobody holds its latents.
            if self._told() is None:
                self._end("a new generation began")
            self._begin()
        if tick.call == 0 and self._called and tick.step > 0:
            self._irregular("no scheduler's step was seen between two calls: pass scheduler= to patch()")
        self._step, self._called, self._thread = tick.step, True, watch.this_thread()
        if tick.call == 0:
            self._sampling.begin(tick.step)
        place, block = (name, tick.call, key), self._sampling.block
        if block is not None and not block.is_own(tick.step, self.world.rank):
            kept = self._placeholders.get(place)
            if kept is not None:
                # The caller may write into it.
                return tree_map_only(torch.Tensor, torch.clone, kept)
        with self.exchange.step():
            result = run(block is None)
        self.counts.evaluations += 1
        self._placeholders[place] = tree_map_only(torch.Tensor, lambda x: x.detach().clone(), result)
        return result

    # Steps of the sampler.

    def step(self, scheduler, method, args, kwargs):
        """What `scheduler.step` returns, called from the pipeline's loop."""
        again, self._called = not self._called, False
        if again:
            self._irregular("the sampler steps more than once for each call of the denoiser")
        if self._sampling.exact_because:
            self.counts.exact_steps += 1
            return method(scheduler, *args, **kwargs)
        step = Step(method, scheduler, args, kwargs, self._sampling.results)
        try:
            with self.exchange.step():
                return self._sampling.made(scheduler, step)
        except BaseException as error:
            self.interrupted = True
            if isinstance(error, ExchangeError) and error.ended and self.on_ended(error):
                return step.plain()[0]
            self.world.leave(described(error))
            if isinstance(error, ExchangeError):
                raise self.world.explained(error) from error.__cause__
            raise
        finally:
            self._output_bytes = self._sampling.output_bytes or self._output_bytes
            if self._sampling.block is None and self._step + 1 == self._sampling.num_steps:
                # What steps in this thread after the last one is somebody else's.
                self._thread = None

    # Generations.

    def begin_generation(self):
        """The calls themselves tell when a generation begins."""

    def _begin(self):
        self._thread, self._called, self._step = None, False, -1
        self._placeholders.clear()
        self._sampling = Sampling(self.config, self.world, self._shared, self.counts, self._told, self._say)

    def pipeline_ended(self):
        """The pipeline has ended, whether or not its loop came to its last step."""
        self._end("the loop ended")
        self._begin()
        self._clock.end()

    def _end(self, how):
        """Say it if latents that somebody may hold are predictions."""
        block = self._sampling.block
        if block is not None and block.steps:
            log.warning(
                "%s in the middle of a block of %d steps: the latents of its last %d are predictions, not evaluated",
                how,
                block.length,
                len(block.steps),
            )

    def _irregular(self, what):
        """Calls and steps do not come in turn: exact from here, which in the middle of a block is too late."""
        if self._sampling.block is not None:
            raise RuntimeError(
                f"{what}; this came at step {self._step}, in the middle of steps that run side by side: pass "
                "parallel_steps=1"
            )
        self._sampling.stay_exact(what)

    def _say(self, reason):
        """Why steps are exact from here, once for each reason."""
        if reason not in self._said:
            self._said.add(reason)
            log.info("steps are exact, one after the other: %s", reason)
