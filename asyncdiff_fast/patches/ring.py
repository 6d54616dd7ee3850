"""Self-attention on one patch, with the keys and values of all patches."""

import math

import torch

from ..calls.schedule import PatchMode
from ..fused import attention_ops
from ..kernels.checks import suits_attention
from .state import Received, State
from .way import lost

_ATTENTION_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class RingState(State):
    """Self-attention: this patch's queries, keys and values of all patches, which lie in one buffer.

    `ring` is (tokens, b, features), tokens of the picture in order of patches, each part in one piece, so that it is
    received, or predicted, where it is read.
    """

    def __init__(self, site, patch, device, predicts=False):
        super().__init__(site, patch, device)
        counts = [site.tokens.count(p) for p in range(len(site.shapes))]
        self.picture, extra = sum(counts), site.tokens.extra
        self.ring = torch.zeros(self.picture + extra, site.key[0], site.features, dtype=site.dtype, device=device)
        self.parts = self.ring[: self.picture].split(counts)
        self.received = [Received(s, x, predicts) for s, x in enumerate(self.parts) if s != patch and len(x)]
        # How many of the others come before the picture; None until the first synchronous step tells.
        self.before = site.tokens.before if extra else 0
        self.sample = None

    def sends(self):
        mine = self.parts[self.patch]
        return [(t, mine) for t in range(len(self.parts)) if t != self.patch and len(mine)]

    def run(self, func, args, kwargs, step):
        if step.mode is PatchMode.LOCAL:
            return func(*args, **kwargs)
        named = dict(zip(_ATTENTION_NAMES, args, strict=False)) | kwargs
        one_head = named["key"].dim() == 3
        if one_head:
            named |= {name: named[name].unsqueeze(1) for name in ("query", "key", "value")}
        self._write(named["key"], named["value"])
        if step.mode is PatchMode.SYNC:
            step.exchange(self)
        if named.get("attn_mask") is not None:
            named["attn_mask"] = self._mask(named["attn_mask"])
            if one_head:
                named["attn_mask"] = named["attn_mask"].unsqueeze(-3)
        named["key"], named["value"] = self.key_value()
        result = self._attended(func, named, step)
        return result.squeeze(1) if one_head else result

    def _attended(self, func, named, step):
        """Attention over the ring where it lies, by the kernel chosen for these shapes."""
        query, scale = named["query"], named.get("scale")
        usual = not any(named.get(option) for option in ("dropout_p", "is_causal", "enable_gqa"))
        if usual and named.get("attn_mask") is None:
            q, k, v = (named[name].transpose(1, 2) for name in ("query", "key", "value"))
            if q.shape[2:] == k.shape[2:] == v.shape[2:] and all(map(suits_attention, (q, k, v))):
                scale = query.shape[-1] ** -0.5 if scale is None else scale

                def run(kernel):
                    return attention_ops.attention(q, [k], [v], scale, kernel)

                kernel = step.pick("attention", q, ((k.shape[1],),), run)
                if kernel != "torch":
                    return run(kernel).transpose(1, 2)
        return func(**named)

    def _split(self, x, dim=-2):
        """(others before it, picture, others behind it) of this patch's tokens."""
        extra = self.site.tokens.extra
        return x.split((self.before, x.shape[dim] - extra, extra - self.before), dim)

    def _write(self, key, value):
        if key.shape[-2] != self.site.shapes[self.patch][-2]:
            lost(f"{self.site.label} attends to {key.shape[-2]} tokens, not to {self.site.shapes[self.patch][-2]}")
        if self.before is None:
            self.before = self._told(key)
        others = self.ring[self.picture :].tensor_split((self.before,))
        for x, features in ((key, slice(0, math.prod(self.site.key[1:]))), (value, slice(-self._value_size, None))):
            before, picture, after = self._split(x)
            start, stop = self.site.tokens.own(self.patch)
            own = picture[..., start:stop, :]
            for target, tokens in zip((self.parts[self.patch], *others), (own, before, after), strict=True):
                place(target, features, tokens)

    @property
    def _value_size(self):
        return math.prod(self.site.value[1:])

    def key_value(self):
        """Keys and values of all tokens, (b, h, s, d) views of the ring."""
        key, value = self.ring.split((self.site.features - self._value_size, self._value_size), -1)
        return tuple(
            x.unflatten(-1, shape[1:]).permute(1, 2, 0, 3)
            for x, shape in ((key, self.site.key), (value, self.site.value))
        )

    def _told(self, key):
        """How many of the others come before the picture, all or none, by their keys in the whole picture's forward."""
        extra = self.site.tokens.extra
        if self.sample is None:
            return 0
        mine = key[(0,) * (key.dim() - 2)][:, : self.sample.shape[-1]].float()
        whole = self.sample.float()
        places = torch.tensor(self.site.tokens.places(self.patch), device=key.device)
        others = torch.arange(extra, device=key.device)
        first = whole[torch.cat((others, places + extra))]
        last = whole[torch.cat((places, others + len(whole) - extra))]
        return extra if (mine - first).abs().max() < (mine - last).abs().max() else 0

    def _mask(self, mask):
        """A mask over this patch's keys, as one over the ring; of the picture's tokens nothing may be masked."""
        if mask.shape[-1] == 1:
            return mask
        before, picture, after = self._split(mask, -1)
        # Of a clip it may tell frames apart, of which every part has some tokens.
        frames = picture.unflatten(-1, (self.site.tokens.outer, -1))[..., :1]
        counts = [self.site.tokens.count(p) // self.site.tokens.outer for p in range(len(self.parts))]
        parts = [frames.expand(*frames.shape[:-1], count).flatten(-2) for count in counts]
        return torch.cat((*parts, before, after), -1)


def place(target, features, tokens):
    """Write keys or values (b, heads, s, d) into some features of a part of a ring, (s, b, features)."""
    if len(target):
        heads = target[..., features].unflatten(-1, (tokens.shape[1], tokens.shape[-1]))
        heads.copy_(tokens.permute(2, 0, 1, 3))
