"""What `tune` found, in words: the recommendation, the line to paste, the table, what was left out and why."""

import math

from . import choosing
from .session import UNPATCHED


class Found:
    """The results of a session, ready to be shown.

    `chosen`: the `Trial` to take, None if not even one device was measured. `front`: names on the Pareto front.
    """

    def __init__(self, args, record, aim, num_prompts, place):
        self.args, self.aim, self.num_prompts, self.place = args, aim, num_prompts, place
        self.trials, self._record = list(record.trials.values()), record
        self.link = record.link
        self.drawn = sorted((t for t in self.trials if t.seconds), key=lambda t: t.picture_s)
        self.complete = [t for t in self.drawn if t.is_complete(num_prompts)]
        self.chosen = choosing.best(self.trials, aim, num_prompts)
        self.front = {t.name for t in choosing.front(self.complete)}

    @property
    def alone_s(self):
        """Of one unpatched device."""
        return next((t.picture_s for t in self.drawn if t.name == UNPATCHED), None)

    @property
    def line(self):
        """What to paste."""
        chosen = self.chosen
        if chosen is None:
            return ""
        if chosen.is_shared:
            return f"asyncdiff_fast.patch(pipe, {_as_arguments(chosen.options)})  # {self.args.nproc} processes"
        patch = "asyncdiff_fast.patch(pipe)  # one process" if chosen.is_patched else "# one process, unpatched"
        fewer = chosen.num_steps != self.args.steps
        return patch + (f"; pipe(…, num_inference_steps={chosen.num_steps})" if fewer else "")

    @property
    def best_three(self):
        """The chosen one first, then the next best that share, all complete."""
        rest = [t for t in self.complete if t.name != UNPATCHED and t is not self.chosen]
        rest.sort(key=lambda t: (not self.aim.allows(t), not t.is_shared, self.aim.rank(t)))
        first = [self.chosen] if self.chosen is not None and self.chosen.name != UNPATCHED else []
        return [*first, *rest][:3]

    def picture(self, trial, prompt):
        """The picture that a trial drew of a prompt."""
        return self._record.picture(trial.name, prompt)

    def as_dict(self):
        """The recommendation, fit for JSON."""
        if self.chosen is None:
            return None
        return {
            "name": self.chosen.name,
            "options": self.chosen.options,
            "steps": self.chosen.num_steps,
            "one_device": not self.chosen.is_shared,
            "line": self.line,
            "picture_s": self.chosen.picture_s,
            "speed_up": self.alone_s / self.chosen.picture_s,
            "meets_the_aim": self.aim.allows(self.chosen),
            "front": sorted(self.front),
        }

    def markdown(self):
        """The page."""
        args, chosen = self.args, self.chosen
        wanted = (
            f"at most {self.aim.max_seconds:g} s a picture"
            if self.aim.max_seconds is not None
            else f"at least {self.aim.min_psnr:g} dB in every picture"
        )
        lines = [
            f"# Tuned: {args.nproc} processes, {args.steps} steps, {self.num_prompts} prompts, {self.place.type}",
            "",
            f"Wanted: {wanted}.",
        ]
        if self.link:
            us, gbs = self.link["latency_s"] * 1e6, self.link["gbs"]
            lines.append(f"Link: {us:.0f} µs for a small message, {gbs:.2f} GB/s for large ones.")
        if chosen is not None:
            met = (
                ""
                if self.aim.allows(chosen)
                else " Nothing is as fast as wanted; this is the fastest that drew every prompt."
            )
            lines += [
                "",
                f"**Take {chosen.name}**: {_row_text(chosen, self.alone_s)}.{met}",
                "",
                "```python",
                self.line,
            ]
            lines += ["```"]
        lines += ["", *self._table(), "", *self._left_out()]
        return "\n".join(lines).rstrip() + "\n"

    def _table(self):
        rows = [("", "options", "s a picture", "speed-up", "PSNR dB, worst", "SSIM, worst", "drawn", "simulated s")]
        for t in self.drawn:
            marks = ("→" if t is self.chosen else "") + ("*" if t.name in self.front else "")
            simulated = "" if t.predicted_s is None else f"{t.predicted_s:.2f}"
            cells = (
                marks, t.name, f"{t.picture_s:.2f}", f"{self.alone_s / t.picture_s:.2f}×" if self.alone_s else "",
                _decibels(t), f"{min(t.ssim.values()):.4f}", f"{len(t.psnr_db)} of {self.num_prompts}", simulated,
            )  # fmt: skip
            rows.append(cells)
        lines = ["| " + " | ".join(row) + " |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:])]
        return [*lines, "", "→: to take; *: nothing else is both faster and closer."]

    def _left_out(self):
        reasons = [(t.name, t.left_out) for t in self.trials if t.left_out]
        return ["Left out:", "", *(f"- {name}: {why}" for name, why in reasons)] if reasons else []


def _as_arguments(options):
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _decibels(trial):
    return "the same" if math.isinf(trial.worst_db) else f"{trial.worst_db:.1f}"


def _row_text(trial, alone_s):
    closeness = "the exact picture" if math.isinf(trial.worst_db) else f"{trial.worst_db:.1f} dB in the worst picture"
    return f"{trial.picture_s:.2f} s a picture, {alone_s / trial.picture_s:.2f}× of one device unpatched, {closeness}"
