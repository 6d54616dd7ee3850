"""The steps of a sampler in one generation: exact ones, and blocks of steps that run side by side and are replayed."""

import logging
import time

import torch
from torch.utils._pytree import tree_leaves

from ..exchange.errors import ExchangeError
from ..exchange.fingerprint import input_digests
from .block import Block, relative_error
from .given import TIMESTEP
from .lengths import Lengths
from .loop import num_steps
from .outputs import Outputs, evaluated
from .snapshot import Draws, Snapshot
from .unable import starts_slowly, why_not

log = logging.getLogger(__name__)
CHANGED = "the latents are changed between two steps"


class Sampling:
    """One generation's steps; `block` is the one under way, None in exact steps.

    `results` are the tensors of the latest step; `exact_because` says why all that follow are exact, if they are.

    Args:
        shared: `SharedOutputs` of the ranks of `world`.
        counts: `StepStats`.
        told: returns the pipeline's own count of steps, or None.
        stays_exact: told the reason once steps can no more run side by side.
    """

    def __init__(self, config, world, shared, counts, told, stays_exact):
        self._config, self._world, self._shared, self._counts = config, world, shared, counts
        self._told, self._stays_exact = told, stays_exact
        self.block = self.results = self.num_steps = self.output_bytes = self._latest = self._lengths = None
        self.exact_because, self._alike, self._outputs = "", False, Outputs()
        self._step, self._measured = 0, None

    def begin(self, step_idx):
        """The first call of a step: it is exact, or in a block, which may begin here. Collective once."""
        self._step = step_idx
        if self.block is None:
            self.block = self._next_block(step_idx)

    def made(self, scheduler, step):
        """What a `Step` that the pipeline makes returns. Collective in exact steps and at the end of a block."""
        return self._exact(scheduler, step) if self.block is None else self._in_block(scheduler, step)

    def stay_exact(self, reason):
        """From here steps are exact, one after the other."""
        self.exact_because = reason
        self._counts.exact_because[reason] = self._counts.exact_because.get(reason, 0) + 1
        self._stays_exact(reason)

    def _next_block(self, step):
        """The block that begins at a step; None for an exact step."""
        if self.exact_because or self._lengths is None or not self._outputs:
            return None
        if self._measured is not None:
            error, ahead = self._measured
            self._measured = None
            self._lengths.learn(float(error), ahead)
        length = self._lengths.at(step, self.num_steps - step)
        if length > 1 and not self._alike:
            self._compare()
        return Block(step, length) if length > 1 and self._alike else None

    def _compare(self):
        """Steps run side by side only where all ranks' samplers do the same. Collective, once a generation."""
        named = {**self._latest.named, "result": self.results[0]}
        states = [g.get_state() for g in tree_leaves(named) if isinstance(g, torch.Generator)]
        try:
            everyone = self._world.gather(input_digests({**named, "generator": states}), "the sampler's steps")
        except ExchangeError as error:
            # Of failures within calls of the denoiser, whoever carries them out says why.
            raise self._world.explained(error) from error
        different = {n for theirs in everyone for n in {*theirs, *everyone[0]} if theirs.get(n) != everyone[0].get(n)}
        self._alike = not different
        if different:
            self.stay_exact(f"the sampler's step is given other values on other ranks: {', '.join(sorted(different))}")

    def _exact(self, scheduler, step):
        """A step that every rank has evaluated. All take the first one's output: devices may round differently."""
        self._counts.exact_steps += 1
        self._look(scheduler, step)
        if self.exact_because or starts_slowly(scheduler):
            result, self.results = step.plain()
            return result
        output = self._shared.first(step.output)
        said, measured = evaluated(scheduler, step, output), bool(self._outputs) and self._decides()
        guess = self._tried(scheduler, step, said) if measured and self._world.rank == 0 else None
        result, self.results = step.run(output)
        self._outputs.add(said)
        self._latest, self.output_bytes = step, output.nbytes
        if measured:
            self._measure(relative_error(self.results[0] if guess is None else guess, self.results[0]), 1)
        return result

    def _decides(self):
        """True if what comes next may be a block, whose length depends on the latest error."""
        following = self._step + 1
        return following >= self._config.least_warmup and self.num_steps - following > 1

    def _measure(self, error, ahead):
        """Keep the first rank's error, a scalar on its device, until the next step begins. Collective.

        All decide by the same number: on devices that round differently each would decide by itself, and where two took
        blocks of different lengths they would wait for each other for ever. Nobody waits for it here: the sampler's
        kernels and what the pipeline does between two steps may still be under way.
        """
        self._measured = self._shared.first(error), ahead

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
        if reason is None and self.num_steps is None:
            self.num_steps = num_steps(scheduler, step.named.get(TIMESTEP), self._told())
            if self.num_steps is None:
                reason = "neither the pipeline nor the scheduler tells how many steps there are"
        if reason is not None:
            self.stay_exact(reason)
        elif self._lengths is None:
            self._lengths = Lengths(self._world.size, self._config.least_warmup, self._config.tolerance)

    def _in_block(self, scheduler, step):
        block = self.block
        if block.steps and not step.follows:
            return self._cut_short(scheduler, step)
        block.take(scheduler, step, self._world.rank)
        if block.is_complete:
            return self._replay(scheduler)
        expected = self._outputs.ahead(len(block.steps), evaluated(scheduler, step))
        result, self.results = block.tried(expected)
        return result

    def _replay(self, scheduler):
        """The block's steps again, with what its ranks have evaluated. Collective; returns the last one's result."""
        began = time.perf_counter()
        block, self.block = self.block, None
        result, self.results, used, errors = block.replay(scheduler, self._shared.all(block.own))
        for said in used:
            self._outputs.add(said)
        if self._decides():
            self._measure(errors[-1], len(errors))
        self._counts.block(block.length, errors, time.perf_counter() - began)
        return result

    def _cut_short(self, scheduler, step):
        """Latents were replaced in the middle of a block: what came before is replayed, what comes after is exact.

        What the ranks have evaluated of this step is of the new latents already.
        """
        block, self.block = self.block, None
        expected, number = self.results[0], len(block.steps)
        outputs = self._shared.all(step.output if number == self._world.rank else block.own)
        _, results, _, _ = block.replay(scheduler, outputs)
        log.warning(
            "the latents were changed at step %d, between steps that run side by side: they were made from predicted "
            "ones, %.1e from what they should have been; from here every step is exact. Pass parallel_steps=1 for "
            "callbacks that change latents",
            block.first + number,
            float(relative_error(expected, results[0])),
        )
        self._counts.cut_short += 1
        self.stay_exact(CHANGED)
        result, self.results = step.run(outputs[number])
        return result
