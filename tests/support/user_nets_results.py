"""Denoisers with odd arguments and results: nested, hidden in classes, views of arguments, of odd layouts."""

import dataclasses

import torch
from torch.utils import _pytree
from user_parts import WIDTH, Block, Body, embed


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


NETS = {
    "nested results": Nested,
    "registered dataclass": Dataclasses,
    "unknown class": HiddenStates,
    "hands arguments through": HandsThrough,
    "returns views": ReturnsView,
    "odd layouts": OddLayouts,
    "keyword only": KeywordOnly,
    "sigma and cond": SigmaCond,
    "any arguments": AnyArguments,
    "adds the latent": AddsLatent,
    "dict": DictOutput,
    "tuple": TupleOutput,
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
    "dict": lambda net, x, t: _dict_sum(net(x, t)),
    "tuple": lambda net, x, t: _tuple_sum(*net(x, t)),
}
