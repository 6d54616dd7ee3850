"""Real ranks for tests: spawned once, with a timeout, each with one thread; what a rank returns comes back."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import time
import traceback

import torch


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank_main(pipe, target, rank, world_size, port, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        # Plain pickle: tensors travel by value, since the rank may be gone before they are read.
        pipe.send_bytes(pickle.dumps((None, target(rank, *args))))
    except BaseException as error:
        pipe.send_bytes(pickle.dumps((f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}", None)))


def start(world_size, target, *args, context=None):
    """Start ranks that run `target(rank, *args)`, spawned or from another context. Returns [(process, pipe)]."""
    context, port = context or multiprocessing.get_context("spawn"), _free_port()
    ranks = []
    for rank in range(world_size):
        here, there = context.Pipe()
        process = context.Process(target=_rank_main, args=(there, target, rank, world_size, port, args), daemon=True)
        process.start()
        there.close()
        ranks.append((process, here))
    return ranks


def collect(ranks, timeout):
    """Results of all ranks in order. A rank that fails, dies or hangs makes the call raise; none is left running."""
    deadline, results, errors = time.monotonic() + timeout, [None] * len(ranks), []
    try:
        for i, (process, pipe) in enumerate(ranks):
            if not pipe.poll(max(0.1, deadline - time.monotonic())):
                errors.append(f"rank {i} gave no result within {timeout} s")
                continue
            try:
                error, results[i] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                process.join(1)
                error = f"rank {i} died with exit code {process.exitcode}"
            if error:
                errors.append(error)
    finally:
        for process, _ in ranks:
            with contextlib.suppress(OSError):
                process.join(0.5)
                process.kill()
    if errors:
        raise AssertionError("\n".join(errors))
    return results


def run(world_size, target, *args, timeout=240):
    """`collect(start(...))`."""
    return collect(start(world_size, target, *args), timeout)
