"""Networks whose arguments have a row for each picture of the batch in one way or another, or look as if they had."""

import torch


class Net(torch.nn.Module):
    """`forward(x, t, ...)` of latents (batch, 4, rows, columns): pictures do not see each other."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(4, 4, 3, padding=1)
        # Ranks that are threads share torch's own generator.
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))

    def mix(self, x, added):
        return self.inner(torch.tanh(x + added))


class Table(Net):
    """A table of positions, of which as many rows are used as the latent has."""

    def forward(self, x, t, table):
        return self.mix(x, 0.01 * table[: x.shape[-2], : x.shape[-1], 0])


class Layers(Net):
    """Text for each layer: (layers, batch, 4), and as many layers as pictures."""

    def forward(self, x, t, text):
        for layer in text.unbind(0):
            x = self.mix(x, layer[:, :, None, None])
        return x


class Weights(Net):
    """A weight for each layer, all alike, and as many layers as pictures; and one for each picture, all alike too."""

    def forward(self, x, t, weights, shift):
        if len(weights) != 2:
            raise ValueError("a weight for each layer")
        for weight in weights.unbind(0):
            x = x + weight * self.mix(x, shift[:, None, None, None])
        return x


class Nested(Net):
    """A table for each of as many frames as pictures, in a tuple; and text by picture in a dict."""

    def forward(self, x, t, tables, extra):
        return self.mix(x, tables[0][0, :, None] + tables[0][1, None] + extra["text"][:, :, None, None])


class Lists(Net):
    """Latents, text and results by picture in lists."""

    def forward(self, x, t, text):
        return ([self.mix(a[None], b[:, None, None])[0] for a, b in zip(x, text, strict=True)], {})


class Popped(Net):
    """Takes from the list that it is given."""

    def forward(self, x, t, residuals=None):
        while residuals:
            x = self.mix(x, residuals.pop(0))
        return self.inner(x)


class Frames(Net):
    """Two frames of each picture follow each other: (batch * 2, 4, 1, 1)."""

    def forward(self, x, t, hints):
        return self.mix(x, hints.reshape(-1, 2, *hints.shape[1:]).mean(1))


class FramesFirst(Net):
    """All pictures' first frames come first: no half of that is a half of the batch."""

    def forward(self, x, t, hints):
        return self.mix(x, hints.reshape(2, -1, *hints.shape[1:])[0] - 0.5 * hints.reshape(2, -1, *hints.shape[1:])[1])


class Writes(Net):
    """Writes into its latents."""

    def forward(self, x, t):
        return self.inner(x.mul_(0.5))


class Store:
    """As a processor that keeps attention maps for its pipeline."""

    kept = None


class Keeps(Net):
    """Its processor keeps something of the whole batch."""

    def __init__(self):
        super().__init__()
        self.processor = Store()

    def forward(self, x, t):
        self.processor.kept = x.mean((2, 3))
        return self.inner(x)


class Mean(Net):
    """Pictures see each other, a little."""

    def forward(self, x, t):
        return self.mix(x, 1e-3 * x.mean((0, 2, 3), keepdim=True))


def inputs(kind):
    """Keyword arguments of a batch of two halves."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    x, t = noise(2, 4, 6, 6), torch.tensor(5.0)
    extra = {
        Table: lambda: dict(table=noise(64, 64, 2)),
        Layers: lambda: dict(text=noise(2, 2, 4)),
        Weights: lambda: dict(weights=torch.ones(2), shift=torch.full((2,), 0.5)),
        Nested: lambda: dict(tables=(noise(2, 6), noise(2, 6)), extra={"text": noise(2, 4)}),
        Lists: lambda: dict(x=list(noise(2, 4, 6, 6)), text=list(noise(2, 4))),
        Popped: lambda: dict(residuals=[noise(2, 4, 6, 6), noise(2, 4, 1, 1)]),
        Frames: lambda: dict(hints=noise(4, 4, 1, 1)),
        FramesFirst: lambda: dict(hints=noise(4, 4, 1, 1)),
        Keeps: dict,
        Mean: dict,
        Writes: dict,
    }
    return dict(x=x, t=t) | extra[kind]()
