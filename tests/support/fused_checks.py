"""A denoiser with replaced layers against itself: the same result, and undone bit for bit."""

import tiny_denoisers
import tiny_parts
import torch

import asyncdiff_fast

# Sums in another order, in float32, through a whole model.
TOLERANCE = 1e-5


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def attributes(model):
    return {name: set(vars(m)) for name, m in model.named_modules()}


def unet(**changes):
    """A UNet of one level: 7 residual blocks and 3 transformers; 8x8 latents go in."""
    one = dict(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=2, layers_per_block=1,
    )  # fmt: skip
    return tiny_denoisers.sd15_unet(**one | changes)


def unet_inputs():
    torch.manual_seed(0)
    return torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 3, tiny_parts.WIDTH)


def flux_inputs(tokens=4):
    torch.manual_seed(0)
    width = tiny_parts.WIDTH
    return dict(
        hidden_states=torch.randn(1, tokens, 16),
        encoder_hidden_states=torch.randn(1, 3, width),
        pooled_projections=torch.randn(1, width),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        txt_ids=torch.zeros(3, 3),
        img_ids=torch.tensor([[0.0, i // 2, i % 2] for i in range(tokens)]),
        return_dict=False,
    )


@torch.no_grad()
def compare(model, *args, **kwargs):
    """Relative difference of a patched call from an unpatched one; checks that `unpatch` undoes everything."""

    def call():
        result = model(*args, **kwargs)
        return result[0] if isinstance(result, tuple) else getattr(result, "sample", result)

    want, before = call(), attributes(model)
    runtime = asyncdiff_fast.patch(model, kernels="triton")
    got, layers = call(), runtime.stats()["kernels"]["layers"]
    asyncdiff_fast.unpatch(model)
    assert attributes(model) == before
    assert torch.equal(call(), want)
    return relative(got, want), layers
