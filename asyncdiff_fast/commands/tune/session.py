"""What is drawn next in `tune`, decided on rank 0: exact pictures, fewer exact steps, then ways to share, the most
promising first by the simulation with measured times and links.
"""

import time

from ..report import psnr_db, ssim
from . import choosing
from .choosing import Trial
from .drawing import Task
from .sets import option_sets

# Exact sampling with fewer steps, of those asked for: what one device reaches in less time.
FEWER = (2 / 3, 1 / 2, 1 / 3)
UNPATCHED, PATCHED = "one device, unpatched", "one device"
# Planning and the uncounted pictures take about as long as so many more.
OVERHEAD = 1.5
# Rounds in which those close to the best are drawn again.
FINAL_ROUNDS = 2


class Session:
    """Hands out `Task`s one after the other and takes what came of them.

    Args:
        record: `Record`, saved after every picture.
        prompts: [(number, prompt, seed)].
        aim: `Aim`.
        until: time.time() after which nothing new is begun.
        every: try every set on every prompt.
        prospects: `Prospects` of the sets.
    """

    def __init__(self, record, prompts, num_steps, aim, until, every, num_processes, prospects):
        self.record, self.prompts, self.num_steps, self.aim = record, prompts, num_steps, aim
        self.until, self.every, self._n, self._prospects = until, every, num_processes, prospects
        self._trial = None

    def tasks(self):
        """Generator of (description, `Task`)."""
        unpatched = self.record.add(Trial(UNPATCHED, num_steps=self.num_steps, is_patched=False))
        patched = self.record.add(Trial(PATCHED, num_steps=self.num_steps))
        for trial in (unpatched, patched):
            yield from self._draw(trial)
        fewer = [max(1, round(self.num_steps * share)) for share in FEWER]
        for n in dict.fromkeys(n for n in fewer if n < self.num_steps):
            yield from self._draw(self.record.add(Trial(f"{PATCHED}, {n} steps", num_steps=n)))
        for trial in self._sorted_sets():
            yield from self._draw(trial)
        for _ in range(FINAL_ROUNDS):
            for trial in choosing.finalists(self.record.trials.values(), self.aim, len(self.prompts)):
                if len(trial.seconds) < len(self.prompts) + FINAL_ROUNDS and self._has_time(trial, 1):
                    yield from self._task(trial, self.prompts[:1])
        self.record.running = None
        self.record.save()

    def take(self, number, drawn):
        """A picture of the current task; returns False if no more of it is wanted."""
        trial, exact = self._trial, self.record.picture(UNPATCHED, number)
        if exact is None:
            exact = drawn.picture
        trial.seconds.append(drawn.seconds)
        trial.psnr_db[number] = psnr_db(drawn.picture, exact)
        trial.ssim[number] = ssim(drawn.picture, exact)
        self.record.keep_picture(trial.name, number, drawn.picture)
        if trial.is_shared and not self.every and len(trial.psnr_db) < len(self.prompts):
            trial.left_out = self.aim.give_up(trial, self._best())
        self.record.save()
        return trial.left_out is None

    def ended(self, refused):
        """The current task is over; `refused` is why the pipeline cannot be shared so, or None."""
        if refused is not None:
            self._trial.left_out = refused
        self.record.running = None
        self.record.save()

    def _best(self):
        return choosing.best(self.record.trials.values(), self.aim, len(self.prompts))

    def _draw(self, trial):
        """The task of what a trial has not drawn yet."""
        left = [p for p in self.prompts if p[0] not in trial.psnr_db]
        if trial.left_out is not None or not left:
            return
        # One device comes first, and without it nothing can be said.
        if trial.name != UNPATCHED and not self._has_time(trial, len(left)):
            trial.left_out = choosing.NO_TIME
            return
        yield from self._task(trial, left)

    def _task(self, trial, wanted):
        self._trial = trial
        self.record.running = trial.name
        self.record.save()
        yield trial.name, Task(trial.options, tuple(wanted), trial.num_steps, trial.is_patched)

    def _has_time(self, trial, pictures):
        seconds = trial.picture_s or trial.predicted_s or self._alone_s()
        return time.time() + seconds * (pictures + OVERHEAD) < self.until

    def _alone_s(self):
        found = [t.picture_s for t in self.record.trials.values() if not t.is_shared and t.num_steps == self.num_steps]
        return min((s for s in found if s is not None), default=0.0)

    def _sorted_sets(self):
        """`Trial`s of the sets, the fastest by simulation first; those it says cannot pay are left out."""
        sets = option_sets(self._n, self._prospects.is_guided)
        trials = [
            self.record.add(Trial(s.name, dict(s.options), s.way, self.num_steps, predicted_s=None)) for s in sets
        ]
        for trial, one in zip(trials, sets, strict=True):
            if trial.left_out is None and not trial.seconds:
                trial.predicted_s, trial.left_out = self._prospects.of(one, self.num_steps)
        alone_s = self._alone_s()
        trials.sort(key=lambda t: t.predicted_s if t.predicted_s is not None else float("inf"))
        hopeful = [t for t in trials if t.left_out is None]
        # What the simulation thinks best is measured all the same.
        for trial in () if self.every else hopeful[1:]:
            slow = trial.predicted_s is not None and trial.predicted_s > alone_s * (1 - choosing.WORTH)
            if slow and not trial.seconds:
                trial.left_out = f"would take {trial.predicted_s:.2f} s by simulation, one device {alone_s:.2f} s"
        self.record.save()
        return hopeful
