"""Inputs that are brought to the picture's rows within, such as IP-Adapter's masks: cut where they meet the picture."""

import neighbours
import numpy as np
import ranks
import tiny_pipelines
import torch
from patch_runs import difference, outcome
from token_nets import TokenNet
from torch.nn import functional as F

import asyncdiff_fast

SIZE, LATENT = 32, 16


def _mask(size, *corners):
    """A mask for each picture, with ones from its row and column on."""
    mask = torch.zeros(1, len(corners), size, size)
    for i, (row, column) in enumerate(corners):
        mask[:, i, row * size // 8 :, column * size // 8 :] = 1
    return mask


# Of the latent's size, a mask is first taken for one that is cut as the latent is.
MASKS = {
    "sd15": {"whole": _mask(SIZE, (0, 0)), "lower": _mask(SIZE, (3, 1))},
    "sdxl": {"two, of the latent's size": _mask(LATENT, (2, 0), (0, 5))},
}


def _masked(name):
    pipe = tiny_pipelines.build(name)
    neighbours.add_ip_adapter(pipe)
    return pipe


def _draw(pipe, name, mask):
    width = pipe.unet.config.cross_attention_dim
    embeds = torch.randn(2, mask.shape[1], width, generator=torch.Generator().manual_seed(1))
    more = dict(ip_adapter_image_embeds=[embeds], cross_attention_kwargs={"ip_adapter_masks": [mask]})
    return tiny_pipelines.generate(pipe, name, steps=2, **more)


class Lit(TokenNet):
    """A light, given in pixels of another picture, falls on the tokens."""

    def forward(self, x, t, light):
        tokens = self.embed(self.tokens(x)) * (1 + t / 1000)
        light = F.interpolate(light, size=(x.shape[2] // 2, x.shape[3] // 2), mode="bilinear")
        return self.pixels(self.out(self.attend(tokens * light.flatten(2).transpose(1, 2))), x)


def _lit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Lit().eval().requires_grad_(False)


def _light(seed, size=(9, 7)):
    return torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(seed))


def _steps(net, lights):
    """Two generations, each in a light of its own."""
    found, x = [], torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    for light in lights:
        found += [net(x * (1 + i), 900.0 - 300 * i, light=light) for i in range(3)]
    return found


@torch.no_grad()
def _all(rank):
    found = {}
    for name, masks in MASKS.items():
        pipe = _masked(name)
        plain = [_draw(pipe, name, mask) for mask in masks.values()]
        asyncdiff_fast.patch(pipe, num_patches=2, exchange="sync", timeout_s=60)
        for (mask, x), right in zip(masks.items(), plain, strict=True):
            found[name, mask] = float(np.abs(_draw(pipe, name, x) - right).max())
        asyncdiff_fast.unpatch(pipe)
        found[name, "it matters"] = float(np.abs(plain[-1] - _draw(pipe, name, torch.ones_like(x))).max())
    found["displaced", "of another size"] = _displaced(_mask(27, (1, 3)))
    net, lights = _lit(), [_light(0), torch.ones(1, 1, 9, 7), _light(1)]
    plain = _steps(net, lights)
    found["light", "other"] = difference(outcome(net, lambda: _steps(net, lights), exchange="sync"), plain)
    return found


def _displaced(mask):
    """How far calls with the same inputs are apart from those unpatched."""
    unet, draw = _masked("sd15").unet, torch.Generator().manual_seed(2)
    latent, text, image = (torch.randn(1, *size, generator=draw) for size in ((4, LATENT, LATENT), (8, 32), (1, 32)))
    more = dict(added_cond_kwargs={"image_embeds": [image]}, cross_attention_kwargs={"ip_adapter_masks": [mask]})

    def run():
        return [unet(latent, 500, text, **more)[0] for _ in range(4)]

    plain = run()
    return difference(outcome(unet, run, warmup_steps=1), plain)


def test_masks_are_cut_where_they_meet_the_picture():
    for found in ranks.run(2, _all):
        assert min(x for (_, kind), x in found.items() if kind == "it matters") > 1e-2
        wrong = {k: x for k, x in found.items() if k[1] != "it matters" and not x <= 1e-4}
        assert not wrong, wrong


def test_the_plan_tells_which():
    inputs = dict(x=torch.randn(1, 4, 12, 8), t=5.0, light=_light(0))
    told = str(asyncdiff_fast.plan(_lit(), inputs, num_patches=3))
    assert "cut: x in dimension 2, light where it meets the picture; all else whole" in told
    # A light as large as the picture is first taken for one that is cut as it is.
    inputs["light"] = _light(0, (12, 8))
    assert "light where it meets" in str(asyncdiff_fast.plan(_lit(), inputs, num_patches=2))
