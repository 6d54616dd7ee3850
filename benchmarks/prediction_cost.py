"""Time that the calls of a patched denoiser spend on prediction and its check, taken inside them."""

import functools
import time

from asyncdiff_fast.patches.state import Received
from asyncdiff_fast.prediction.self_check import SelfCheck
from asyncdiff_fast.stages import slots

# All that runs with predict="linear" and not with predict="none", of stages and of patches.
PLACES = (
    (slots, "extrapolate"),
    (Received, "learn"),
    (Received, "predict"),
    (SelfCheck, "note"),
    (SelfCheck, "judge"),
)


class Spent:
    """`seconds` of this process in those functions since `watch`; on CPU, where they end when they return."""

    def __init__(self):
        self.seconds = 0.0

    def watch(self):
        """Count from here, in the whole process."""
        for owner, name in PLACES:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return run
