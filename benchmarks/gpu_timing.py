"""Times of single ops on a device, its own ceilings, and rows that a benchmark started again does not repeat.

On a GPU an op is captured in a CUDA graph and replayed, each time after the L2 cache was overwritten; events around the
replay give its time. What a replay costs by itself is measured too (`empty_s` of the ceilings). On a CPU the clock is
read: that is only for trying a script out.
"""

import json
import time

import measure
import torch

FLUSH_BYTES = 256 * 2**20


class Clock:
    """Times ops on `device`, "cuda" or "cpu"."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.flush = None
        if device == "cuda":
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, run, repeats=30, warmup_iters=3):
        """(list of seconds of one call of `run`, whether it was replayed from a CUDA graph)."""
        for _ in range(warmup_iters):
            run()
        if self.flush is None:
            return [self._clocked(run) for _ in range(repeats)], False
        replay, captured = self._captured(run)
        return [self._between_events(replay) for _ in range(repeats)], captured

    def ceilings(self):
        """Dict: copy bandwidth (read and written) and bf16 matmul rate of this very device, and an empty replay."""
        cuda = self.flush is not None
        source = torch.ones(2**28 if cuda else 2**20, dtype=torch.bfloat16, device=self.device)
        copy, _ = self.seconds(lambda: torch.empty_like(source).copy_(source))
        size = 8192 if cuda else 128
        a, b = (torch.randn(size, size, device=self.device).to(torch.bfloat16) for _ in range(2))
        matmul, _ = self.seconds(lambda: a @ b)
        one = torch.zeros(1, device=self.device)
        empty, _ = self.seconds(lambda: one.add_(1))
        return {
            "copy_gbs": 2 * source.nbytes / measure.summary(copy)["median_s"] / 1e9,
            "matmul_tflops": 2 * size**3 / measure.summary(matmul)["median_s"] / 1e12,
            "empty_s": measure.summary(empty)["median_s"],
        }

    def _captured(self, run):
        """(callable that replays, True), or (`run`, False) for what cannot be captured."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            torch.cuda.synchronize()
            return run, False
        return graph.replay, True

    def _between_events(self, replay):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    @staticmethod
    def _clocked(run):
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


class Rows:
    """The rows of one benchmark in a JSON-lines file; a row of the same key, device and versions is measured once."""

    SAME = ("device", "torch", "triton", "commit")

    def __init__(self, path, device, budget_s=float("inf")):
        self.path, self.facts, self.clock = path, measure.facts(), Clock(device)
        if device == "cpu":
            self.facts["device"] = (
                f"{self.facts['device']} (cpu)" if torch.cuda.is_available() else self.facts["device"]
            )
        self.deadline = time.monotonic() + min(budget_s, measure.left_s())
        known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.known = {
            self._key(row["key"])
            for row in known
            if "error" not in row and all(row[name] == self.facts[name] for name in self.SAME)
        }
        self.ceilings = None

    @property
    def time_is_up(self):
        """Whether no new row is to be begun."""
        return time.monotonic() > self.deadline

    def wants(self, key):
        """Whether the row of this key is still to be measured."""
        return self._key(key) not in self.known

    def add(self, key, run, moved_bytes=None, flops=None):
        """Time `run` and append its row.

        Args:
            key: dict that names the row: op, shape, dtype and so on. moved_bytes, flops: of one call, or None.
        """
        self.ceilings = self.ceilings or self.clock.ceilings()
        seconds, graph = self.clock.seconds(run)
        row = {"key": key, "graph": graph, **measure.summary(seconds), **self.ceilings, **self.facts}
        if moved_bytes is not None:
            row["gbs"] = moved_bytes / row["median_s"] / 1e9
            row["share_of_copy"] = row["gbs"] / row["copy_gbs"]
        if flops is not None:
            row["tflops"] = flops / row["median_s"] / 1e12
            row["share_of_matmul"] = row["tflops"] / row["matmul_tflops"]
        self._append(row)
        self.known.add(self._key(key))

    def fail(self, key, error):
        """Append a row that tells why a case has none of its own."""
        self._append({"key": {"op": "failed", **key}, "error": f"{type(error).__name__}: {error}"[:600], **self.facts})

    def _append(self, row):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    @staticmethod
    def _key(key):
        return json.dumps(key, sort_keys=True)
