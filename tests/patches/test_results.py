"""What a denoiser returns beside its picture: all patches have the first one's of what has no rows."""

import patch_nets
import ranks
import torch
from patch_runs import TIMES, assert_refused, outcome
from torch import nn
from torch.nn import functional

import asyncdiff_fast

NUM_SOUNDS = 5


class Sounding(patch_nets.Net):
    """A picture and its sound, which look at each other."""

    def __init__(self):
        super().__init__()
        self.sound = nn.Linear(4, patch_nets.WIDTH)

    def forward(self, x, t, sound):
        h = self.first(x)
        q, k, v = self.heads(h)
        heard = self.sound(sound).unflatten(-1, (2, -1)).transpose(1, 2)
        heard = heard + functional.scaled_dot_product_attention(heard, k, v)
        h = h + self.picture(functional.scaled_dot_product_attention(q, heard, heard), h)
        return self.last(h), heard.transpose(1, 2).flatten(2)[..., :4]


class Telling(patch_nets.Net):
    """A number for each channel instead of a picture."""

    def mix(self, h, t):
        return h

    def forward(self, x, t):
        return super().forward(x, t).mean((2, 3))


def _made(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval().requires_grad_(False)


@torch.no_grad()
def _drawn(net):
    """(picture, sound) after some steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, patch_nets.HEIGHT, 8, generator=generator)
    sound = torch.randn(1, NUM_SOUNDS, 4, generator=generator)
    for t in TIMES:
        a, b = net(x, t, sound=sound)
        x, sound = x - 0.2 * a, sound - 0.2 * b
    return x, sound


def _sounds(rank):
    """[exact results, those of synchronous patches, of displaced ones]."""
    found = [_drawn(_made(Sounding))]
    for options in (dict(exchange="sync"), dict(warmup_steps=1)):
        net = _made(Sounding)
        asyncdiff_fast.patch(net, num_patches=2, timeout_s=60, **options)
        found.append(_drawn(net))
        asyncdiff_fast.unpatch(net)
    net, x = _made(Telling), torch.randn(1, 4, patch_nets.HEIGHT, 8, generator=torch.Generator().manual_seed(0))
    return found, outcome(net, lambda: [net(x, 500)], exchange="sync")


def test_what_has_no_rows_is_alike_on_all_patches():
    by_rank = ranks.run(2, _sounds)
    for found, _ in by_rank:
        exact, synchronous, displaced = found
        for a, b, c in zip(synchronous, exact, displaced, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert not torch.equal(c, b) and (c - b).abs().max() < 0.5
    assert all(map(torch.equal, by_rank[0][0][2], by_rank[1][0][2])), "ranks differ"
    assert_refused([refusal for _, refusal in by_rank], "patches need one dimension of rows", "num_stages")
