"""What the process in front and its workers tell each other, over a pipe of multiprocessing between the two of them.

Messages are pickled by the standard library, tensors by value: a worker may be gone before they are read. They travel
between a parent and its own children only, never between ranks.
"""

import contextlib
import pickle
import traceback
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """To a worker: call the pipeline."""

    args: tuple
    kwargs: dict


@dataclass(frozen=True)
class Stats:
    """To a worker: what did the denoisers do?"""


@dataclass(frozen=True)
class Progress:
    """From a worker: a step of the pipeline's loop is over. `total`: steps of the loop."""

    step: int
    total: int


@dataclass(frozen=True)
class Done:
    """From a worker: what was asked is done. `value`: what came out, of the first worker's calls and of questions."""

    value: object = None


@dataclass(frozen=True)
class Failed:
    """From a worker: what was asked has raised `error`; as text one that cannot be pickled, or that would end the
    process in front, as `sys.exit` does.
    """

    error: BaseException
    trace: str

    @classmethod
    def of(cls, error):
        """The message about an exception."""
        try:
            if not isinstance(error, Exception):
                raise TypeError
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(error, "".join(traceback.format_exception(error)))


class Cancelled(Exception):
    """A call was stopped by `cancel()`; the next one is not affected."""


class Trace(Exception):
    """The traceback of a worker, as the cause of the exception that it raised."""

    def __str__(self):
        return f"\n{self.args[0]}"


def send(pipe, message):
    """Send a message. Raises: OSError if nobody is there; what pickle raises, before anything is sent."""
    pipe.send_bytes(pickle.dumps(message))


def receive(pipe):
    """The next message. Raises: EOFError if the other process is gone."""
    with contextlib.suppress(ConnectionError):
        return pickle.loads(pipe.recv_bytes())
    raise EOFError
