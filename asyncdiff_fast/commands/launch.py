"""Processes: how many the options need, what each is told, and torch's elastic launcher that starts them."""

import logging
import os
import sys

from ..config import Config


class UsageError(Exception):
    """A command was given something it cannot work with; shown as one line, without a traceback."""


def complete(options, num_processes):
    """Options that use `num_processes`: a `num_stages` that was left out is filled in, if nothing else uses them.

    Raises: as `Config`.
    """
    if "num_stages" in options or "stages" in options or num_processes == 1:
        return options
    filled = options | {"num_stages": max(num_processes - options.get("stride", 1) + 1, 1)}
    try:
        alone = Config.from_options(options)
    except ValueError:
        return filled
    return options if alone.world_size == num_processes else filled


def as_text(options):
    """Options in the form that the variable ASYNCDIFF_FAST has: `num_stages=2,time_shift=True`."""
    return ",".join(f"{name}={value}" for name, value in options.items())


def is_rank():
    """True in a process that torch's elastic launcher (torchrun) has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(num_processes, arguments, **environment):
    """Start processes on this machine, one thread each unless OMP_NUM_THREADS says otherwise, and wait for them.

    Args:
        arguments: what torchrun would get after its options: `script.py …` or `-m module …`.
        environment: variables to set for them.
    Returns: exit code; that of the process which failed first, if one did.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Its report of a failure comes after the rank's own, and is longer than the line below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The launcher takes the environment of this process along.
    os.environ.update(environment)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        run.run(run.parse_args(["--standalone", "--nproc-per-node", str(num_processes), *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        print(
            f"asyncdiff-fast: rank {rank} ended first, with exit code {code}; what it said stands above",
            file=sys.stderr,
        )
        return code
    except SignalException as stop:
        return 128 + stop.sigval
    return 0
