"""Faults for tests: what can happen to one rank, in which part of a run, in which way to share."""

import os
import signal
import time

import diffusers
import torch
from bare import Bare, noise

import asyncdiff_fast

STEPS = 8
# Options, and whether a scheduler of diffusers makes the steps.
MODES = {
    "stages": (dict(num_stages=2, warmup_steps=2), False),
    "patches": (dict(num_patches=2, warmup_steps=2), False),
    "halves": (dict(cfg_parallel=True, warmup_steps=2), False),
    "steps": (dict(parallel_steps=2, warmup_steps=2), True),
    "patches of stages": (dict(num_stages=2, num_patches=2, warmup_steps=2), False),
}
PLACES = {"warm-up": 1, "asynchronous": 5, "exchange": 5, "end": STEPS}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def leave():
    os._exit(3)


def fail():
    raise OSError("größe: no file caf\udce9.png " + "é" * 3000)


def interrupt():
    signal.raise_signal(signal.SIGINT)
    time.sleep(0)


# After these, the rank is gone, or stands still.
LETHAL = {"kill": kill, "stop": stop, "exit": leave}
# After these it goes on.
PASSING = {"raise": fail, "interrupt": interrupt}


class Run:
    """One rank's patched model and its generations in one mode."""

    def __init__(self, mode, timeout_s):
        options, self._with_scheduler = MODES[mode]
        self.model, self.timeout_s, self._options = Bare(), timeout_s, options
        self.scheduler = diffusers.DDIMScheduler() if self._with_scheduler else None
        self.patch()

    def patch(self):
        self.runtime = asyncdiff_fast.patch(self.model, timeout_s=self.timeout_s, **self._options)

    def unpatch(self):
        asyncdiff_fast.unpatch(self.model)

    @torch.no_grad()
    def draw(self, seed=0, place=None, fault=None):
        """The last latents of a generation; `fault()` at its `place`."""
        x = torch.cat((noise(seed), noise(seed + 1)))
        if self.scheduler is not None:
            self.scheduler.set_timesteps(STEPS)
            times = self.scheduler.timesteps
        else:
            times = torch.linspace(900, 50, STEPS)
        for step, t in enumerate(times):
            if fault is not None and step == PLACES[place]:
                if place == "exchange":
                    self._at_next_exchange(fault)
                else:
                    fault()
            out = self.model(x, t)
            x = self.scheduler.step(out, t, x).prev_sample if self.scheduler is not None else x - 0.05 * out
        if place == "end":
            fault()
        return x

    def _at_next_exchange(self, fault):
        """Where this rank next waits in an exchange, or posts."""
        for part in self.runtime._parts:
            exchange = part.exchange

            def once(slot, *args, exchange=exchange, **kwargs):
                del exchange.wait, exchange.post
                fault()
                return exchange.wait(slot, *args, **kwargs)

            def posted(slot, exchange=exchange):
                del exchange.wait, exchange.post
                fault()
                return exchange.post(slot)

            exchange.wait, exchange.post = once, posted
