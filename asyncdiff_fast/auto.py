"""`import asyncdiff_fast.auto`: from then on each diffusers pipeline is patched when it is first called.

Options come from the variable ASYNCDIFF_FAST, a list such as `num_patches=2,warmup_steps=3`; where it names no way to
share, the processes that torchrun started evaluate as many steps side by side; in a single process nothing happens.
Under torchrun with CUDA, the current device becomes this rank's, so that a script's "cuda" means its own GPU.
`disable()` undoes the rest.

`python -m asyncdiff_fast.auto script.py …` runs a script that does not import this.

Every pipeline class has a `__call__` of its own, so each is wrapped, also those that are defined later.
"""

import functools
import logging
import os
import runpy
import sys
import weakref
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from .calls.watch import subclasses
from .commands.launch import complete
from .config import Config
from .environment import environment_options
from .patching import denoisers, device, is_patched, patch, unpatch

log = logging.getLogger(__name__)
_wrapped = []
# Denoisers met so far: one that was unpatched by hand stays so.
_seen = weakref.WeakSet()
_patched = weakref.WeakSet()
# Classes of pipelines that are left alone, each said once.
_told = weakref.WeakSet()


def enable():
    """Begin to patch pipelines at their first call. Done by the import; useful after `disable`."""
    if _wrapped:
        return
    if _num_processes() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(device())
    for cls in {DiffusionPipeline, *subclasses(DiffusionPipeline)}:
        _wrap(cls)
    DiffusionPipeline.__init_subclass__ = classmethod(_wrap_later)


def disable():
    """Unpatch what was patched here, and restore every pipeline class. Collective, like `unpatch`."""
    for denoiser in list(_patched):
        if is_patched(denoiser):
            unpatch(denoiser)
    _patched.clear()
    _seen.clear()
    for cls, call in _wrapped:
        cls.__call__ = call
    if _wrapped:
        del DiffusionPipeline.__init_subclass__
    _wrapped.clear()


def options():
    """Dict: the options that a pipeline called now would be patched with; None if it would be left alone.

    Raises: ValueError or TypeError if ASYNCDIFF_FAST names an unknown option or a wrong value.
    """
    given = environment_options()
    if not given and _num_processes() == 1:
        return None
    chosen = complete(given, _num_processes())
    Config.from_options(chosen)
    return chosen


def _num_processes():
    return int(os.environ.get("WORLD_SIZE", 1))


def _wrap_later(cls, **kwargs):
    super(DiffusionPipeline, cls).__init_subclass__(**kwargs)
    _wrap(cls)


def _wrap(cls):
    call = cls.__dict__.get("__call__")
    if call is None:
        return

    @functools.wraps(call)
    def patched_first(self, *args, **kwargs):
        _patch(self)
        return call(self, *args, **kwargs)

    cls.__call__ = patched_first
    _wrapped.append((cls, call))


def _patch(pipe):
    """Patch the denoisers not met before: those of a pipeline inside a patched one are patched already."""
    try:
        new = [d for d in denoisers(pipe) if d not in _seen]
    except TypeError:
        if options() is not None and getattr(pipe, "scheduler", None) is not None and type(pipe) not in _told:
            _told.add(type(pipe))
            log.warning("%s is not patched: no denoiser was found in it; call patch() on it", type(pipe).__name__)
        return
    chosen = options() if new else None
    if chosen is None:
        return
    for denoiser in new:
        if not is_patched(denoiser):
            patch(denoiser, **chosen)
            _patched.add(denoiser)
        _seen.add(denoiser)


def _run_script(arguments):
    """Run a script as `python script.py …` would."""
    # The module that `import asyncdiff_fast.auto` gives, not this one, which runs as __main__.
    import asyncdiff_fast.auto  # noqa: F401

    if not arguments:
        sys.exit("usage: python -m asyncdiff_fast.auto script.py [arguments]")
    sys.argv[:] = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _run_script(sys.argv[1:])
else:
    enable()
