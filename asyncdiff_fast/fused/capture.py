"""What captures a call: as one CUDA graph, or as pieces with what the host does between them.

Posts, waits and what else no graph may hold are handed to `outside`: done at once where a call is launched; where it is
captured, the graph ends there and another begins, and a replay does them in their place. All pieces take their memory
from one pool, so that what one of them makes lies where the next ones read it, and are replayed in the order in which
they were captured, as torch asks of graphs that share a pool.
"""

import contextlib
import functools
import warnings
import weakref

import torch


class Capture:
    """Pieces and what is between them. `begin` and `end` capture one piece, within `around()`."""

    def __init__(self):
        # What a replay does, in order, while a call is captured; else None.
        self._program = None

    def tidy(self):
        """Give back what memory can be, before a capture, of a rank that has no receive under way.

        To free memory waits for all that the device does: for what another rank sends, too, who may wait likewise.
        """

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
    """Captures on a GPU, all on one stream: torch gives memory again only where it was allocated for, a pool's too."""

    device_type = "cuda"

    def __init__(self):
        super().__init__()
        self._device = self._stream = self._pool = self._graph = None
        # torch captures into a pool that is in use only while one of its graphs lives, be it an empty one.
        self._graphs, self._empty = weakref.WeakSet(), []

    def tidy(self):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def around(self):
        """On the current device, of which nothing is waited for."""
        device = torch.cuda.current_device()
        if self._device != device:
            self._device, self._stream, self._graphs = device, torch.cuda.Stream(), weakref.WeakSet()
        others = list(self._graphs)
        if not others:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._empty.clear()

    def begin(self):
        """A piece begins."""
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may go on.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self):
        """Ends a piece. Returns the function that replays it, None if there is nothing in it."""
        graph, self._graph = self._graph, None
        if graph is None:
            raise RuntimeError("a piece before this one could not be captured")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                graph.capture_end()
            except BaseException:
                _put_right(graph, self._device, self._pool)
                raise
        self._graphs.add(graph)
        if any("graph is empty" in str(warning.message).lower() for warning in told):
            self._empty.append(graph)
            return None
        return graph.replay


# Captures that did not come to an end: torch may still ask them whose memory is being allocated.
_BROKEN_OFF = []


def _put_right(graph, device, pool):
    """After a capture that CUDA has broken off, as where the host would wait for the device; on the same stream.

    torch's `capture_end` raises then, up to 2.11 before it has left the pool and told the random numbers: from there on
    nothing would be freed, drawn or captured.
    """
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        # torch has left it, and gives it up itself.
        pass
    else:
        torch._C._cuda_releasePool(device, pool)
    graph.reset()
    _BROKEN_OFF.append(graph)
    # One that ends well tells the random numbers.
    empty = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty.capture_begin(capture_error_mode="thread_local")
        empty.capture_end()


def at_once(action, *args):
    """As `Capture.outside`, where nothing is captured."""
    action(*args)


def _replay(program):
    for part in program:
        part()
