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
from .sent import CUT, Sent
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
        # What ranks have sent each other last, and the first one's error: neither is waited for yet.
        self._step, self._sent, self._measured = 0, None, None

    def begin(self, step_idx):
        """The first call of a step: it is exact, or in a block, which may begin here. Collective once."""
        self._step = step_idx
        self._check_sent()
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
        error, ahead = self._measured
        if ahead > 0:
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
        reason = "" if self.exact_because else self._look(scheduler, step)
        # Only this one may be so on one rank alone.
        told = reason in (None, CHANGED) and not starts_slowly(scheduler)
        outputs, numbers = self._shared.numbered(step.output, CUT if reason else 0) if told else ((), None)
        if reason:
            self.stay_exact(reason)
        if self.exact_because or not told:
            result, self.results = step.plain()
            if told:
                self._over(Sent(self._world, numbers))
            return result
        output = outputs[0]
        said, measured = evaluated(scheduler, step, output), bool(self._outputs) and self._decides()
        guess = self._tried(scheduler, step, said) if measured and self._world.rank == 0 else None
        result, self.results = step.run(output)
        error = None if guess is None else relative_error(guess, self.results[0])
        self._outputs.add(said)
        self._latest, self.output_bytes = step, output.nbytes
        self._over(Sent(self._world, numbers, alike=outputs), error, ahead=int(measured))
        return result

    def _decides(self):
        """True if what comes next may be a block, whose length depends on the latest error."""
        following = self._step + 1
        return following >= self._config.least_warmup and self.num_steps - following > 1

    def _over(self, sent, error=None, ahead=0):
        """An exact step or a block is over: all get the first rank's error, of latents predicted so many steps ahead.

        All decide by the same number: on devices that round differently each would decide by itself, and where two took
        blocks of different lengths they would wait for each other for ever. Nobody waits for it here, nor for what was
        sent: the sampler's kernels and what the pipeline does between two steps may still be under way. Collective.
        """
        like = self.results[0]
        error = torch.zeros((), device=like.device) if error is None else error.float()
        self._sent, self._measured = sent, (self._shared.first(error), ahead)
        if self.num_steps is None or self._step + 1 >= self.num_steps:
            # No other step may come.
            self._check_sent()

    def _check_sent(self):
        """See whether the ranks are where the others are. Raises: ValueError on all ranks."""
        sent, self._sent = self._sent, None
        if sent is not None:
            sent.check()

    def _tried(self, scheduler, step, said):
        """The latents that a prediction of this step's output would have led to; the sampler is as before."""
        snapshot, draws = Snapshot(scheduler), Draws(step.named, step.sample.device)
        _, results = step.run(self._outputs.ahead(1, said))
        snapshot.restore(scheduler)
        draws.restore(draws.used())
        return results[0]

    def _look(self, scheduler, step):
        """Why steps from this one on cannot be replayed, None if they can; and how many there will be."""
        reason = step.reason or why_not(scheduler)
        if reason is None and not step.follows:
            reason = CHANGED
        if reason is None and self.num_steps is None:
            self.num_steps = num_steps(scheduler, step.named.get(TIMESTEP), self._told())
            if self.num_steps is None:
                reason = "neither the pipeline nor the scheduler tells how many steps there are"
        if reason is None and self._lengths is None:
            self._lengths = Lengths(self._world.size, self._config.least_warmup, self._config.tolerance)
        return reason

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
        outputs, numbers = self._shared.numbered(block.own, block.length)
        result, self.results, used, errors = block.replay(scheduler, outputs)
        for said in used:
            self._outputs.add(said)
        self._over(Sent(self._world, numbers, block), errors[-1], len(errors))
        self._counts.block(block.length, errors, time.perf_counter() - began)
        return result

    def _cut_short(self, scheduler, step):
        """Latents were replaced in the middle of a block: what came before is replayed, what comes after is exact.

        What the ranks have evaluated of this step is of the new latents already.
        """
        block, self.block = self.block, None
        expected, number = self.results[0], len(block.steps)
        outputs, numbers = self._shared.numbered(step.output if number == self._world.rank else block.own, number)
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
        self._over(Sent(self._world, numbers, block))
        return result
