"""Denoisers with replaced layers against themselves: pipelines, single blocks, and what torch still computes."""

import diffusers
import pytest
import tiny_parts
import tiny_pipelines
import torch
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock, TemporalConvLayer
from fused_checks import TOLERANCE, attributes, compare, relative
from seen_ops import SeenOps
from torch import nn

import asyncdiff_fast

PIPELINES = {
    "sdxl": ("ResnetBlock2D", "GroupNorm", "Transformer2DModel", "BasicTransformerBlock", "GEGLU"),
    "sd3": ("JointTransformerBlock", "AdaLayerNormZero", "AdaLayerNormContinuous"),
    "flux": ("FluxTransformerBlock", "FluxSingleTransformerBlock", "FluxAttention", "AdaLayerNormZeroSingle"),
    "pixart": ("BasicTransformerBlock",),
    "sd15": ("ResnetBlock2D", "GroupNorm", "GEGLU"),
    "animatediff": ("ResnetBlock2D", "GroupNorm", "GEGLU"),
    "svd": ("ResnetBlock2D", "TemporalResnetBlock", "GroupNorm", "GEGLU"),
}
# What the interpreter makes slow for its size; their parts are below.
MARKS = {"sdxl": [pytest.mark.slow, pytest.mark.timeout(900)]} | dict.fromkeys(
    ("sd15", "animatediff"), pytest.mark.exhaustive
)
MARKS["svd"] = [pytest.mark.exhaustive, pytest.mark.timeout(900)]
SMALLER = {
    # Programs are one after the other here, and the second half of guidance has as many.
    "sdxl": dict(guidance_scale=1.0, height=16, width=16),
    "svd": dict(num_frames=2, max_guidance_scale=1.0),
    "animatediff": dict(num_frames=2, guidance_scale=1.0),
    "sd3": dict(guidance_scale=1.0, height=16, width=16),
    # The fewest steps that its scheduler knows.
    "pixart": dict(steps=2, guidance_scale=1.0, height=16, width=16),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in PIPELINES])
def test_pipeline(name):
    pipe, outputs = tiny_pipelines.build(name), []
    denoiser = tiny_pipelines.denoiser(pipe)
    watch = denoiser.register_forward_hook(lambda module, args, output: outputs.append(output[0]))

    def picture():
        return torch.from_numpy(tiny_pipelines.generate(pipe, name, **dict(steps=1) | SMALLER.get(name, {})))

    want, before = picture(), attributes(denoiser)
    calls = len(outputs)
    runtime = asyncdiff_fast.patch(pipe, kernels="triton")
    got = picture()
    assert set(PIPELINES[name]) <= set(runtime.stats()["kernels"]["layers"])
    asyncdiff_fast.unpatch(pipe)
    assert attributes(denoiser) == before
    watch.remove()
    assert relative(outputs[calls], outputs[0]) < TOLERANCE
    assert (got - want).abs().max() < 1e-4
    assert torch.equal(picture(), want)


def test_video_block():
    block = tiny_parts.fill(SpatioTemporalResBlock(32, 64, temb_channels=8))
    x, temb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    difference, layers = compare(block, x, temb, torch.zeros(1, 2))
    assert difference < TOLERANCE
    assert layers == {"ResnetBlock2D": 1, "TemporalResnetBlock": 1}


def test_animatediff_block():
    block = tiny_parts.fill(
        diffusers.models.unets.unet_motion_model.AnimateDiffTransformer3D(2, 8, in_channels=16, norm_num_groups=4)
    )
    difference, layers = compare(block, torch.randn(3, 16, 4, 4), num_frames=3)
    assert difference < TOLERANCE
    assert layers == {"GroupNorm": 1, "BasicTransformerBlock": 1, "GEGLU": 1, "Attention": 2}


def test_norms_and_activations_in_a_row():
    block = tiny_parts.fill(TemporalConvLayer(16, norm_num_groups=4))
    difference, layers = compare(block, torch.randn(3, 16, 4, 4), num_frames=3)
    assert difference < TOLERANCE
    assert layers == {"Sequential": 4}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        dict(time_embedding_norm="scale_shift"),
        dict(skip_time_act=True, output_scale_factor=2.0),
        dict(out_channels=24),
        dict(non_linearity="mish"),
    ],
    ids=lambda options: next(iter(options)),
)
def test_kinds_of_residual_block(options, layout):
    options = dict(in_channels=16, temb_channels=8, groups=4) | options
    block = tiny_parts.fill(ResnetBlock2D(**options)).to(memory_format=layout)
    x = torch.randn(2, 16, 5, 7).to(memory_format=layout)
    difference, layers = compare(block, x, torch.randn(2, 8))
    assert difference < TOLERANCE
    assert layers == {"ResnetBlock2D": 1}


