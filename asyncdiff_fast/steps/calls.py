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
import time

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ..calls import watch
from ..calls.clock import Clock
from ..exchange.engine import described
from ..exchange.errors import ExchangeError
from ..exchange.fingerprint import input_digests
from .block import Block, relative_error
from .given import TIMESTEP, Step
from .lengths import Lengths
from .loop import num_steps
from .outputs import Outputs, evaluated
from .plan import StepPlan
from .shared import SharedOutputs
from .snapshot import Draws, Snapshot
from .stats import StepStats
from .unable import starts_slowly, why_not

log = logging.getLogger(__name__)
CHANGED = "the latents are changed between two steps"


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
        if tick.call == 0 and self._block is None:
            self._block = self._next_block(tick.step)
        place = name, tick.call, key
        if self._block is not None and not self._block.is_own(tick.step, self.world.rank):
            kept = self._placeholders.get(place)
            if kept is not None:
                # The caller may write into it.
                return tree_map_only(torch.Tensor, torch.clone, kept)
        with self.exchange.step():
            result = run(self._block is None)
        self.counts.evaluations += 1
        self._placeholders[place] = tree_map_only(torch.Tensor, lambda x: x.detach().clone(), result)
        return result

    def _next_block(self, step):
        """The block that begins at a step; None for an exact step."""
        if self._exact_because or self._lengths is None or not self._outputs:
            return None
        length = self._lengths.at(step, self._num_steps - step)
        if length > 1 and not self._alike:
            self._compare()
        return Block(step, length) if length > 1 and self._alike else None

    def _compare(self):
        """Steps run side by side only where all ranks' samplers do the same. Collective, once a generation."""
        named = {**self._latest.named, "result": self._results[0]}
        states = [g.get_state() for g in tree_leaves(named) if isinstance(g, torch.Generator)]
        try:
            everyone = self.world.gather(input_digests({**named, "generator": states}), "the sampler's steps")
        except ExchangeError as error:
            # Of failures within calls of the denoiser, whoever carries them out says why.
            raise self.world.explained(error) from error
        different = {n for theirs in everyone for n in {*theirs, *everyone[0]} if theirs.get(n) != everyone[0].get(n)}
        self._alike = not different
        if different:
            self._stay_exact(f"the sampler's step is given other values on other ranks: {', '.join(sorted(different))}")

    # Steps of the sampler.

    def step(self, scheduler, method, args, kwargs):
        """What `scheduler.step` returns, called from the pipeline's loop."""
        again, self._called = not self._called, False
        if again:
            self._irregular("the sampler steps more than once for each call of the denoiser")
        if self._exact_because:
            self.counts.exact_steps += 1
            return method(scheduler, *args, **kwargs)
        step = Step(method, scheduler, args, kwargs, self._results)
        try:
            with self.exchange.step():
                return self._exact(scheduler, step) if self._block is None else self._in_block(scheduler, step)
        except BaseException as error:
            self.interrupted = True
            if isinstance(error, ExchangeError) and error.ended and self.on_ended(error):
                return step.plain()[0]
            self.world.leave(described(error))
            if isinstance(error, ExchangeError):
                raise self.world.explained(error) from error.__cause__
            raise
        finally:
            if self._block is None and self._step + 1 == self._num_steps:
                # What steps in this thread after the last one is somebody else's.
                self._thread = None

    def _exact(self, scheduler, step):
        """A step that every rank has evaluated. All take the first one's output: devices may round differently."""
        self.counts.exact_steps += 1
        self._look(scheduler, step)
        if self._exact_because or starts_slowly(scheduler):
            result, self._results = step.plain()
            return result
        output = self._shared.all(step.output)[0]
        said = evaluated(scheduler, step, output)
        guess = self._tried(scheduler, step, said) if self._outputs else None
        result, self._results = step.run(output)
        self._outputs.add(said)
        self._latest, self._output_bytes = step, output.nbytes
        if guess is not None:
            self._lengths.learn([float(relative_error(guess, self._results[0]))])
        return result

    def _tried(self, scheduler, step, said):
        """The latents that a prediction of this step's output would have led to; the sampler is as before."""
        snapshot, draws = Snapshot(scheduler), Draws(step.named, step.sample.device)
        _, results = step.run(self._outputs.ahead(1, said))
        snapshot.restore(scheduler)
        draws.restore(draws.used())
        return results[0]

    def _look(self, scheduler, step):
        """Whether steps like this one can be replayed, and how many there will be."""
        reason = step.reason or why_not(scheduler)
        if reason is None and not step.follows:
            reason = CHANGED
        if reason is None and self._num_steps is None:
            self._num_steps = num_steps(scheduler, step.named.get(TIMESTEP), self._told())
            if self._num_steps is None:
                reason = "neither the pipeline nor the scheduler tells how many steps there are"
        if reason is not None:
            self._stay_exact(reason)
        elif self._lengths is None:
            self._lengths = Lengths(self.world.size, self.config.least_warmup, self.config.tolerance)

    def _in_block(self, scheduler, step):
        block = self._block
        if block.steps and not step.follows:
            return self._cut_short(scheduler, step)
        block.take(scheduler, step, self.world.rank)
        if block.is_complete:
            return self._replay(scheduler)
        expected = self._outputs.ahead(len(block.steps), evaluated(scheduler, step))
        result, self._results = block.tried(expected)
        return result

    def _replay(self, scheduler):
        """The block's steps again, with what its ranks have evaluated. Collective; returns the last one's result."""
        began = time.perf_counter()
        block, self._block = self._block, None
        result, self._results, used, errors = block.replay(scheduler, self._shared.all(block.own))
        for said in used:
            self._outputs.add(said)
        self._lengths.learn(errors)
        self.counts.block(block.length, errors, time.perf_counter() - began)
        return result

    def _cut_short(self, scheduler, step):
        """Latents were replaced in the middle of a block: what came before is replayed, what comes after is exact.

        What the ranks have evaluated of this step is of the new latents already.
        """
        block, self._block = self._block, None
        expected, number = self._results[0], len(block.steps)
        outputs = self._shared.all(step.output if number == self.world.rank else block.own)
        _, results, _, _ = block.replay(scheduler, outputs)
        log.warning(
            "the latents were changed at step %d, between steps that run side by side: they were made from predicted "
            "ones, %.1e from what they should have been; from here every step is exact. Pass parallel_steps=1 for "
            "callbacks that change latents",
            self._step,
            float(relative_error(expected, results[0])),
        )
        self.counts.cut_short += 1
        self._stay_exact(CHANGED)
        result, self._results = step.run(outputs[number])
        return result

    # Generations.

    def begin_generation(self):
        """The calls themselves tell when a generation begins."""

    def _begin(self):
        self._thread, self._called = None, False
        self._step, self._block, self._results = -1, None, None
        self._latest, self._alike = None, False
        self._placeholders.clear()
        self._outputs, self._lengths, self._num_steps, self._exact_because = Outputs(), None, None, ""

    def pipeline_ended(self):
        """The pipeline has ended, whether or not its loop came to its last step."""
        self._end("the loop ended")
        self._begin()
        self._clock.end()

    def _end(self, how):
        """Say it if latents that somebody may hold are predictions."""
        if self._block is not None and self._block.steps:
            log.warning(
                "%s in the middle of a block of %d steps: the latents of its last %d are predictions, not evaluated",
                how,
                self._block.length,
                len(self._block.steps),
            )

    def _irregular(self, what):
        """Calls and steps do not come in turn: exact from here, which in the middle of a block is too late."""
        if self._block is not None:
            raise RuntimeError(
                f"{what}; this came at step {self._step}, in the middle of steps that run side by side: pass "
                "parallel_steps=1"
            )
        self._stay_exact(what)

    def _stay_exact(self, reason):
        self._exact_because = reason
        self.counts.exact_because[reason] = self.counts.exact_because.get(reason, 0) + 1
        if reason not in self._said:
            self._said.add(reason)
            log.info("steps are exact, one after the other: %s", reason)
