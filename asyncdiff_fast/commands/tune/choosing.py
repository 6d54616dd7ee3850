"""What is best of what was measured. Pure."""

import statistics
from dataclasses import dataclass, field

# A way to share must be faster than one device by more than this: less is noise, and one device is simpler.
WORTH = 0.05
# Why a trial was not drawn that a later run may draw.
NO_TIME = "no time was left"
# What is slower than the best so far by more than this in two pictures, or by much more in one, is given up.
HOPELESS, HOPELESS_AT_ONCE = 0.25, 1.0


@dataclass
class Trial:
    """One set of options, or one device (`options` None).

    `seconds` of pictures, in order of drawing; closeness by prompt, `psnr_db` None for the same picture. `num_steps`:
    of the sampler. `left_out`: why it was not tried, or given up.
    """

    name: str
    options: dict | None = None
    way: str = "one device"
    num_steps: int = 0
    is_patched: bool = True
    predicted_s: float | None = None
    seconds: list = field(default_factory=list)
    psnr_db: dict = field(default_factory=dict)
    ssim: dict = field(default_factory=dict)
    left_out: str | None = None

    @property
    def picture_s(self):
        """Median seconds of a picture."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def worst_db(self):
        """PSNR of the worst picture; infinite if all are the same."""
        return min((float("inf") if x is None else x for x in self.psnr_db.values()), default=None)

    @property
    def is_shared(self):
        """True if several processes draw."""
        return self.options is not None

    def is_complete(self, num_prompts):
        """True if every prompt was drawn."""
        return self.left_out is None and len(self.psnr_db) == num_prompts


@dataclass(frozen=True)
class Aim:
    """The fastest whose worst picture has `min_psnr`, or the closest that takes `max_seconds`."""

    min_psnr: float = 35.0
    max_seconds: float | None = None

    def allows(self, trial):
        """True if a trial meets it, as far as was drawn."""
        if self.max_seconds is not None:
            return trial.picture_s <= self.max_seconds
        return trial.worst_db >= self.min_psnr

    def rank(self, trial):
        """The less, the better."""
        if self.max_seconds is not None:
            return (-trial.worst_db, trial.picture_s)
        return (trial.picture_s, -trial.worst_db)

    def give_up(self, trial, best):
        """Why a trial that has drawn some pictures cannot become the best, or None."""
        if self.max_seconds is None and trial.worst_db < self.min_psnr:
            return f"a picture has {trial.worst_db:.1f} dB, less than {self.min_psnr:g}"
        limit = self.max_seconds
        if limit is None and best is not None:
            limit = best.picture_s
        worse = HOPELESS_AT_ONCE if len(trial.seconds) == 1 else HOPELESS
        if limit is not None and min(trial.seconds) > limit * (1 + worse):
            return f"{min(trial.seconds):.2f} s, where {limit:.2f} s are wanted"
        return None


def best(trials, aim, num_prompts):
    """The `Trial` to recommend: one device unless a way to share is worth it. None before anything is complete.

    Where nothing is as fast as wanted, that is the fastest; as close as wanted is one device with all steps.
    """
    done = [t for t in trials if t.is_complete(num_prompts)]
    allowed = sorted((t for t in done if aim.allows(t)), key=aim.rank)
    alone = [t for t in allowed if not t.is_shared]
    if not allowed:
        return min(done, key=lambda t: (t.picture_s, -t.worst_db), default=None)
    first = allowed[0]
    if first.is_shared and alone and aim.max_seconds is None:
        return first if first.picture_s < alone[0].picture_s * (1 - WORTH) else alone[0]
    return first


def finalists(trials, aim, num_prompts, most=3):
    """Those so close to the best that noise may have decided: to be drawn again, in turn."""
    chosen = best(trials, aim, num_prompts)
    if chosen is None or aim.max_seconds is not None:
        return []
    near = [
        t
        for t in trials
        if t.is_complete(num_prompts) and aim.allows(t) and t.picture_s < chosen.picture_s * (1 + 2 * WORTH)
    ]
    return sorted(near, key=aim.rank)[:most] if len(near) > 1 else []


def front(trials):
    """Those that no other beats in both seconds and the worst picture."""
    done = [t for t in trials if t.picture_s is not None and t.psnr_db]
    return [
        t
        for t in done
        if not any(
            o.picture_s <= t.picture_s
            and o.worst_db >= t.worst_db
            and (o.picture_s, o.worst_db) != (t.picture_s, t.worst_db)
            for o in done
        )
    ]
