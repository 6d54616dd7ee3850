"""Denoisers as users write them, none of them from diffusers: odd ways to hand tensors on, one for each of `NETS`.

Each is called as `net(x, t)` unless `CALLS` says otherwise: x (3, 4, 8, 8), t a scalar; it returns a tensor like x.
"""

import dataclasses

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree

WIDTH = 16


def conv(in_channels=WIDTH, out_channels=WIDTH):
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def embed(t, like):
    """Sines of a timestep, (1, WIDTH, 1, 1)."""
    angles = torch.as_tensor(t, dtype=torch.float32).reshape(-1)[:1, None] * 0.3 * torch.arange(1.0, WIDTH + 1)
    return angles.sin().to(like.dtype)[:, :, None, None]


class Block(nn.Module):
    """silu(conv(x)) with the timestep, if there is one."""

    def __init__(self, in_channels=WIDTH, out_channels=WIDTH):
        super().__init__()
        self.conv = conv(in_channels, out_channels)

    def forward(self, x, emb=None):
        h = self.conv(x)
        return functional.silu(h if emb is None else h + emb)


class Body(nn.Module):
    """conv_in, `num_blocks` of a class of block, conv_out; subclasses say how the blocks are joined."""

    block, num_blocks = Block, 6

    def __init__(self):
        super().__init__()
        self.conv_in = conv(4)
        self.blocks = nn.ModuleList(self.block() for _ in range(self.num_blocks))
        self.conv_out = conv(WIDTH, 4)

    def forward(self, x, t):
        h = self.conv_in(x) + embed(t, x)
        return self.conv_out(self.body(h, embed(t, x)))

    def body(self, h, emb):
        for block in self.blocks:
            h = block(h, emb)
        return h


class UNet(nn.Module):
    """Two levels, skips through a list and a dict."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(WIDTH, WIDTH)
        self.conv_in = conv(4)
        self.down = nn.ModuleList(Block() for _ in range(4))
        self.pool = nn.Conv2d(WIDTH, WIDTH, 2, stride=2)
        self.mid = nn.ModuleDict({"a": Block(), "b": Block()})
        self.up = nn.ModuleList(Block(2 * WIDTH) for _ in range(4))
        self.out = nn.Sequential(nn.GroupNorm(4, WIDTH), nn.SiLU(), conv(WIDTH, 4))

    def forward(self, x, t):
        emb = self.time(embed(t, x).flatten(1))[:, :, None, None]
        h, skips, named = self.conv_in(x), [], {}
        for i, block in enumerate(self.down):
            h = block(h, emb)
            skips.append(h)
            named[f"level {i}"] = h
            if i == 1:
                h = self.pool(h)
        h = self.mid["b"](self.mid["a"](h, emb), emb) + named["level 3"]
        for i, block in enumerate(self.up):
            if i == 2:
                h = functional.interpolate(h, scale_factor=2)
            h = block(torch.cat([h, skips.pop()], 1), emb)
        return self.out(h)


class Layer(nn.Module):
    """A transformer layer with shift, scale and gate out of one projection of the timestep and the tokens' mean."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h, emb):
        parts = self.modulation(functional.silu(emb + h.mean(1))).unsqueeze(1).chunk(6, -1)
        q, k, v = self.qkv(functional.layer_norm(h, h.shape[-1:]) * (1 + parts[1]) + parts[0]).chunk(3, -1)
        h = h + parts[2] * self.proj(functional.scaled_dot_product_attention(q, k, v))
        return h + parts[5] * self.mlp(functional.layer_norm(h, h.shape[-1:]) * (1 + parts[4]) + parts[3])


