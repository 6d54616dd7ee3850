"""Denoisers that change tensors in place: arguments, skips, views of results, the latent."""

from torch import nn
from user_parts import WIDTH, Block, Body, conv


class InplaceResidual(Body):
    def body(self, h, emb):
        for block in self.blocks:
            h += block(h, emb)
        return h


class InplaceBlock(Block):
    """Changes its argument and returns it."""

    def forward(self, x, emb=None):
        return x.add_(super().forward(x, emb))


class InplaceBlocks(Body):
    block = InplaceBlock


class InplaceSkips(Body):
    """An in-place block's argument also lies in a list of skips, which is read at the end."""

    block = InplaceBlock

    def body(self, h, emb):
        skips = []
        for i, block in enumerate(self.blocks):
            skips.append(h)
            h = block(h, emb)
            if i % 2:
                h = h * 0.7
        for i, skip in enumerate(skips):
            h = h + skip * (0.1 * i + 0.1)
        return h


class Writer(Block):
    """Changes its argument and returns nothing of it."""

    def forward(self, x, emb=None):
        h = super().forward(x, emb)
        x.mul_(0.5).add_(h)
        return h.mean((2, 3), keepdim=True)


class Writers(Body):
    block = Writer

    def body(self, h, emb):
        means = [block(h, emb) for block in self.blocks]
        return h + sum(means)


class InplaceRelu(Body):
    def __init__(self):
        super().__init__()
        self.relus = nn.ModuleList(nn.ReLU(inplace=True) for _ in self.blocks)
        self.convs = nn.ModuleList(conv() for _ in self.blocks)

    def body(self, h, emb):
        for c, relu in zip(self.convs, self.relus, strict=True):
            before = h
            h = relu(c(h) + emb) + 0.3 * before
        return h


class InplaceReluAlone(InplaceRelu):
    """The activation's argument is also a skip."""

    def body(self, h, emb):
        skips = []
        for c, relu in zip(self.convs, self.relus, strict=True):
            h = c(h)
            skips.append(h)
            h = relu(h)
        return h + sum(skips) + emb


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


NETS = {
    "inplace residual": InplaceResidual,
    "inplace blocks": InplaceBlocks,
    "inplace blocks over skips": InplaceSkips,
    "writes an argument": Writers,
    "inplace relu": InplaceRelu,
    "inplace relu over skips": InplaceReluAlone,
    "writes a view": WritesView,
    "writes an overlap": WritesOverlap,
    "gates": Gates,
    "changes a part": ChangesPart,
    "changes the latent": ChangesLatent,
}


CALLS = {
    "changes the latent": lambda net, x, t: net(x.clone(), t),
}
