"""The demo: the same pictures unpatched and patched, compared by eye, by time and by number."""

import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass

from . import compare, folder
from .launch import is_rank, launch

PROMPTS = (
    "a striped red star left of a blue ring, sunset background",
    "a green circle, night background",
    "a yellow triangle above a purple square, sky background",
    "a striped white ring, field background",
    "a blue star right of a red circle, desert background",
)
GUIDANCE = 5.0
# Others wait this long while rank 0 draws alone; a rank that dies is noticed at once by the launcher.
_PATIENCE_S = 3600.0


@dataclass(frozen=True)
class Drawn:
    """One picture: (3, h, w) fp32 in 0..1, seconds for the whole of it, seconds per step after warm-up (None: no such)."""

    picture: object
    seconds: float
    step_s: float | None


class _Calls:
    """Notes when each call of a denoiser ends, and moves the progress bar."""

    def __init__(self, denoisers, device, bar):
        self.ends, self._device, self._bar = [], device, bar
        self._handles = [d.register_forward_hook(self._ended) for d in denoisers]

    def _ended(self, *_):
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        self.ends.append(time.perf_counter())
        self._bar.update()

    def remove(self):
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def run(path, config, prompts, steps, out, seed):
    """Run the demo: in a rank its part of the work, otherwise start the ranks. Returns an exit code."""
    if is_rank():
        _work(path, config, prompts, steps, out, seed)
        return 0
    return None


def start(config, arguments):
    """Start the ranks, which are given the same command line. Returns their exit code."""
    import torch

    on_gpus = torch.cuda.device_count() >= config.world_size
    kind = "GPU" if on_gpus else "CPU"
    print(
        f"starting {config.world_size} {kind} processes; importing torch and diffusers takes a few seconds", flush=True
    )
    hidden = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return launch(config.world_size, ["-m", "asyncdiff_fast.cli", "demo", *arguments], **hidden)
