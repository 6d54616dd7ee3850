"""Small denoisers that run on ranks and in the plain simulations of patches: how they are made and called."""

import tiny_denoisers
import torch

TIMES = (900, 700, 500, 300)
TEXT = 5


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _unet(model, x, t):
    return model(x, t, encoder_hidden_states=_random(len(x), TEXT, 32)).sample


def _pixart(model, x, t):
    conditions = {"resolution": None, "aspect_ratio": None}
    text, timestep = _random(len(x), TEXT, 32), torch.full((len(x),), t)
    return model(x, text, timestep=timestep, added_cond_kwargs=conditions).sample.chunk(2, 1)[0]


def _sd3(model, x, t):
    text, pooled = _random(len(x), TEXT, 32), _random(len(x), 64)
    return model(x, text, pooled_projections=pooled, timestep=torch.full((len(x),), float(t))).sample


def _flux(model, x, t):
    ids = torch.zeros(x.shape[1], 3)
    ids[:, 1], ids[:, 2] = torch.arange(x.shape[1]) // 4, torch.arange(x.shape[1]) % 4
    numbers = dict(timestep=torch.full((len(x),), t / 1000), guidance=torch.ones(len(x)))
    text = dict(encoder_hidden_states=_random(len(x), TEXT, 32), pooled_projections=_random(len(x), 32))
    return model(x, img_ids=ids, txt_ids=torch.zeros(TEXT, 3), **text, **numbers).sample


# How a denoiser is made and called, its latent, and {keys of a self-attention: (first of the picture's, rows)}.
MODELS = {
    "unet": (tiny_denoisers.sd15_unet, _unet, (2, 4, 16, 8), {128: (0, 16), 32: (0, 8), 8: (0, 4), 2: (0, 2)}),
    "tall unet": (tiny_denoisers.sd15_unet, _unet, (1, 4, 24, 8), {192: (0, 24), 48: (0, 12), 12: (0, 6), 3: (0, 3)}),
    "pixart": (tiny_denoisers.pixart_transformer, _pixart, (2, 4, 16, 8), {32: (0, 8)}),
    "sd3": (tiny_denoisers.sd3_transformer, _sd3, (1, 4, 16, 8), {32 + TEXT: (0, 8)}),
    "flux": (tiny_denoisers.flux_transformer, _flux, (1, 24, 16), {24 + TEXT: (TEXT, 24)}),
}

# Stages of SD3: the first ends in what a block does for its text.
INSIDE_A_BLOCK = (
    ("transformer_blocks.0.norm1", "transformer_blocks.0.attn", "transformer_blocks.0.ff_context.net.0"),
    ("transformer_blocks.0.ff_context.net.2", *(f"transformer_blocks.{i}" for i in range(1, 6))),
)


@torch.no_grad()
def predictions(name):
    """A function that gives the predictions of a few steps with a denoiser."""
    _, call, shape, _ = MODELS[name]

    def run(model):
        x, found = _random(*shape), []
        for t in TIMES:
            found.append(call(model, x, t))
            x = x - 0.3 * found[-1]
        return torch.stack(found)

    return run
