"""Processes: how many the options need, what each is told, and torch's elastic launcher that starts them."""

import logging
import os
import secrets
import sys

# So many processes a machine bears, however few its cores.
_FEW = 4
# Options that say how a call is shared, or how patches or stages share it.
_WAYS = {"num_stages", "stages", "num_patches", "parallel_steps"}
_OF_PATCHES = {"exchange", "group_norm", "bessel", "cut", "patch_axis"}
_OF_STAGES = {
    "stride", "stride_phase", "time_shift", "balance", "predict", "pipeline_patches", "pipeline_text", "shard_weights",
}  # fmt: skip


class UsageError(Exception):
    """A command was given something it cannot work with; shown as one line, without a traceback."""


def complete(options, num_processes):
    """Options that use `num_processes`: where they name no way to share, as many steps side by side.

    The halves of guidance take two of them each. Where an option is one of patches' or stages', they become those.
    """
    num_ranks = num_processes // (2 if options.get("cfg_parallel") else 1)
    if num_ranks < 2 or options.keys() & _WAYS:
        return options
    if options.keys() & _OF_PATCHES:
        return options | {"num_patches": num_ranks}
    if options.keys() & _OF_STAGES:
        return options | {"num_stages": max(num_ranks - (options.get("stride") == 2), 1)}
    return options | {"parallel_steps": num_ranks}


def as_text(options):
    """Options in the form that the variable ASYNCDIFF_FAST has: `num_stages=2,time_shift=True`."""
    return ",".join(f"{name}={value}" for name, value in options.items())


def is_rank():
    """True in a process that torch's elastic launcher (torchrun) has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start_ranks(num_processes, command_line):
    """Start ranks that each carry out the command line that this process got. Returns their exit code.

    Raises: UsageError if there are neither GPUs nor CPU cores for so many.
    """
    import torch

    on_gpus, cores = torch.cuda.device_count() >= num_processes, len(os.sched_getaffinity(0))
    if not on_gpus and num_processes > max(cores, _FEW):
        raise UsageError(
            f"{command_line[0]} needs a CPU core for each process, or no more than {_FEW} processes: got "
            f"{num_processes} processes, {cores} cores; share between fewer"
        )
    kind = "GPU" if on_gpus else "CPU"
    print(f"starting {num_processes} {kind} processes; they import torch and diffusers first", flush=True)
    hidden = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return launch(num_processes, ["-m", "--", "asyncdiff_fast.commands.cli", *command_line], **hidden)


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

    from ..exchange.wire import SECRET_VARIABLE

    # Its report of a failure comes after the rank's own, and is longer than the line below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The launcher takes the environment of this process along.
    os.environ.update(environment)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ranks sign what they tell each other.
    os.environ.setdefault(SECRET_VARIABLE, secrets.token_hex(32))
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
