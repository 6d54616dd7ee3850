"""Denoisers that mix the rows of a picture in other ways than patches can follow, and some that only look so.

Each is called as `net(x, t)`: x (1, 4, 16, 8), t a number; it returns a tensor like x.
"""

import torch
from torch import nn
from torch.nn import functional

WIDTH, HEIGHT = 16, 16


class Net(nn.Module):
    """A convolution, `mix`, a convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, t):
        return self.last(self.mix(self.first(x), t))

    def heads(self, h):
        """Queries, keys and values, (n, 2, tokens, 8) each."""
        q, k, v = self.qkv(h.flatten(2).transpose(1, 2)).chunk(3, -1)
        return [a.unflatten(-1, (2, -1)).transpose(1, 2) for a in (q, k, v)]

    def picture(self, tokens, like):
        """Tokens (n, heads, tokens, size) as a picture like another."""
        return tokens.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(-1, like.shape[-2:])


class AcrossRows(Net):
    """A linear layer over the height."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Linear(HEIGHT, HEIGHT)

    def mix(self, h, t):
        return self.rows(h.transpose(-1, -2)).transpose(-1, -2)


class InstanceNorm(Net):
    def mix(self, h, t):
        return functional.instance_norm(h)


class LayerNormOverPicture(Net):
    def mix(self, h, t):
        return functional.layer_norm(h, h.shape[1:])


class Causal(Net):
    def mix(self, h, t):
        return h + self.picture(functional.scaled_dot_product_attention(*self.heads(h), is_causal=True), h)


class Bilinear(Net):
    def mix(self, h, t):
        small = functional.interpolate(h, scale_factor=0.5, mode="bilinear")
        return h + functional.interpolate(small, scale_factor=2.0, mode="bilinear")


class OwnSoftmax(Net):
    """Attention without scaled_dot_product_attention."""

    def mix(self, h, t):
        q, k, v = self.heads(h)
        return h + self.picture((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v, h)


class Squeeze(Net):
    """Squeeze and excitation: the mean of the picture scales its channels."""

    def mix(self, h, t):
        return h * h.mean((2, 3), keepdim=True).sigmoid()


class Cumulative(Net):
    def mix(self, h, t):
        return h.cumsum(2)


class Flip(Net):
    def mix(self, h, t):
        return h + h.flip(2)


class Shift(Net):
    def mix(self, h, t):
        return h + h.roll(1, 2)


class MaxPool(Net):
    """Windows that overlap."""

    def mix(self, h, t):
        return functional.max_pool2d(h, 3, stride=1, padding=1)


class ReflectPad(Net):
    def mix(self, h, t):
        return (
            functional.pad(h, (1, 1, 1, 1), mode="reflect")[:, :, 1:-1, 1:-1]
            + functional.pad(h, (0, 0, 0, 1), mode="reflect")[:, :, 1:]
        )


class Transposed(Net):
    """A transposed convolution whose windows overlap."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 4, stride=2, padding=1)
        self.down = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)

    def mix(self, h, t):
        return self.down(self.up(h))


class Fourier(Net):
    def mix(self, h, t):
        """What FreeU does to skips: low frequencies are scaled."""
        waves = torch.fft.fftn(h.float(), dim=(-2, -1))
        waves[..., :2, :2] *= 0.2
        return torch.fft.ifftn(waves, dim=(-2, -1)).real.to(h.dtype)


class Pointwise(Net):
    """Pixels of a patch are shuffled into channels and back: rows stay what they are."""

    def mix(self, h, t):
        return functional.pixel_shuffle(functional.pixel_unshuffle(h, 2) * 2, 2)


class Masked(Net):
    """Attention in which one token of the picture in three is masked."""

    def mix(self, h, t):
        q, k, v = self.heads(h)
        mask = torch.arange(k.shape[-2], device=h.device) % 3 > 0
        return h + self.picture(
            functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(q.shape[-2], -1)), h
        )


class Windowed(Net):
    """Attention within windows of four rows."""

    def mix(self, h, t):
        windows = h.unflatten(2, (-1, 4)).transpose(1, 2).flatten(0, 1)
        out = self.picture(functional.scaled_dot_product_attention(*self.heads(windows)), windows)
        return h + out.unflatten(0, (h.shape[0], -1)).transpose(1, 2).flatten(2, 3)


class Axial(Net):
    """Attention along each row, then along each column."""

    def mix(self, h, t):
        for across in (False, True):
            x = h.transpose(-1, -2) if across else h
            lines = x.transpose(1, 2).flatten(0, 1).unsqueeze(2)
            out = self.picture(functional.scaled_dot_product_attention(*self.heads(lines)), lines)
            out = out.squeeze(2).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
            h = h + (out.transpose(-1, -2) if across else out)
        return h


class Linear(Net):
    """Linear attention: keys and values are summed up before the queries meet them."""

    def mix(self, h, t):
        q, k, v = self.heads(h)
        return h + self.picture(q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v), h)


class OneHead(Net):
    """Attention on (n, tokens, size), without a dimension of heads."""

    def mix(self, h, t):
        q, k, v = (x.flatten(0, 1) for x in self.heads(h))
        out = functional.scaled_dot_product_attention(q, k, v)
        return h + self.picture(out.unflatten(0, (h.shape[0], 2)), h)


class MultiHead(Net):
    """torch's own module, whose attention no function of Python's is called for."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def mix(self, h, t):
        tokens = h.flatten(2).transpose(1, 2)
        return h + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).unflatten(
            -1, h.shape[-2:]
        )


