"""Worker processes that live and end together, as the process in front sees them."""

import contextlib
import os
import secrets
import time
import weakref
from multiprocessing.connection import wait

from . import process
from .messages import Cancelled, Failed, Progress, Trace, receive

# Once a worker has failed, the others have so long to answer; so has a call that is stopped.
PATIENCE_S = 10.0


class Team:
    """Worker processes that live and end together."""

    def __init__(self, loader, options, size):
        """Start them. Raises: what one of them raises while it loads and patches."""
        import torch.distributed as dist
        from torch import multiprocessing

        from ..exchange import wire

        context = multiprocessing.get_context("spawn")
        # Where the workers find each other; kept here, as torchrun's agent keeps it, so that no port is lost to others.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # No lock: a worker that is killed would keep it.
        self._stop_at = context.RawValue("q", process.NEVER)
        self._busy = False
        self._pipes, self._processes = [], []
        self._finalizer = weakref.finalize(self, _end, self._pipes, self._processes)
        # The store listens to others too; what workers read there they have written.
        secret = os.environ.get(wire.SECRET_VARIABLE) or secrets.token_hex(16)
        for rank in range(size):
            here, there = context.Pipe()
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                wire.SECRET_VARIABLE: secret,
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            }
            arguments = (there, rank, environment, loader, options, self._stop_at)
            worker = context.Process(
                target=process.main, args=arguments, name=f"asyncdiff_fast worker {rank}", daemon=True
            )
            worker.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(worker)
        try:
            self._results(None)
        except BaseException:
            self.end()
            raise

    def is_whole(self):
        """Whether all of them are there, and wait for a call."""
        return bool(self._processes) and not self._busy and all(worker.is_alive() for worker in self._processes)

    def ask(self, message, show):
        """[what each worker answers]: all are told the same; `show(step, total)` is called meanwhile.

        Raises: what one of them raised.
        """
        # From here on it can be cancelled.
        self._stop_at.value, self._busy = process.NEVER, True
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(message)
        return self._results(show)

    def cancel(self):
        """Let the call that runs stop."""
        if self._busy and self._stop_at.value == process.NEVER:
            self._stop_at.value = process.WANTED

    def end(self):
        """End all of them."""
        self._finalizer()

    def _results(self, show):
        self._busy, answers = True, {}
        try:
            self._collect(answers, show)
        except BaseException:
            # Ctrl-C here, or the caller's own function has raised: the workers stop, and are ready again.
            self.cancel()
            self._collect(answers, None, time.monotonic() + PATIENCE_S)
            raise
        return _values([answers[rank] for rank in sorted(answers)])

    def _collect(self, answers, show, deadline=None):
        """Fill {rank: its answer}; once one has failed, the others have a while, and are ended then."""
        while len(answers) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, None if deadline is None else max(deadline - time.monotonic(), 0))
            if not ready:
                self.end()
            for pipe in ready:
                rank = self._pipes.index(pipe)
                message = self._message(rank)
                if not isinstance(message, Progress):
                    answers[rank] = message
                elif show is not None:
                    show(message.step, message.total)
            if deadline is None and any(isinstance(answer, Failed) for answer in answers.values()):
                deadline = time.monotonic() + PATIENCE_S
        self._busy = False

    def _message(self, rank):
        """The next message of a worker; where it is gone, the news of that."""
        try:
            return receive(self._pipes[rank])
        except EOFError:
            return self._death(rank)

    def _death(self, rank):
        from ..exchange.errors import ExchangeError

        worker = self._processes[rank]
        worker.join(PATIENCE_S)
        text = (
            f"worker {rank} ended with exit code {worker.exitcode} in the middle of its work; what it said stands "
            "above, if it did; the next call starts new workers"
        )
        return Failed(ExchangeError(text), text)


def _values(answers):
    """What workers answered. Raises: a worker's own exception rather than what others say about it."""
    from ..exchange.errors import ExchangeError

    failed = [answer for answer in answers if isinstance(answer, Failed)]
    if failed:
        cause = min(failed, key=lambda one: isinstance(one.error, ExchangeError))
        raise cause.error from (None if isinstance(cause.error, Cancelled) else Trace(cause.trace))
    return [answer.value for answer in answers]


def _end(pipes, processes):
    """Close the pipes, at which workers end by themselves, and end those that do not."""
    for pipe in pipes:
        pipe.close()
    deadline = time.monotonic() + 1.0
    for worker in processes:
        worker.join(max(deadline - time.monotonic(), 0))
        if worker.is_alive():
            worker.kill()
            worker.join()
    pipes.clear()
    processes.clear()
