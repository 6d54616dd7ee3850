"""How far predictions were from what then arrived: known one call later for free, and what is decided by it.

Errors are of the norm, on a sample of each received tensor, and stay on the device. What ranks decide by them they
decide alike: by one number that has travelled with the denoiser's result.
"""

import dataclasses

import torch

# Numbers looked at in each tensor.
SAMPLE = 1024
# A spike is this many times the usual error.
SPIKE = 3.0


class SelfCheck:
    """Compares the values of successive calls, `names` of them, with what was or would have been predicted.

    `errors` is (values, 2) fp32 on the device: of the prediction and of plain reuse, relative to the value.
    """

    def __init__(self, names, device):
        self.names = list(names)
        with torch.inference_mode(False):
            self._samples = torch.zeros(3, len(self.names), SAMPLE, device=device)
            self.errors = torch.zeros(len(self.names), 2, device=device)
            self.worst = torch.zeros(1, device=device)
        self._turn = 0
        self.restart()

    def restart(self):
        """What was seen until now is not of the call before the next one's."""
        self._seen = 0
        self.worst.zero_()

    def note(self, row, value):
        """A value of this call, a tensor of one dimension."""
        sample = value[:: max(1, value.numel() // SAMPLE)][:SAMPLE]
        self._samples[self._turn, row, : len(sample)].copy_(sample)

    def judge(self, weight):
        """All values of this call are noted; `weight` is what predictions of them counted the change before."""
        now, before, last = (self._samples[(self._turn + i) % 3] for i in range(3))
        if self._seen >= 2 and self.names:
            guess = torch.lerp(before, last, 1.0 + weight)
            norms = torch.stack((now, now - guess, now - last)).norm(dim=-1)
            torch.div(norms[1:].T, norms[:1].T.clamp(min=1e-12), out=self.errors)
            torch.amax(self.errors[:, 0], 0, keepdim=True, out=self.worst)
        self._seen += 1
        self._turn = (self._turn + 1) % 3

    @property
    def judged(self):
        """True if `errors` are of the values noted last."""
        return self._seen > 2

    def summary(self):
        """{name: {"error", "reuse_error"}} of the values noted last; waits for the device."""
        found = self.errors.tolist() if self.judged else ()
        return {
            name: {"error": error, "reuse_error": reuse}
            for name, (error, reuse) in zip(self.names, found, strict=False)
        }


def summaries(checks):
    """{name: errors} of some (number of the call between two steps, its `SelfCheck` or None); waits for the device."""
    found = {}
    for call, check in checks:
        prefix = f"call {call}, " if call else ""
        found |= {prefix + name: error for name, error in (check.summary() if check is not None else {}).items()}
    return found


class Report:
    """The worst error of each call as all ranks know it, read on the host without waiting for the call's end."""

    def __init__(self):
        self.forget()

    def forget(self):
        """A generation begins."""
        self._given, self.usual = [], 0.0

    def drop(self):
        """What was given is not of the next call."""
        self._given = []

    def give(self, worst):
        """`worst`: (1,) fp32; the same on every rank."""
        if worst.is_cuda:
            host = torch.empty(1, pin_memory=True)
            host.copy_(worst, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._given = [*self._given[-1:], (host, event)]
        else:
            self._given = [(worst.clone(), None)]

    def take(self):
        """The worst error that is known by now: of the call before, on CUDA of the one before that; 0 if unknown."""
        if not self._given or (self._given[-1][1] is not None and len(self._given) < 2):
            return 0.0
        host, event = self._given[0]
        if event is not None:
            event.synchronize()
        return float(host)


class Pace:
    """Which steps of a generation are exact; all ranks decide alike. `config` has `warmup_steps` as a number."""

    # More steps than any generation has.
    NEVER = 1 << 30

    def __init__(self, config, world):
        self._options, self._world = config, world
        self.begin_generation()

    def begin_generation(self):
        """Warm-up begins."""
        options = self._options
        # Of steps side by side these say for themselves which are exact.
        self.warming = options.warmup_steps == "auto" and options.parallel_steps == 1
        warmup = self.NEVER if self.warming else options.least_warmup
        self.config = dataclasses.replace(options, warmup_steps=warmup)

    def before(self, step, check):
        """End warm-up before `step` if the values of the step before were predictable within the tolerance. Collective.

        Not right after that step: what ends a generation must not be a wait for other ranks.
        """
        if not self.warming or step == 0:
            return
        mine = float(check.worst) if check.judged else float("inf")
        if max(self._world.gather(mine, "the error of predictions")) <= self._options.tolerance:
            self.config = dataclasses.replace(self._options, warmup_steps=step)
            self.warming = False

    def resyncs(self, report):
        """True if the next asynchronous call must be exact instead: the error is large, and much larger than usual."""
        error, usual = report.take() if self._options.resync else 0.0, report.usual
        if not error:
            return False
        report.usual = (usual + error) / 2 if usual else error
        if not usual or error <= max(self._options.resync, SPIKE * usual):
            return False
        report.drop()
        return True