@pytest.mark.parametrize("linear", [True, False])
@torch.no_grad()
def test_a_transformer_keeps_the_memory_format(linear):
    """Its result is a sum that has its statistics; kernels take the sums inside it with their norms."""
    options = dict(in_channels=16, num_layers=2, norm_num_groups=4, cross_attention_dim=8)
    model = diffusers.models.Transformer2DModel(2, 8, **options, use_linear_projection=linear)
    x, text = torch.randn(2, 16, 5, 3).to(memory_format=torch.channels_last), torch.randn(2, 3, 8)
    model = tiny_parts.fill(model).to(memory_format=torch.channels_last)
    difference, layers = compare(model, x, text)
    assert difference < TOLERANCE
    assert layers == {
        "Transformer2DModel": 1, "GroupNorm": 1, "BasicTransformerBlock": 2, "GEGLU": 2, "Attention": 4
    }  # fmt: skip
    choice = asyncdiff_fast.patch(model, kernels="triton")._layers.choice
    with SeenOps() as seen:
        y = model(x, text).sample
    # The first block's last sum goes through the second's first norm, which is left out there.
    assert seen.names.count("asyncdiff_fast::add_layer_norm") == 5
    assert seen.names.count("aten::native_layer_norm") == 1
    assert seen.names.count("asyncdiff_fast::residual_add") == 1
    assert y.is_contiguous(memory_format=torch.channels_last) and choice.sums.recall(y) is not None
    model.transformer_blocks[1].norm1.register_forward_hook(lambda module, args, result: calls.append(module))
    calls = []
    assert relative(model(x, text).sample, y) < TOLERANCE and len(calls) == 1, "a norm with a hook is called"
    masked = model(x, text, encoder_attention_mask=torch.ones(2, 3)).sample
    asyncdiff_fast.unpatch(model)
    assert relative(masked, y) < TOLERANCE


@torch.no_grad()
def test_a_sum_hands_its_statistics_to_the_next_norm():
    first, second = (tiny_parts.fill(ResnetBlock2D(in_channels=16, temb_channels=8, groups=4)) for _ in range(2))
    both = nn.ModuleList([first, second])
    x, temb = torch.randn(2, 16, 5, 7) * 3 + 5, torch.randn(2, 8)
    want = second(first(x, temb), temb)
    choice = asyncdiff_fast.patch(both, kernels="triton")._layers.choice
    y = first(x, temb)
    assert choice.sums.recall(y) is not None
    assert relative(second(y, temb), want) < TOLERANCE
    assert choice.sums.recall(y) is None and choice.sums.recall(x) is None, "a later sum has come"
    y = first(x, temb)
    y.mul_(2)
    assert choice.sums.recall(y) is None, "it has been changed"
    assert relative(second(y, temb), second(y.clone(), temb)) < TOLERANCE
    asyncdiff_fast.unpatch(both)


@pytest.mark.parametrize("up_or_down", ["up", "down"])
def test_resampling_block_keeps_its_forward(up_or_down):
    block = tiny_parts.fill(ResnetBlock2D(in_channels=16, temb_channels=8, groups=4, **{up_or_down: True}))
    difference, layers = compare(block, torch.randn(1, 16, 4, 4), torch.randn(1, 8))
    assert difference < TOLERANCE
    assert layers == {"GroupNorm": 2}


@torch.no_grad()
def test_nothing_of_torch_is_left_in_a_residual_block():
    block = tiny_parts.fill(ResnetBlock2D(in_channels=16, out_channels=24, temb_channels=8, groups=4))
    x, temb = torch.randn(2, 16, 5, 7), torch.randn(2, 8)
    with SeenOps() as plain:
        block(x, temb)
    assert {"aten::silu", "aten::native_group_norm", "aten::add", "aten::div"} <= set(plain.names)
    asyncdiff_fast.patch(block, kernels="triton")
    with SeenOps() as patched:
        block(x, temb)
    asyncdiff_fast.unpatch(block)
    kernels = {name for name in patched.names if name.startswith("asyncdiff_fast::")}
    assert kernels == {"asyncdiff_fast::group_norm", "asyncdiff_fast::residual_add"}
    # Views aside, three convolutions are all that torch still computes.
    assert set(patched.names) - kernels <= {
        "aten::convolution",
        "aten::mkldnn_convolution",
        "aten::detach",
        "aten::alias",
    }


@torch.no_grad()
def test_launchers_make_no_pass_of_torch():
    """Within the ops, too: `SeenOps` sees no further than a registered op."""
    from asyncdiff_fast.kernels import group_norm

    x, vector = torch.randn(2, 16, 5, 7), torch.randn(16)
    with SeenOps() as seen:
        group_norm.group_norm(x, vector, vector, 4, 1e-5, act="silu", conv_bias=vector, temb=torch.randn(2, 16))
        group_norm.residual_partials(x, x, bias=vector)
    assert not set(seen.names) & {
        "aten::cat",
        "aten::pad",
        "aten::constant_pad_nd",
        "aten::silu",
        "aten::native_group_norm",
    }
