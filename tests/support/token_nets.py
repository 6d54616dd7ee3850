"""Small transformers that make tokens of their latent in many ways, and take inputs with a value for each token.

Each is called as `net(x, t, **more)`, x (1, 4, frames, 12, 8) for clips, else (1, 4, 12, 8); `MORE[name](frames)` makes
what it takes beside them.
"""

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEIGHT, FRAMES, TEXT = 16, 12, 3, 5


class TokenNet(nn.Module):
    """Tokens of 2 x 2 pixels by a reshape and a linear layer; positions; one attention beside some text; pixels."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 16)

    def tokens(self, x):
        b, c, h, w = x.shape
        return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 16)

    def pixels(self, tokens, like):
        b, c, h, w = like.shape
        return tokens.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)

    def positions(self, count, first=0):
        return torch.sin((torch.arange(count) + first)[:, None] * torch.linspace(0.1, 1, WIDTH))

    def attend(self, x, mask=None):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]

    def forward(self, x, t):
        tokens = self.embed(self.tokens(x)) * (1 + t / 1000)
        return self.pixels(self.out(self.attend(tokens + self.positions(tokens.shape[1]))), x)


class ColumnsFirst(TokenNet):
    def tokens(self, x):
        return super().tokens(x).unflatten(1, (-1, x.shape[-1] // 2)).transpose(1, 2).flatten(1, 2)

    def pixels(self, tokens, like):
        return super().pixels(tokens.unflatten(1, (like.shape[-1] // 2, -1)).transpose(1, 2).flatten(1, 2), like)


class EachFrame(TokenNet):
    """A convolution for each frame of a clip, whose tokens are one sequence."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 2, stride=2)

    def tokens(self, x):
        frames = self.conv(x.transpose(1, 2).flatten(0, 1))
        return frames.flatten(2).transpose(1, 2).unflatten(0, (x.shape[0], -1)).flatten(1, 2)

    def pixels(self, tokens, like):
        b, c, f, h, w = like.shape
        return tokens.view(b, f, h // 2, w // 2, c, 2, 2).permute(0, 4, 1, 2, 5, 3, 6).reshape(b, c, f, h, w)


class TextFirst(TokenNet):
    """Joint attention; the mask is over text and picture."""

    last = False

    def forward(self, x, t, encoder_hidden_states, attention_mask):
        parts = [encoder_hidden_states, self.embed(self.tokens(x))]
        joint = torch.cat(parts[::-1] if self.last else parts, 1)
        joint = self.attend(joint + self.positions(joint.shape[1]), attention_mask[:, None, None].bool())
        size = parts[1].shape[1]
        return self.pixels(self.out(joint[:, :size] if self.last else joint[:, -size:]), x)


class TextLast(TextFirst):
    last = True


class TextAround(TextFirst):
    """Some of the text comes before the picture, the rest behind it."""

    def forward(self, x, t, encoder_hidden_states, attention_mask):
        first, last = encoder_hidden_states.split((2, TEXT - 2), 1)
        joint = torch.cat((first, self.embed(self.tokens(x)), last), 1)
        joint = self.attend(joint + self.positions(joint.shape[1]), attention_mask[:, None, None].bool())
        return self.pixels(self.out(joint[:, 2 : 2 - TEXT]), x)


class TimeOfTokens(TokenNet):
    def forward(self, x, timestep):
        tokens = self.embed(self.tokens(x)) * (1 + timestep.unsqueeze(-1) / 1000)
        return self.pixels(self.out(self.attend(tokens)), x)


class OddName(TokenNet):
    """An input with a value for each token, whose name says that it is the prompt's."""

    def forward(self, x, t, text_weights):
        return self.pixels(self.out(self.attend(self.embed(self.tokens(x)) * text_weights)), x)


class Layer:
    """What a layer attends to beside the picture."""

    def __init__(self, seed):
        # Of another picture, there are more.
        self.tokens = _random(1, 3 + 2 * seed, WIDTH, seed=seed)


class Memory:
    """As pipelines keep what was drawn before."""

    def __init__(self, seed):
        self.layers = [Layer(seed)]


class Remembers(TokenNet):
    """Attends to tokens in an object."""

    def forward(self, x, t, memory):
        before = memory.layers[0].tokens
        tokens = torch.cat((before, self.embed(self.tokens(x)) + t / 1000), 1)
        return self.pixels(self.out(self.attend(tokens)[:, before.shape[1] :]), x)


class Recalls(Remembers):
    """Attends to tokens that a function gives."""

    def forward(self, x, t, recall):
        return super().forward(x, t, recall())


class ReadsNumbers(TokenNet):
    """Positions begin behind the text, whose length is read from its mask."""

    def forward(self, x, t, text_mask):
        tokens = self.embed(self.tokens(x))
        positions = self.positions(tokens.shape[1], int(text_mask.sum()))
        return self.pixels(self.out(self.attend(tokens + positions)), x)


class TakesNumbers(TokenNet):
    """Positions begin at a number that is an argument, in a list."""

    def forward(self, x, t, first):
        tokens = self.embed(self.tokens(x))
        return self.pixels(self.out(self.attend(tokens + self.positions(tokens.shape[1], first[0]))), x)


class Pops(TokenNet):
    """Takes its residuals out of a list."""

    def forward(self, x, t, residuals):
        tokens = self.embed(self.tokens(x))
        while residuals:
            tokens = self.attend(tokens + residuals.pop())
        return self.pixels(self.out(tokens), x)


class InLists(TokenNet):
    """Takes and gives pictures in a list."""

    def forward(self, x, t):
        return [TokenNet.forward(self, picture[None], t)[0] for picture in x]


class Switched(TokenNet):
    """A second attention, in a module of its own, that is on for some steps only."""

    def __init__(self):
        super().__init__()
        self.second = TokenNet()

    def forward(self, x, t):
        tokens = self.attend(self.embed(self.tokens(x)))
        if 300 < t < 800:
            tokens = self.second.attend(tokens)
        return self.pixels(self.out(tokens), x)


class HiddenMean(TokenNet):
    """Rows are mixed little, out of sight, and only late."""

    def forward(self, x, t):
        tokens = self.attend(self.embed(self.tokens(x)))
        mean = torch.from_numpy(tokens.float().numpy().mean(1, keepdims=True)).to(tokens)
        tokens = tokens + max(0.0, 0.5 - t / 1000) * 0.3 * mean
        return self.pixels(self.out(tokens), x)


class Experts(TokenNet):
    """Each token goes to one of two layers."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Mixture() for _ in range(4))

    def forward(self, x, t):
        tokens = self.embed(self.tokens(x)) + t / 1000
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.pixels(self.out(tokens), x)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, 1)
        choice, result = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            mine = torch.nonzero(choice == i).flatten()
            result = result.index_add(0, mine, expert(flat[mine]))
        return result.view_as(x)


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _joint(size, seed):
    mask = torch.ones(1, TEXT + size)
    return dict(encoder_hidden_states=_random(1, TEXT, WIDTH, seed=seed), attention_mask=mask)


def _masked(size, seed):
    found = _joint(size, seed)
    found["attention_mask"][:, 2:TEXT] = 0
    return found


SIZE = HEIGHT * 8 // 4
# What each takes beside the latent and the timestep, by a seed.
MORE = {
    TokenNet: lambda seed: {}, ColumnsFirst: lambda seed: {}, EachFrame: lambda seed: {}, InLists: lambda seed: {},
    Switched: lambda seed: {},
    TextFirst: lambda seed: _masked(SIZE, seed), TextLast: lambda seed: _joint(SIZE, seed),
    TextAround: lambda seed: _joint(SIZE, seed),
    TimeOfTokens: lambda seed: {}, OddName: lambda seed: dict(text_weights=_random(1, SIZE, 1, seed=seed)),
    ReadsNumbers: lambda seed: dict(text_mask=torch.arange(9)[None] < 4 + seed),
    TakesNumbers: lambda seed: dict(first=[10 * seed]),
    Pops: lambda seed: dict(residuals=[_random(1, SIZE, WIDTH, seed=i) for i in range(2)]),
    Remembers: lambda seed: dict(memory=Memory(seed)), Recalls: lambda seed: dict(recall=lambda: Memory(seed)),
    HiddenMean: lambda seed: {}, Experts: lambda seed: {},
}  # fmt: skip


def build(kind):
    """A net, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval().requires_grad_(False)


def steps(net, seed=0, times=(900.0, 700.0, 500.0, 300.0, 100.0)):
    """Its results at a few steps of one generation."""
    clip = (FRAMES,) if isinstance(net, EachFrame) else ()
    x, found = _random(1 + isinstance(net, InLists), 4, *clip, HEIGHT, 8, seed=seed), []
    for t in times:
        given = torch.full((1, SIZE), t) * (torch.arange(SIZE) > 7) if isinstance(net, TimeOfTokens) else t
        latent = list(x) if isinstance(net, InLists) else x
        result = net(latent, given, **MORE[type(net)](seed))
        found.append(torch.stack(result) if isinstance(net, InLists) else result)
        x = x - 0.2 * found[-1]
    return found
