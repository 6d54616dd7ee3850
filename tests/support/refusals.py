"""What a refused `patch` says, how long it took, and that it left nothing changed."""

import time
import traceback
from pathlib import Path

import torch

import asyncdiff_fast

PACKAGE = Path(asyncdiff_fast.__file__).parent


def is_ours(error):
    """True if an error was raised by the package, and not by what it has called."""
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError | TypeError) and Path(place).is_relative_to(PACKAGE)


def state(target):
    """Everything that is in the modules of a target, by identity."""
    if isinstance(target, torch.nn.Module):
        return {
            n: {k: id(v) for k, v in vars(m).items() if k[0] != "_"} | dict.fromkeys(vars(m))
            for n, m in target.named_modules()
        }
    return {n: state(m) for n, m in getattr(target, "components", {}).items() if isinstance(m, torch.nn.Module)}


def attempt(target, **options):
    """(type, message, seconds, what was changed) of a refused patch."""
    before, began = state(target), time.monotonic()
    try:
        asyncdiff_fast.patch(target, **{"timeout_s": 60} | options)
    except Exception as error:
        seconds = time.monotonic() - began
        changed = [n for n, v in state(target).items() if v != before[n]]
        return type(error).__name__, str(error), seconds, changed
    asyncdiff_fast.unpatch(target)
    return "nothing", "", 0.0, []


def assert_refused(results, *words, kind="ValueError"):
    for rank, (name, message, seconds, changed) in enumerate(results):
        assert name == kind, f"rank {rank}: {name}: {message}"
        assert all(word in message for word in words), f"rank {rank}: {message}"
        assert seconds < 20, f"rank {rank} took {seconds:.0f} s"
        assert not changed, f"rank {rank} changed {changed}"
