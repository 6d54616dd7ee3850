"""What `tune` has measured so far, on disk: a run that was stopped goes on from here."""

import dataclasses
import json
import math
import os

from .choosing import NO_TIME, Trial


class Record:
    """`tune.json` and the pictures beside it, in the folder `out`.

    `key`: what must be the same for earlier measurements to count. `trials`: by name. `running`: name of what is being
    drawn, so that after a crash one knows what crashed.
    """

    def __init__(self, out, key):
        self.out, self.key, self.trials, self.running, self.link = out, key, {}, None, None
        self.chosen = None
        self._path, self._pictures = out / "tune.json", out / "tune"
        kept = _kept(self._path)
        if kept.get("key") == key:
            self.trials, self.running, self.link = kept["trials"], kept["running"], kept["link"]
        elif kept:
            # Pictures of something else; every rank finds them, and one of them is the first to remove each.
            for old in self._pictures.glob("*.npy"):
                old.unlink(missing_ok=True)

    def add(self, trial):
        """The `Trial` of this name: the one that is kept, or this one."""
        return self.trials.setdefault(trial.name, trial)

    def save(self):
        """Write it, whole or not at all."""
        self._pictures.mkdir(parents=True, exist_ok=True)
        kept = {
            "key": self.key,
            "chosen": self.chosen,
            "link": self.link,
            "running": self.running,
            "trials": [_plain(t) for t in self.trials.values()],
        }
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(kept, indent=1) + "\n")
        os.replace(new, self._path)

    def keep_picture(self, name, prompt, picture):
        """Keep a picture (3, h, w) in 0..1."""
        import numpy

        self._pictures.mkdir(parents=True, exist_ok=True)
        numpy.save(self._file(name, prompt), picture.numpy())

    def picture(self, name, prompt):
        """A kept picture, or None."""
        import numpy
        import torch

        try:
            return torch.from_numpy(numpy.load(self._file(name, prompt)))
        except (OSError, ValueError):
            return None

    def _file(self, name, prompt):
        safe = "".join(c if c.isalnum() or c in "=._" else "-" for c in name)
        return self._pictures / f"{safe}.{prompt}.npy"


def _kept(path):
    """What a `tune.json` says, its trials as `Trial`s by name; {} if there is none, or another program's."""
    try:
        kept = json.loads(path.read_text())
        trials = {t["name"]: as_trial(t) for t in kept["trials"]}
        return {"key": kept["key"], "running": kept["running"], "link": kept["link"], "trials": trials}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _plain(trial):
    found = dataclasses.asdict(trial)
    worst = trial.worst_db
    return found | {
        "picture_s": trial.picture_s,
        "worst_db": None if worst is None or math.isinf(worst) else worst,
    }


def as_trial(kept):
    """The `Trial` that a dict of `tune.json` stands for, whose keys are text."""
    known = {field.name for field in dataclasses.fields(Trial)}
    trial = Trial(**{name: x for name, x in kept.items() if name in known})
    trial.psnr_db = {int(i): x for i, x in trial.psnr_db.items()}
    trial.left_out = None if trial.left_out == NO_TIME else trial.left_out
    trial.ssim = {int(i): x for i, x in trial.ssim.items()}
    return trial
