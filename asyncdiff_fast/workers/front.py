"""`Workers`: a pipeline that worker processes share, called from one process that is none of them."""

import os
import pickle
import sys
import threading
from pathlib import Path

from ..commands.launch import complete
from ..config import Config
from .messages import Call, Stats
from .team import Team


class Workers:
    """A pipeline in worker processes of its own, for notebooks, web servers and other hosts that torchrun cannot start.

        with asyncdiff_fast.Workers("path/to/pipeline", nproc=2) as pipe:
            image = pipe("a red star", num_inference_steps=50).images[0]

    A call returns what the pipeline returns. It raises what the pipeline raised in a worker. A worker that dies ends
    the call by an `ExchangeError`; the next call starts new ones. One call runs at a time: a second thread waits its
    turn. The workers end with `close()`, with the `with` block, and with this process, however it ends.
    """

    def __init__(self, load, nproc=2, **options):
        """Start the workers and wait until each has loaded and patched the pipeline.

        Args:
            load: function without arguments that gives the pipeline, on `asyncdiff_fast.device()`; of a module that
                workers can import, and pickled as functions are, by name (`functools.partial` gives it arguments). Or
                the folder of a pipeline's `save_pretrained`: loaded in fp16 on CUDA, in fp32 on the CPU.
            nproc: number of workers, of which each takes one device.
            options: of `patch`; by default as many steps side by side as there are workers.
        Raises: ValueError or TypeError for options that do not fit; what `load` or `patch` raises.
        """
        if type(nproc) is not int or nproc < 1:
            raise ValueError(f"nproc must be a whole number of processes, 1 or more: got {nproc!r}")
        self._options = complete(options, nproc)
        config = Config.from_options(self._options)
        if config.world_size != nproc:
            raise ValueError(
                f"nproc must be the number of processes that the options take: got nproc={nproc}, and "
                f"{self._options} take {config.world_size}; pass nproc={config.world_size}, or other options"
            )
        load = _importable(load)
        self._loader = _pickled(load, "load")
        self._turn, self._team, self._closed = threading.Lock(), None, False
        with self._turn:
            self._ready()

    def __call__(self, *args, progress=True, **kwargs):
        """Call the pipeline.

        Args:
            args, kwargs: of the pipeline; they must be picklable, and a function among them runs in the workers.
            progress: True: a bar of tqdm; False: none; or a function that is given (steps done, steps of the loop).
        Returns: what the pipeline returns in the first worker.
        Raises: TypeError for arguments that cannot be pickled; what it raises there; `Cancelled` after `cancel()`;
            ExchangeError if a worker dies.
        """
        message = _message(args, kwargs)
        with self._turn, _Shown(progress) as show:
            return self._ready().ask(message, show)[0]

    def cancel(self):
        """Stop the call that runs, if one does, within a block of steps and two more; it raises `Cancelled`."""
        team = self._team
        if team is not None:
            team.cancel()

    def stats(self):
        """[[`runtime.stats()` of each denoiser] of each worker]."""
        with self._turn:
            return self._ready().ask(pickle.dumps(Stats()), None)

    def close(self):
        """End the workers. Idempotent; a call that runs in another thread is cancelled."""
        self._closed = True
        self.cancel()
        with self._turn:
            if self._team is not None:
                self._team.end()
                self._team = None

    def __repr__(self):
        config = Config.from_options(self._options)
        return f"<Workers: {config.world_size} processes, {config.ways or 'one device'}>"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _ready(self):
        """The workers, started anew if one of them is gone."""
        if self._closed:
            raise ValueError("these workers are closed: make new ones, Workers(…)")
        if self._team is None or not self._team.is_whole():
            if self._team is not None:
                self._team.end()
            self._team = None
            self._team = Team(self._loader, self._options, Config.from_options(self._options).world_size)
        return self._team


class _Shown:
    """How far a call is, on a bar of tqdm or by the caller's own function."""

    def __init__(self, progress):
        self._progress, self._bar = progress, None

    def __enter__(self):
        return {True: self._draw, False: None}.get(self._progress, self._progress)

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def _draw(self, step, total):
        from tqdm.auto import tqdm

        if self._bar is None or step < self._bar.n:
            self.__exit__()
            self._bar = tqdm(total=total)
        self._bar.update(step - self._bar.n)


def _importable(load):
    """A folder as a path, or the function itself. Raises: ValueError or TypeError for what no worker could call."""
    if isinstance(load, str | os.PathLike):
        if not Path(load).is_dir():
            raise ValueError(f"load must be a function or the folder of a pipeline: got {str(load)!r}, no such folder")
        if not (Path(load) / "model_index.json").is_file():
            raise ValueError(
                f"load must be the folder of a pipeline: got {str(load)!r}, without a model_index.json; "
                "save_pretrained a pipeline there"
            )
        return Path(load).resolve()
    if not callable(load):
        raise TypeError(f"load must be a function that gives a pipeline, or its folder: got {type(load).__name__}")
    of = getattr(load, "func", load)
    if getattr(of, "__module__", None) == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
        raise ValueError(
            f"load must come from a module that workers can import: got {of.__qualname__} of this session; write it to "
            "a file and import it from there, or pass the pipeline's folder"
        )
    return load


def _message(args, kwargs):
    """A `Call` as bytes. Raises: TypeError that names what cannot travel."""
    try:
        return pickle.dumps(Call(args, kwargs))
    except Exception:
        for name, x in [*((f"argument {i}", x) for i, x in enumerate(args)), *kwargs.items()]:
            _pickled(x, name)
        raise


def _pickled(x, name):
    """`x` as bytes. Raises: TypeError if it cannot be pickled."""
    try:
        return pickle.dumps(x)
    except Exception as error:
        of = getattr(x, "func", x)
        what = getattr(of, "__qualname__", type(of).__name__) if callable(of) else type(x).__name__
        raise TypeError(
            f"{name} must be picklable, since workers are other processes: got {what} ({type(error).__name__}: "
            f"{error}); pass plain data, or a function by its name in a module: no lambda, nor one made in another "
            "function (functools.partial gives it arguments)"
        ) from error
