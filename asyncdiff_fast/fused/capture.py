"""What captures a call: as one CUDA graph, or as pieces with what the host does between them.

Posts, waits and what else no graph may hold are handed to `outside`: done at once where a call is launched; where it is
captured, the graph ends there and another begins, and a replay does them in their place. All pieces take their memory
from one pool, so that what one of them makes lies where the next ones read it, and are replayed in the order in which
they were captured, as torch asks of graphs that share a pool.
"""

import contextlib
import functools
import gc
import warnings

import torch


class Capture:
    """Pieces and what is between them. `begin` and `end` capture one piece, within `around()`."""

    def __init__(self):
        # What a replay does, in order, while a call is captured; else None.
        self._program = None

    def outside(self, action, *args):
        """Do `action(*args)` now; of a call that is captured, in each replay, between two pieces.

        It may read and write tensors that stay where they are, and those that the call has made.
        """
        if self._program is None:
            action(*args)
            return
        self._end()
        self._program.append(functools.partial(action, *args))
        self.begin()

    def capture(self, call):
        """(function that replays, result that it writes) of a call, which has run before and does not run now."""
        with self.around():
            self._program = program = []
            try:
                self.begin()
                try:
                    result = call()
                except BaseException:
                    # What was raised first tells more than that the capture did not end well.
                    with contextlib.suppress(Exception):
                        self.end()
                    raise
                self._end()
            finally:
                self._program = None
        return functools.partial(_replay, program), result

    def _end(self):
        piece = self.end()
        if piece is not None:
            self._program.append(piece)


class CudaGraphs(Capture):
    """Captures on a GPU."""

    device_type = "cuda"

    def __init__(self):
        super().__init__()
        # An empty piece is not replayed, but a pool must not be without any graph while its memory is in use.
        self._pool = self._graph = self._empty = None

    @contextlib.contextmanager
    def around(self):
        """As `torch.cuda.graph` prepares a capture; graphs are captured on a stream of their own."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        with torch.cuda.stream(torch.cuda.Stream()):
            yield

    def begin(self):
        """A piece begins."""
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may go on.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self):
        """Ends a piece. Returns the function that replays it, None if there is nothing in it."""
        graph, self._graph = self._graph, None
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            graph.capture_end()
        if any("graph is empty" in str(warning.message).lower() for warning in told):
            self._empty = graph
            return None
        return graph.replay


def at_once(action, *args):
    """As `Capture.outside`, where nothing is captured."""
    action(*args)


def _replay(program):
    for part in program:
        part()
