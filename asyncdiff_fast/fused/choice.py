"""Which implementation an op runs on, for each shape, dtype and memory layout: measured once, kept on disk.

With `kernels="auto"`, an implementation takes the place of torch's if it was measured to be faster on this device with
these very arguments: launched one by one from Python, where small kernels can make the device wait for the host, for
calls that are launched so, and replayed from a CUDA graph for calls that are captured. Rank 0 measures and decides for
all. What is met for the first time while a graph is captured can neither be measured nor compiled: it is torch's. Where
ranks cannot measure together a rule of thumb stands in (`rule`).
"""

import contextlib
import functools
import logging
import os
from collections import Counter
from importlib import util

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import choice_file, timing
from .latest import Latest
from .registry import KERNELS

log = logging.getLogger(__name__)
# Places in pairs of times and of choices.
LAUNCHED, CAPTURED = 0, 1


def interpreting():
    """True if Triton runs its kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def why_not():
    """Why Triton kernels cannot run here; None if they can."""
    if util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def check(mode):
    """Raises: ValueError if `mode` is "triton" and Triton cannot run here."""
    if mode == "triton" and why_not():
        raise ValueError(
            f'kernels="triton" needs Triton and a CUDA device (or TRITON_INTERPRET=1): {why_not()}; install what is '
            'missing, or pass kernels="auto"'
        )


class KernelChoice:
    """The choices of one patched denoiser, alike on all its ranks. Collective to make.

    `active` says whether anything but torch may be chosen, `alone` whether there is one rank only, `on_cpu` whether
    kernels take CPU tensors too. With several ranks, unknown shapes are measured only while `learning`, when all ranks
    are known to run the same forward.
    """

    def __init__(self, mode, world, gpu=timing):
        self.mode, self._world, self._gpu = mode, world, gpu
        self.alone, self.on_cpu = world.size == 1, mode == "triton" and interpreting()
        self._learning = self.alone
        wanted = mode == "triton" or (mode == "auto" and gpu.available())
        self._path = choice_file.path(gpu.environment()) if wanted and mode == "auto" and world.rank == 0 else None
        known = choice_file.read(self._path) if self._path else {}
        # One rank without a GPU, and all do without: they must go the same way through their modules.
        everyone = world.gather((wanted, known), "the choice of kernels")
        self.active = all(able for able, _ in everyone)
        self._known = everyone[0][1]
        # The choices of this process, and what it has measured itself.
        self._picked, self._tried = {}, set()
        self._as_captured = False
        # Of residual sums the statistics, of blocks' results the next block's first norm; and which norm that is.
        self.sums, self.results, self.next_norm = Latest(self.alone), Latest(self.alone), None
        # What shares a picture out as patches (`Patches`), if that is done.
        self.patches = None
        # The weights that are joined (`Joined`), if any are.
        self.joined = None

    def __deepcopy__(self, memo):
        return self

    def pick(self, op, x, facts, run):
        """Name of the implementation for one call of an op.

        Args:
            op: a key of `KERNELS`; x: its first tensor; facts: hashable, what else its time depends on.
            run: function of a name that calls the op with these arguments.
        """
        if self.mode == "triton":
            return "triton"
        if not x.is_cuda:
            return "torch"
        key = (op, x.shape, x.stride(), x.dtype, x.device.index, facts)
        way = CAPTURED if self._as_captured or self._gpu.capturing() else LAUNCHED
        picked = None if self._together else self._picked.get(key)
        return self._settle(key, way, run) if picked is None else picked[way]

    @property
    def _together(self):
        """Whether ranks learn in step. Their patches may differ, and with them what each knows already."""
        return self._learning and not self.alone

    @contextlib.contextmanager
    def learning(self):
        """While it is open, all ranks run the same forward, so that what one of them meets all meet."""
        self._learning = True
        try:
            yield
        finally:
            self._learning = self.alone

    @contextlib.contextmanager
    def as_captured(self):
        """While it is open, a launched call runs what a captured one would: all that it meets is measured before."""
        self._as_captured = True
        try:
            yield
        finally:
            self._as_captured = False

    @contextlib.contextmanager
    def paused(self):
        """While it is open, all modules run their own forwards: who follows tensors through torch sees no kernels."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active

    def summary(self):
        """Dict: the mode, and of each op how many shapes seen use which implementation: launched, and captured."""
        if self.mode == "triton" or not self.active:
            return {"mode": self.mode, "active": self.active}
        found = {"mode": self.mode, "active": True}
        for name, way in (("shapes", LAUNCHED), ("captured", CAPTURED)):
            counts = Counter((key[0], picked[way]) for key, picked in self._picked.items())
            found[name] = {f"{op}: {kernel}": n for (op, kernel), n in counts.items()}
        return found

    def _settle(self, key, way, run):
        op, shape, strides, dtype, device_idx, facts = key
        text = f"{op} {tuple(shape)} {strides} {str(dtype).removeprefix('torch.')} {facts}"
        known = text in self._known
        if self._together:
            known = all(self._world.gather(known, f"who knows the kernel of {op}"))
        capturing = self._gpu.capturing()
        if not known:
            if capturing:
                return KERNELS[op][0]
            if not self._learning:
                return rule(op, shape, facts)
            self._known[text] = self._learn(text, op, run, device_idx)
        found = self._known[text]
        picked = found["launched"], found["captured"]
        if text not in self._tried and picked[CAPTURED] != picked[LAUNCHED]:
            if capturing:
                return KERNELS[op][0]
            # Known from another process: in this one it may still have to be compiled, which no capture allows.
            with torch.no_grad(), _disable_current_modes():
                run(picked[CAPTURED])
        self._picked[key] = picked
        return picked[way]

    def _learn(self, text, op, run, device_idx):
        found = self._known.get(text)
        if self._world.rank == 0 and found is None:
            # Whoever traces this forward must not see the trials.
            with torch.no_grad(), _disable_current_modes():
                self._tried.add(text)
                trials = {name: functools.partial(run, name) for name in KERNELS[op]}
                found = decide({name: self._gpu.times_us(trial, device_idx) for name, trial in trials.items()})
            choice_file.write(self._path, text, found)
            log.info("%s: %s of %s us (launched, replayed)", text, (found["launched"], found["captured"]), found["us"])
        return self._world.broadcast(found, f"the kernel of {op}")


def decide(times):
    """The choices by measured times.

    Args:
        times: {implementation: (launched us, replayed us), or None where it does not run}; the first is torch's.
    Returns: dict, fit for JSON: launched, captured: the fastest of each, torch's where it is as fast; us.
    """
    plain, found = next(iter(times)), {"us": times}
    for name, way in (("launched", LAUNCHED), ("captured", CAPTURED)):
        ran = {kernel: us[way] for kernel, us in times.items() if us is not None}
        found[name] = min(ran, key=ran.get, default=plain)
    return found


def rule(op, shape, facts):
    """The implementation to use unmeasured; `facts` of "attention" begin with the keys of each segment.

    Attention is left to cuDNN where its 128 queries to a tile fill the device well and one segment holds all keys.
    """
    if op != "attention":
        return "triton"
    b, s_q, h, d = shape
    if torch.version.hip:
        # Our larger heads spill there, and there is no cuDNN.
        return "triton" if d <= 96 else "torch"
    tiles = b * h * -(-s_q // 128)
    processors = torch.cuda.get_device_properties().multi_processor_count
    full = tiles / (-(-tiles // processors) * processors)
    return "cudnn" if len(facts[0]) == 1 and full >= 0.7 else "triton"
