"""Denoisers that hand tensors on outside of arguments and results, keep state, or steer Python by what they compute."""

import torch
from torch import nn
from user_nets import WIDTH, Block, Body, conv, embed


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


class SkipsBlocks(Body):
    """Late timesteps leave two blocks out."""

    def body(self, h, emb):
        for block in self.blocks if self.t > 3.5 else self.blocks[:-2]:
            h = block(h, emb)
        return h

    def forward(self, x, t):
        self.t = t.item()
        return super().forward(x, t)


class SwapsBlocks(SkipsBlocks):
    """Late timesteps run the same blocks in another order."""

    def body(self, h, emb):
        for block in self.blocks if self.t > 3.5 else self.blocks[::-1]:
            h = block(h, emb)
        return h


class Scales(SkipsBlocks):
    """The timestep, as a number, scales what is between blocks."""

    def body(self, h, emb):
        for block in self.blocks:
            h = block(h, emb) * (0.9 if self.t > 3.5 else 1.1)
        return h


class SwapsSkips(SkipsBlocks):
    """Late timesteps read another skip."""

    def body(self, h, emb):
        skips = []
        for block in self.blocks:
            h = block(h, emb)
            skips.append(h)
        return h + skips[0 if self.t > 3.5 else 1]


class SwapsSkipsByNumber(SwapsSkips):
    """The same with a timestep that is a Python number."""

    def forward(self, x, t):
        self.t = t
        return Body.forward(self, x, t)


class Guards(Body):
    """A number read from the activations decides."""

    def body(self, h, emb):
        for block in self.blocks:
            h = block(h, emb)
            if h.abs().mean().item() > 0.1:
                h = h * 0.8
        return h


class Numbering(Block):
    def forward(self, x, emb, t):
        return super().forward(x, emb), 0.1 * float(t)


class ReturnsNumber(Body):
    """A block returns a number that follows the timestep."""

    block = Numbering

    def forward(self, x, t):
        h, emb = self.conv_in(x), embed(t, x)
        for block in self.blocks:
            h, factor = block(h, emb, t)
            h = h * factor
        return self.conv_out(h)


class Splitting(Block):
    def forward(self, x, emb=None):
        return super().forward(x, emb), x[:, : WIDTH // 2]


class WritesView(Body):
    """A block returns a view of its argument; the view is changed in place, and the argument read later."""

    block = Splitting

    def body(self, h, emb):
        for block in self.blocks:
            before = h
            h, part = block(h, emb)
            part += 1
            h = h + before
        return h


class Overlapping(Block):
    def forward(self, x, emb=None):
        h = super().forward(x, emb)
        return h, h[:, : WIDTH // 2]


class WritesOverlap(Body):
    """Two results share memory; one is changed in place, the other read."""

    block = Overlapping

    def body(self, h, emb):
        for block in self.blocks:
            h, part = block(h, emb)
            part.mul_(0.5)
        return h


class Gates(Body):
    """The parts of one result are changed in place; they do not overlap."""

    def __init__(self):
        super().__init__()
        self.modulations = nn.ModuleList(nn.Conv2d(WIDTH, 3 * WIDTH, 1) for _ in self.blocks)

    def body(self, h, emb):
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            shift, scale, gate = modulation(h).chunk(3, 1)
            scale += 1
            h = h + gate.tanh() * block(h * scale + shift, emb)
        return h


class ChangesPart(Gates):
    """A part of one result is changed in place by a module; the rest is read later."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def body(self, h, emb):
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            shift, scale, gate = modulation(h).chunk(3, 1)
            self.relu(scale)
            h = h + gate.tanh() * block(h * scale + shift, emb)
        return h


class ChangesLatent(Body):
    """The latent is scaled in place, as some samplers' models do with a copy they were given."""

    def forward(self, x, t):
        x.mul_(0.95)
        return super().forward(x, t)


class Detached(nn.Module):
    """Two towers that meet at the end, the second fed by the timestep and the text only."""

    def __init__(self):
        super().__init__()
        self.image = nn.ModuleList([conv(4), *[Block() for _ in range(3)]])
        self.text = nn.ModuleList([conv(), *[Block() for _ in range(3)]])
        self.out = conv(2 * WIDTH, 4)

    def forward(self, x, t):
        a, b = x, embed(t, x).expand(3, WIDTH, 8, 8)
        for one, other in zip(self.image, self.text, strict=True):
            a, b = one(a), other(b)
        return self.out(torch.cat([a, b], 1))


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
    "skips blocks": SkipsBlocks,
    "swaps blocks": SwapsBlocks,
    "scales by the timestep": Scales,
    "swaps skips": SwapsSkips,
    "swaps skips by number": SwapsSkipsByNumber,
    "guards": Guards,
    "returns a number": ReturnsNumber,
    "writes a view": WritesView,
    "writes an overlap": WritesOverlap,
    "gates": Gates,
    "changes a part": ChangesPart,
    "changes the latent": ChangesLatent,
    "two towers": Detached,
}

CALLS = {
    "swaps skips by number": lambda net, x, t: net(x, float(t)),
    "changes the latent": lambda net, x, t: net(x.clone(), t),
}
