"""Denoisers that hand tensors on outside of arguments and results, or keep state from call to call."""

import torch
from user_parts import Block, Body


class Keeper(Block):
    """Keeps a tensor that it does not return."""

    def forward(self, x, emb=None):
        h = self.conv(x)
        self.kept = h * 0.5
        return torch.tanh(h if emb is None else h + emb)


class ReadsKept(Body):
    """A tensor kept by one module is read by the next but one."""

    block = Keeper

    def body(self, h, emb):
        for i, block in enumerate(self.blocks):
            h = block(h, emb)
            if i >= 2:
                h = h + self.blocks[i - 2].kept
        return h


class KeepsResult(Block):
    def forward(self, x, emb=None):
        self.result = super().forward(x, emb)
        return self.result


class ReadsKeptResult(Body):
    """What a module keeps is what it returned; the reader takes it from the module."""

    block = KeepsResult

    def body(self, h, emb):
        for block in self.blocks:
            h = 0.5 * block(h, emb)
        return h + sum(block.result for block in self.blocks)


class Listing(Block):
    def forward(self, x, emb, skips):
        skips.append(super().forward(x, emb))
        return skips[-1] * 0.9


class FillsList(Body):
    """Blocks append to a list that they are given."""

    block = Listing

    def body(self, h, emb):
        skips = []
        for block in self.blocks:
            h = block(h, emb, skips)
        return h + sum(skips)


class ListingResult(Block):
    def forward(self, x, emb, skips):
        skips.append(super().forward(x, emb))
        return skips[-1]


class FillsListWithResults(FillsList):
    """What is appended is the result itself."""

    block = ListingResult


class Naming(Block):
    def forward(self, x, cache):
        cache["last"] = super().forward(x, cache["emb"])
        return cache["last"] + cache.get("first", 0)


class FillsDict(Body):
    block = Naming

    def body(self, h, emb):
        cache = {"emb": emb, "first": h}
        for block in self.blocks:
            h = block(h, cache) + 0.5 * cache["last"]
        return h


class Counting(Block):
    """A buffer counts the calls and changes the result."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, emb=None):
        self.calls += 1
        return super().forward(x, emb) * (1 + 0.1 * self.calls)


class CountsCalls(Body):
    block = Counting


class Averaging(Block):
    """A buffer follows the mean of the activations."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x, emb=None):
        h = super().forward(x, emb)
        self.mean = 0.5 * self.mean + 0.5 * h.mean()
        return h - self.mean


class Averages(Body):
    block = Averaging


class PythonCounting(Block):
    calls = 0

    def forward(self, x, emb=None):
        self.calls += 1
        return super().forward(x, emb) * (1 + 0.1 * self.calls)


class CountsInPython(Body):
    block = PythonCounting


class Lazy(Block):
    """A constant is made at the first call and kept."""

    table = None

    def forward(self, x, emb=None):
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1])
        return super().forward(x, emb) + self.table


class LazyTables(Body):
    block = Lazy


NETS = {
    "reads a kept tensor": ReadsKept,
    "reads a kept result": ReadsKeptResult,
    "fills a list": FillsList,
    "fills a list with results": FillsListWithResults,
    "fills a dict": FillsDict,
    "counts calls": CountsCalls,
    "averages activations": Averages,
    "counts in python": CountsInPython,
    "lazy tables": LazyTables,
}
