"""Denoisers that steer Python by what they compute: the timestep or the activations choose the way."""

from user_parts import Block, Body, embed


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


NETS = {
    "skips blocks": SkipsBlocks,
    "swaps blocks": SwapsBlocks,
    "scales by the timestep": Scales,
    "swaps skips": SwapsSkips,
    "swaps skips by number": SwapsSkipsByNumber,
    "guards": Guards,
    "returns a number": ReturnsNumber,
}


CALLS = {
    "swaps skips by number": lambda net, x, t: net(x, float(t)),
}
