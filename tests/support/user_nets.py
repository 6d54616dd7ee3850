"""Denoisers as users write them, none of them from diffusers: whole architectures, one for each of `NETS`.

Each is called as `net(x, t)` unless `CALLS` says otherwise: x (3, 4, 8, 8), t a scalar; it returns a tensor like x.
The other files `user_nets_*.py` have `NETS` and `CALLS` of the same kind; `user_runs.py` puts them together.
"""

import torch
from torch import nn
from torch.nn import functional
from user_parts import WIDTH, Block, Body, conv, embed


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


class Shared(Body):
    num_blocks = 2

    def body(self, h, emb):
        for i in range(8):
            h = h + 0.5 * self.blocks[i % 2](h, emb)
        return h


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


def sequential():
    return nn.Sequential(conv(4), nn.SiLU(), *[Block() for _ in range(6)], nn.ReLU(inplace=True), conv(WIDTH, 4))


NETS = {
    "unet": UNet,
    "transformer": Transformer,
    "shared block": Shared,
    "attributes": Attributes,
    "sequential": sequential,
    "wrapper": lambda: Wrapper(Wrapper(UNet())),
    "two towers": Detached,
    "channels last": lambda: UNet().to(memory_format=torch.channels_last),
    "fp16": lambda: UNet().half(),
    "bf16": lambda: Transformer().bfloat16(),
}


CALLS = {
    "sequential": lambda net, x, t: net(x),
    "channels last": lambda net, x, t: net(x.to(memory_format=torch.channels_last), t),
    "fp16": lambda net, x, t: net(x.half(), t).float(),
    "bf16": lambda net, x, t: net(x.bfloat16(), t).float(),
}
