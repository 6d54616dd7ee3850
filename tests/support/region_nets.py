"""Small transformers whose blocks take any tokens, but that count on the picture's size around them.

Each is called as `net(x, t, **more)`, x (1, 4, 16, 16); `MORE[name](seed)` makes what it takes beside them.
"""

import torch
from token_nets import WIDTH, TokenNet
from torch import nn
from torch.nn import functional as F

SIZE, SIDE = 16, 8
TOKENS = SIDE * SIDE


class Block(nn.Module):
    """Self-attention and a layer, of tokens (b, s, d)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, shift, beside=None):
        x = x if beside is None else torch.cat((x, beside), 1)
        q, k, v = self.qkv(x + shift).unsqueeze(1).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x if beside is None else x.split((x.shape[1] - beside.shape[1], beside.shape[1]), 1)


class Plain(TokenNet):
    """Runs on any rows."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, t):
        tokens = self.embed(self.tokens(x)) + self.positions(TOKENS)[: x.shape[2] * x.shape[3] // 4] + t / 1000
        for block in self.blocks:
            tokens = block(tokens, 0.1)
        return self.pixels(self.out(tokens), x)


class Square(Plain):
    """A fixed table of positions; takes its tokens for a square."""

    def forward(self, x, t):
        tokens = self.embed(self.tokens(x)) + self.positions(TOKENS) + t / 1000
        for block in self.blocks:
            tokens = block(tokens, 0.1)
        tokens, side = self.out(tokens), 2 * int(tokens.shape[1] ** 0.5)
        return self.pixels(tokens, tokens.new_empty(len(x), 4, side, side))


class Counted(Plain):
    """The forward counts tokens before its blocks, positions come in a table too long, and blocks get a value of each.

    Beside the picture runs a text of as many tokens, whose stream each block gives back.
    """

    def forward(self, x, t, encoder_hidden_states, table):
        tokens, text, shape = self.embed(self.tokens(x)), encoder_hidden_states, x.shape
        shift = table[: tokens.shape[1]].unsqueeze(0) * (1 + t / 1000)
        shift = torch.cat((shift, torch.zeros_like(text)), 1)
        for block in self.blocks:
            tokens, text = block(tokens, shift, text)
        return self.pixels(self.out(tokens), torch.empty(shape))


class Behind(Square):
    """Blocks get the picture behind what was drawn before, and attend to a text beside both."""

    def forward(self, x, t, before, encoder_hidden_states):
        tokens = self.embed(self.tokens(x)) + self.positions(TOKENS) + t / 1000
        tokens, text = torch.cat((before, tokens), 1), encoder_hidden_states
        for block in self.blocks:
            tokens, text = block(tokens, 0.1, text)
        return self.pixels(self.out(tokens[:, -TOKENS:]), x.new_empty(len(x), 4, SIZE, SIZE))


class SequenceFirst(Square):
    """Tokens (s, b, d); a sum over the picture behind the blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Turned() for _ in range(2))

    def forward(self, x, t):
        tokens = (self.embed(self.tokens(x)) + self.positions(TOKENS) + t / 1000).transpose(0, 1)
        for block in self.blocks:
            tokens = block(tokens, 0.1)
        tokens = self.out(tokens).transpose(0, 1)
        return self.pixels(tokens - tokens.mean(1, keepdim=True), x.new_empty(len(x), 4, SIZE, SIZE))


class Turned(Block):
    def forward(self, x, shift):
        return super().forward(x.transpose(0, 1), shift).transpose(0, 1)


class Grouped(Square):
    """Tokens are sorted by the layer that they go to."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Routed() for _ in range(2))


class Routed(Block):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x, shift):
        flat = super().forward(x, shift).flatten(0, 1)
        choice, result = self.router(flat).argmax(-1), torch.zeros_like(flat)
        order, counts = choice.argsort(), choice.bincount(minlength=2).cpu().numpy().tolist()
        for expert, mine in zip(self.experts, order.split(counts), strict=True):
            result = result.index_add(0, mine, expert(flat[mine]))
        return (flat + result).view_as(x)


class Chooses(Square):
    """Blocks keep half of the tokens."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Half() for _ in range(2))


class Half(Block):
    def forward(self, x, shift):
        chosen = x[..., 0].topk(x.shape[1] // 2, -1).indices
        return super().forward(x, shift).scatter_add(1, chosen[..., None].expand(-1, -1, WIDTH), torch.ones_like(x))


class Hidden(Square):
    """Blocks mix rows out of sight."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Mean() for _ in range(2))


class Banded(Square):
    """Tokens see their neighbours only."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Near() for _ in range(2))

    def forward(self, x, t):
        places = torch.arange(TOKENS)
        tokens, mask = self.embed(self.tokens(x)) + t / 1000, (places - places[:, None]).abs()[None, None] < 9
        for block in self.blocks:
            tokens = block(tokens, mask)
        return self.pixels(self.out(tokens), x.new_empty(len(x), 4, SIZE, SIZE))


class Near(Block):
    def forward(self, x, mask):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0])


class Mean(Block):
    def forward(self, x, shift):
        return super().forward(x, shift) + torch.from_numpy(x.numpy().mean(1, keepdims=True))


def _beside(seed):
    draw = torch.Generator().manual_seed(seed)
    return dict(
        encoder_hidden_states=torch.randn(1, TOKENS, WIDTH, generator=draw),
        table=torch.randn(2 * TOKENS, WIDTH, generator=draw),
    )


def _before(seed):
    draw = torch.Generator().manual_seed(seed)
    before, text = torch.randn(1, 9, WIDTH, generator=draw), torch.randn(1, 5, WIDTH, generator=draw)
    return dict(before=before, encoder_hidden_states=text)


MORE = {Counted: _beside, Behind: _before}
RIGHT = (Square, Behind, Counted, SequenceFirst, Grouped)


def build(kind):
    """A net, always the same; those with the same layers have the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval().requires_grad_(False)


def steps(net, seed=0, times=(900.0, 700.0, 500.0, 300.0, 100.0)):
    """Its results at a few steps of one generation."""
    x, found = torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)), []
    for t in times:
        found.append(net(x, t, **MORE.get(type(net), lambda seed: {})(seed)))
        x = x - 0.2 * found[-1]
    return found
