"""asyncdiff_fast: one image or video faster, by several devices at once.

`patch(pipe, parallel_steps=2)` lets the ranks of a torchrun share the steps of a pipeline, other options each call of
its denoiser; `unpatch(pipe)` undoes it; `print(plan(pipe, num_stages=2))` shows who would do what, and
`with profile("out/"):` where the time of all ranks goes. `Workers` is for notebooks and servers: one process calls,
others share the work. `load` reads a pipeline whose denoiser fits no device whole. `sample_window` is for sampling
loops of your own: many steps at once, by fixed-point iteration.
"""

import importlib

from .config import Config

__version__ = "0.1.0"
__all__ = [
    "Cancelled", "Config", "ExchangeError", "Workers", "__version__", "device", "load", "patch", "plan", "profile",
    "sample_window", "unpatch",
]  # fmt: skip

# Loaded when first used: torch and diffusers take seconds to import, which `asyncdiff-fast --help` need not wait for.
_PLACES = dict.fromkeys(("device", "patch", "plan", "unpatch"), "patching")
_PLACES |= {"ExchangeError": "exchange.errors", "load": "loading", "sample_window": "steps.fixed_point"}
_PLACES |= {"Cancelled": "workers.messages", "Workers": "workers.front"}
_PLACES |= {"profile": "profiling.session"}


def __getattr__(name):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *__all__})
