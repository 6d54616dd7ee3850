"""Steps side by side in one process, the plain way: the truth for ranks that evaluate one step of each block.

Every step's output is computed, at the latents that the rank of that step would have; samplers are deep copies. No
stand-ins, no exchange, no links between steps.
"""

import copy
import functools
import inspect
import itertools

import torch

from asyncdiff_fast.steps.levels import level


class Simulation:
    """Gives one scheduler a `step` that follows the rule for `most` ranks; `restart()` begins a new generation.

    Args:
        num_steps: of the loop, or a function that tells.
    """

    def __init__(self, scheduler, most, warmup_steps, tolerance, num_steps):
        self.scheduler, self.most, self.warmup_steps, self.tolerance = scheduler, most, warmup_steps, tolerance
        self.num_steps = num_steps
        self.restart()

    def restart(self):
        self.step_idx, self.outputs, self.error, self.block, self.lengths = 0, [], None, [], []

    def __enter__(self):
        self.restart()

        # Pipelines look at the signature.
        @functools.wraps(self.scheduler.step)
        def step(*args, **kwargs):
            return self._step(*args, **kwargs)

        self.scheduler.step = step
        return self

    def __exit__(self, *_):
        del self.scheduler.step

    def place(self):
        """Which rank evaluates the step that is to come; None if all do."""
        length = self.length if self.block else self._length()
        return None if length == 1 else len(self.block)

    def _run(self, scheduler, given, **changed):
        method = type(scheduler).step
        return method(scheduler, **{**given, **changed})

    def _copy(self):
        step = vars(self.scheduler).pop("step")
        try:
            return copy.deepcopy(self.scheduler)
        finally:
            self.scheduler.step = step

    def _expected(self, ahead, scheduler, given):
        at, said = _level(scheduler, given), self._said(ahead)
        return said if at is None else (said - at.of_sample * given["sample"]) / at.of_output

    def _said(self, ahead):
        last = self.outputs[-1]
        if len(self.outputs) < 3:
            return last
        changes = [b - a for a, b in itertools.pairwise(self.outputs)]
        shares = []
        for i in range(len(last)):
            over = sum(float((b[i] * a[i]).sum()) for a, b in itertools.pairwise(changes))
            under = sum(float(a[i].square().sum()) for a in changes[:-1])
            shares.append(0.7 * min(max(over / max(under, 1e-38), 0.0), 1.0))
        share = torch.tensor(shares).view(-1, *[1] * (last.dim() - 1))
        return last + sum(share**i for i in range(1, ahead + 1)) * changes[-1]

    def _length(self):
        total = self.num_steps() if callable(self.num_steps) else self.num_steps
        if self.step_idx < self.warmup_steps or self.error is None or self._slow():
            return 1
        fitting = [n for n in range(2, self.most + 1) if self.error * (n - 1) * n / 2 <= self.tolerance]
        longest = 1
        for n in range(2, self.most + 1):
            if n not in fitting:
                break
            longest = n
        return min(longest, total - self.step_idx)

    def _slow(self):
        prk = getattr(self.scheduler, "prk_timesteps", None)
        return prk is not None and self.scheduler.counter < len(prk)

    def _step(self, *args, **kwargs):
        names = list(inspect.signature(type(self.scheduler).step).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        if not self.block:
            self.length = self._length()
            self.start, self.first = self._copy(), self.step_idx
        self.step_idx += 1
        self.block.append((given, given["model_output"].clone(), given["sample"].clone(), _random(given)))
        if self.length == 1:
            return self._single()
        if len(self.block) < self.length:
            expected = self._expected(len(self.block), self.scheduler, given)
            return self._run(self.scheduler, given, model_output=expected)
        return self._again()

    def _single(self):
        (given, output, _, random), self.block = self.block[0], []
        self.lengths.append(1)
        guess = None
        if self._slow():
            return self._run(self.scheduler, given)
        if self.outputs:
            expected = self._expected(1, self.start, given)
            guess = _first(self._run(self.start, given, model_output=expected))
            _set(given, random)
        at = _level(self.scheduler, given)
        result = self._run(self.scheduler, given)
        if guess is not None:
            self.error = _relative(guess, _first(result))
        self._add(output, given["sample"], at)
        return result

    def _again(self):
        block, self.block = self.block, []
        self.lengths.append(len(block))
        scheduler, result, before = self.start, None, None
        for given, output, sample, random in block:
            _set(given, random)
            changed, at = {"model_output": output, "sample": sample}, _level(scheduler, given)
            if before is not None:
                changed["sample"] = before.to(sample)
                self.error = _relative(sample, before)
                if at is not None:
                    output = output + at.slope * (changed["sample"] - sample)
                    changed["model_output"] = output
                if "old_pred_original_sample" in given:
                    changed["old_pred_original_sample"] = result[1]
            result = self._run(scheduler, given, **changed)
            before = _first(result)
            self._add(output, changed["sample"], at)
        self.error /= (len(block) - 1) * len(block) / 2
        step = vars(self.scheduler).pop("step")
        vars(self.scheduler).clear()
        vars(self.scheduler).update(vars(scheduler))
        self.scheduler.step = step
        return result

    def _add(self, output, sample, at):
        said = output if at is None else at.of_sample * sample + at.of_output * output
        self.outputs = [*self.outputs[-5:], said]


def _level(scheduler, given):
    same = given["model_output"].shape == given["sample"].shape
    return level(scheduler, given["timestep"]) if same else None


def _first(result):
    return result[0] if isinstance(result, tuple) else result.prev_sample


def _relative(guess, truth):
    return max(float((g - t).norm() / t.norm()) for g, t in zip(guess, truth, strict=True))


def _generators(given):
    found = given.get("generator")
    return [g for g in (found if isinstance(found, list) else [found]) if g is not None]


def _random(given):
    return torch.get_rng_state(), [g.get_state() for g in _generators(given)]


def _set(given, random):
    torch.set_rng_state(random[0])
    for generator, state in zip(_generators(given), random[1], strict=True):
        generator.set_state(state)