class Transformer(nn.Module):
    """Patches of 2 x 2 as tokens; the timestep goes into every layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(6))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x, t):
        n, c, height, width = x.shape
        tokens = functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        h, emb = self.embed(tokens), embed(t, x).flatten(1)
        for layer in self.layers:
            h = layer(h, emb)
        return functional.pixel_shuffle(self.head(h).transpose(1, 2).reshape(n, 4 * c, height // 2, width // 2), 2)


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


class Shared(Body):
    num_blocks = 2

    def body(self, h, emb):
        for i in range(8):
            h = h + 0.5 * self.blocks[i % 2](h, emb)
        return h


class NestedBlock(Block):
    def forward(self, state):
        h, extra = state["h"], state["extra"]
        out = super().forward(h, state["emb"])
        return {
            "h": out,
            "extra": (None, [out * 2, extra[1][0] if extra else h]),
            "emb": state["emb"],
            "name": "nested",
        }


class Nested(Body):
    block = NestedBlock

    def body(self, h, emb):
        state = {"h": h, "extra": None, "emb": emb}
        for block in self.blocks:
            state = block(state)
        return state["h"] + state["extra"][1][0] * 0.1 + state["extra"][1][1] * 0.01


@dataclasses.dataclass
class State:
    h: torch.Tensor
    skip: torch.Tensor | None = None


_pytree.register_dataclass(State)


class StateBlock(Block):
    def forward(self, state, emb):
        return State(super().forward(state.h, emb), state.h if state.skip is None else None)


class Dataclasses(Body):
    block = StateBlock

    def body(self, h, emb):
        state, total = State(h), h
        for block in self.blocks:
            state = block(state, emb)
            if state.skip is not None:
                total = total + state.skip
        return state.h + total


class Hidden:
    """A class that pytree does not know."""

    def __init__(self, h):
        self.h = h


class HiddenBlock(Block):
    def forward(self, state, emb):
        return Hidden(super().forward(state.h, emb))


class HiddenStates(Body):
    block = HiddenBlock

    def body(self, h, emb):
        state = Hidden(h)
        for block in self.blocks:
            state = block(state, emb)
        return state.h


class HandsThrough(Body):
    """Blocks return (result, context, unchanged), as those of transformers with text tokens may."""

    class block(Block):
        def forward(self, x, context, emb):
            return super().forward(x, emb) + context.mean(), context, x

    def body(self, h, emb):
        context, total = emb * 2 + h.mean(), 0
        for block in self.blocks:
            h, context, before = block(h, context, emb)
            total = total + before
        return h + 0.1 * total + context


class ReturnsView(Body):
    class block(Block):
        def forward(self, x, emb=None):
            h = super().forward(x, emb)
            return h, x[:, : WIDTH // 2], x.flatten(2), h[:, ::2]

    def body(self, h, emb):
        for block in self.blocks:
            h, part, flat, odd = block(h, emb)
            h = h + torch.cat([part, odd], 1) + 0.1 * flat.unflatten(2, h.shape[2:])
        return h


class OddLayouts(Body):
    """Results that are expanded, boolean, complex, integer, transposed, empty or of another width."""

    class block(Block):
        def forward(self, x, emb=None):
            h = super().forward(x, emb)
            wide = h.mean((0, 2, 3)).view(1, -1, 1, 1).expand_as(h)
            turn = torch.polar(torch.ones_like(h.float()), h.float())
            return h.transpose(2, 3), wide, h > 0.1, turn, (h * 100).long(), h[:0], h.half()

    def body(self, h, emb):
        for block in self.blocks:
            h, wide, mask, turn, whole, none, half = block(h, emb)
            h = (
                torch.where(mask, h.transpose(2, 3), wide)
                + turn.real * 0.1
                + whole * 1e-3
                + none.sum()
                + half.to(h.dtype)
            )
        return h


class KeywordOnly(Body):
    def forward(self, *, timestep, latents, cond=None):
        return super().forward(latents + cond, timestep)


class SigmaCond(Body):
    def forward(self, x, sigma, cond):
        return super().forward(x / (1 + sigma).view(-1, 1, 1, 1), sigma) * cond["scale"][0]


class AnyArguments(Body):
    def forward(self, *args):
        return super().forward(args[0], args[1])


class Attributes(nn.Module):
    """No list of modules anywhere."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv(4), conv(WIDTH, 4)
        self.b1, self.b2, self.b3, self.b4 = Block(), Block(), Block(), Block()
        self.b5, self.b6, self.b7, self.b8 = Block(), Block(), Block(), Block()

    def forward(self, x, t):
        emb = embed(t, x)
        a = self.b1(self.first(x), emb)
        b = self.b2(a, emb)
        c = self.b4(b, emb=self.b3(a, emb).mean((2, 3), keepdim=True))
        d = self.b6(self.b5(c + a), emb)
        return self.last(self.b8(self.b7(d * b, emb) + c))


class Wrapper(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x, t)


class AddsLatent(Body):
    def forward(self, x, t):
        return x + super().forward(x, t)


class DictOutput(Body):
    def forward(self, x, t):
        out = super().forward(x, t)
        return {"prediction": out, "variance": (x * 2, None, out.mean((1, 2, 3)))}


class TupleOutput(Body):
    """The first result is made before the last block."""

    def forward(self, x, t):
        h = self.conv_in(x)
        middle = self.blocks[1](self.blocks[0](h), embed(t, x))
        h = middle
        for block in self.blocks[2:]:
            h = block(h)
        return self.conv_out(h), middle


def sequential():
    return nn.Sequential(conv(4), nn.SiLU(), *[Block() for _ in range(6)], nn.ReLU(inplace=True), conv(WIDTH, 4))


NETS = {
    "unet": UNet,
    "transformer": Transformer,
    "inplace residual": InplaceResidual,
    "inplace blocks": InplaceBlocks,
    "inplace blocks over skips": InplaceSkips,
    "writes an argument": Writers,
    "inplace relu": InplaceRelu,
    "inplace relu over skips": InplaceReluAlone,
    "shared block": Shared,
    "nested results": Nested,
    "registered dataclass": Dataclasses,
    "unknown class": HiddenStates,
    "hands arguments through": HandsThrough,
    "returns views": ReturnsView,
    "odd layouts": OddLayouts,
    "keyword only": KeywordOnly,
    "sigma and cond": SigmaCond,
    "any arguments": AnyArguments,
    "attributes": Attributes,
    "sequential": sequential,
    "wrapper": lambda: Wrapper(Wrapper(UNet())),
    "adds the latent": AddsLatent,
    "dict": DictOutput,
    "tuple": TupleOutput,
    "channels last": lambda: UNet().to(memory_format=torch.channels_last),
    "fp16": lambda: UNet().half(),
    "bf16": lambda: Transformer().bfloat16(),
}


def _tuple_sum(out, middle):
    return out + middle[:, :4]


def _dict_sum(out):
    first, none, last = out["variance"]
    assert none is None
    return out["prediction"] + 0.1 * first + last[:, None, None, None]


CALLS = {
    "keyword only": lambda net, x, t: net(latents=x, timestep=t, cond=0.1 * torch.ones_like(x)),
    "sigma and cond": lambda net, x, t: net(x, torch.full((3,), float(t)), {"scale": [torch.tensor(0.9)]}),
    "sequential": lambda net, x, t: net(x),
    "channels last": lambda net, x, t: net(x.to(memory_format=torch.channels_last), t),
    "fp16": lambda net, x, t: net(x.half(), t).float(),
    "bf16": lambda net, x, t: net(x.bfloat16(), t).float(),
    "dict": lambda net, x, t: _dict_sum(net(x, t)),
    "tuple": lambda net, x, t: _tuple_sum(*net(x, t)),
}
