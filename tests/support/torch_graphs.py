"""torch's CUDA graphs as of 2.11, without a GPU: what its allocator and its random numbers ask of captures."""

import collections
import contextlib
import itertools
import warnings

import torch


class TorchGraphs:
    """Stands in for what of `torch.cuda` captures calls, once `install` was called.

    `streams`: those on which something was captured; `held`: pools in which a tensor lives; `work(n)` captures so many
    launches, `wait()` breaks a capture off; `draw()` is a random number of the device. While it is `receiving`, what
    waits for the device waits for ever.
    """

    def __init__(self):
        self.streams, self.held, self.replays, self.receiving = [], set(), [], False
        self._uses, self._underway = collections.Counter(), []
        self._stream, self._graph, self._drawn, self._ids = None, None, False, itertools.count(1)

    def install(self, monkeypatch):
        """Put it in the place of torch's."""
        for name, function in {
            "CUDAGraph": lambda: Graph(self),
            "Stream": lambda: f"stream {next(self._ids)}",
            "stream": self.stream,
            "graph_pool_handle": lambda: f"pool {next(self._ids)}",
            "synchronize": self.synchronize,
            "current_device": lambda: 0,
            "empty_cache": self.empty_cache,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.leave, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.release(pool), raising=False)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self._stream = self._stream, stream
        yield
        self._stream = before

    def synchronize(self):
        if self.receiving:
            raise TimeoutError("the other rank sends when it has captured, which waits for what this one sends")

    def empty_cache(self):
        self.synchronize()
        if self._underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        for pool in [pool for pool, uses in self._uses.items() if not uses and pool not in self.held]:
            del self._uses[pool]

    def work(self, launches):
        self._graph.launches += launches

    def wait(self):
        self._graph.broken = True
        raise RuntimeError("operation not permitted when stream is capturing")

    def draw(self):
        if self._drawn:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return 4

    @property
    def uses(self):
        """Graphs that live, of all pools."""
        return sum(self._uses.values())

    # What graphs call.

    def begin(self, graph):
        if self._stream is None:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        if graph.pool in self._uses and not self._uses[graph.pool]:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        if graph.pool in self._underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self._uses[graph.pool] += 1
        self._underway.append(graph.pool)
        self.streams.append(self._stream)
        self._graph, self._drawn = graph, True

    def leave(self, device, pool):
        if pool not in self._underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self._underway.remove(pool)

    def end(self, graph):
        self._graph = None
        if graph.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.leave(0, graph.pool)
        self._drawn = False
        if not graph.launches:
            warnings.warn("The CUDA Graph is empty. This usually means ...", stacklevel=2)

    def release(self, pool):
        self._uses[pool] -= 1


class Graph:
    """One graph."""

    def __init__(self, torch_graphs):
        self._torch, self.launches, self.broken, self._ended = torch_graphs, 0, False, False

    def capture_begin(self, pool=None, capture_error_mode="global"):
        self.pool = pool or f"pool of {id(self)}"
        self._torch.begin(self)

    def capture_end(self):
        self._torch.end(self)
        self._ended = True

    def replay(self):
        self._torch.replays.append(self.launches)

    def reset(self):
        if self._ended:
            self._ended = False
            self._torch.release(self.pool)

    __del__ = reset
