"""What a worker runs: it loads and patches a pipeline, and calls it whenever the process in front says so."""

import contextlib
import functools
import os
import pickle
import queue
import signal
import threading
from pathlib import Path

from .messages import Call, Cancelled, Done, Failed, Progress, receive, send


def main(pipe, rank, environment, loader, options, stop_at):
    """The life of one worker.

    Args:
        pipe: to the process in front; where that ends, so does this one, at once.
        environment: {variable: value}: what torchrun would set.
        loader: pickled function that gives the pipeline, or the folder that it lies in.
        options: of `patch`.
        stop_at: shared integer: the step of the current call at which all workers stop, or -1.
    """
    # Ctrl-C reaches all processes of a terminal; it is for the one in front to say what is to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    orders = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, orders), daemon=True).start()
    answer = functools.partial(send, pipe)
    try:
        pipeline, runtimes = _patched(loader, options)
    except BaseException as error:
        answer(Failed.of(error))
        return
    bars = functools.partial(Bar, stop_at, answer if rank == 0 else None, options.get("parallel_steps", 1))
    pipeline.progress_bar = bars
    answer(Done())
    while True:
        order = orders.get()
        try:
            if isinstance(order, Call):
                made = pipeline(*order.args, **order.kwargs)
                answer(Done(made if rank == 0 else None))
            else:
                answer(Done([runtime.stats() for runtime in runtimes]))
        except BaseException as error:
            # A callback, say, of this worker alone: the others are not to wait for it.
            for runtime in runtimes:
                runtime.abandon(error)
            answer(Failed.of(error))


def _listen(pipe, orders):
    """Hand on what the process in front says, and end with it."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            orders.put(receive(pipe))
    os._exit(1)


def _patched(loader, options):
    """(the pipeline, its runtimes)."""
    import torch

    from ..commands import folder
    from ..patching import device, patch

    place = device()
    if place.type == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    else:
        torch.cuda.set_device(place)
    load = pickle.loads(loader)
    if isinstance(load, Path):
        load = functools.partial(folder.load, load, place, torch.float32 if place.type == "cpu" else torch.float16)
    pipeline = load()
    runtimes = patch(pipeline, **options)
    return pipeline, runtimes if isinstance(runtimes, list) else [runtimes]


class Bar:
    """Stands for the progress bar of a pipeline: it says how far a call is, and ends it where it is to stop.

    The ranks of a call are not all at the same step at the same time, but they are to stop at the same one, lest one
    waits for another. The first rank says at which: none can be further ahead of it than a block of steps and one more.
    """

    def __init__(self, stop_at, tell, block, iterable=None, total=None):
        self._stop_at, self._tell, self._block = stop_at, tell, block
        self._iterable, self._total = iterable, len(iterable) if total is None and iterable is not None else total
        self._step = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def __iter__(self):
        for item in self._iterable:
            yield item
            self.update()

    def update(self, steps=1):
        """One step, or several, of the loop are over. Raises: Cancelled on all ranks at the same step."""
        self._step += steps
        if self._tell is not None:
            self._tell(Progress(self._step, self._total))
            if self._stop_at.value == WANTED:
                self._stop_at.value = self._step + self._block + 1
        if 0 <= self._stop_at.value <= self._step:
            raise Cancelled(f"the call was cancelled after {self._step} of {self._total} steps")

    def set_postfix(self, *_, **__):
        """Nothing to show it on."""

    set_description = close = refresh = write = set_postfix


# Values of `stop_at` that are no step: nobody wants to stop; the process in front does, and the first rank says where.
NEVER, WANTED = -1, -2