class Positions(Net):
    """A table of positions for each row and column is added."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, WIDTH, HEIGHT, 8))

    def mix(self, h, t):
        return h + self.table


class RowNumbers(Net):
    """Each row is scaled by its number, counted from what is at hand."""

    def mix(self, h, t):
        return h * torch.linspace(0.5, 1.5, h.shape[2])[:, None]


class Steers(Net):
    """A number read from the activations decides what is done with them."""

    def mix(self, h, t):
        return h * 2 if h.mean().item() > 0.02 else h * 0.5


class SmallMean(Net):
    """The mean of the picture matters little: less than half precision's rounding seems to."""

    def mix(self, h, t):
        return h + 0.05 * h.mean((2, 3), keepdim=True)


class Norm(Net):
    """Lengths and extremes of the whole picture."""

    def mix(self, h, t):
        h = h / h.norm(dim=(2, 3), keepdim=True) + h / torch.linalg.vector_norm(h, dim=(2, 3), keepdim=True)
        h = h / torch.amax(h, (2, 3), keepdim=True) - h.amin((2, 3), keepdim=True)
        return h * functional.adaptive_avg_pool2d(h, 1)


class Deviation(Net):
    """The standard deviation of the whole picture, which is no sum."""

    def mix(self, h, t):
        return h / h.std((2, 3), keepdim=True)


class LinearSums(Net):
    """Linear attention whose keys meet their values in plain sums, as Sana's."""

    def mix(self, h, t):
        q, k, v = (x.relu() for x in self.heads(h))
        v = functional.pad(v, (0, 1), value=1.0)
        out = q @ (k.transpose(-1, -2) @ v)
        return h + self.picture(out[..., :-1] / (out[..., -1:] + 1), h)


class RootMeanSquare(nn.Module):
    """A norm over channels, written out."""

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class NormedSums(Net):
    """Linear attention of which a module inside takes means of another kind before the sums."""

    def __init__(self):
        super().__init__()
        self.norm = RootMeanSquare()

    def mix(self, h, t):
        q, k, v = self.heads(h)
        q, k = self.norm(q).relu(), self.norm(k).relu()
        out = q @ (k.transpose(-1, -2) @ v)
        return h + self.picture(out / (q @ k.sum(-2)[..., None] + 1), h)


class Einsum(Net):
    """Another way to write it, and a mean over some of the rows' dimensions at a time."""

    def mix(self, h, t):
        q, k, v = self.heads(h)
        h = h + self.picture(torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v)) / 128, h)
        return h * h.mean(2).sum(-1)[..., None, None].sigmoid()


class Pooled(Net):
    """Down by pooling, up by repeating."""

    def mix(self, h, t):
        small = functional.max_pool2d(functional.avg_pool2d(h, (1, 2)), 2)
        return h + functional.interpolate(self.wide(functional.group_norm(small, 4)), size=h.shape[-2:])

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


class OwnBetween(Net):
    """Norms and interpolations of its own around convolutions in it."""

    def __init__(self):
        super().__init__()
        self.again = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def mix(self, h, t):
        h = functional.silu(functional.group_norm(h, 4))
        h = functional.silu(functional.group_norm(self.again(functional.interpolate(h, scale_factor=2.0)), 4))
        return functional.avg_pool2d(self.again(h), 2)


NETS = {cls.__name__: cls for cls in Net.__subclasses__()}
