"""Denoisers with replaced layers against themselves: the same result, undone bit for bit, with adapters and hooks."""

import copy

import diffusers
import pytest
import ranks
import tiny_denoisers
import tiny_parts
import tiny_pipelines
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock, TemporalConvLayer
from seen_ops import SeenOps
from torch import nn

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


PIPELINES = {
    "sdxl": ("ResnetBlock2D", "GroupNorm", "GEGLU"),
    "sd3": ("JointTransformerBlock", "AdaLayerNormZero", "AdaLayerNormContinuous"),
    "flux": ("FluxTransformerBlock", "FluxSingleTransformerBlock", "FluxAttention", "AdaLayerNormZeroSingle"),
    "pixart": ("BasicTransformerBlock",),
    "sd15": ("ResnetBlock2D", "GroupNorm", "GEGLU"),
    "animatediff": ("ResnetBlock2D", "GroupNorm", "GEGLU"),
    "svd": ("ResnetBlock2D", "TemporalResnetBlock", "GroupNorm", "GEGLU"),
}
# What the interpreter makes slow for its size; their parts are below.
MARKS = dict.fromkeys(("sdxl", "sd15", "animatediff", "svd"), pytest.mark.slow)
SMALLER = {
    "svd": dict(num_frames=2, max_guidance_scale=1.0),
    "animatediff": dict(num_frames=2, guidance_scale=1.0),
    # The fewest that its scheduler knows.
    "pixart": dict(steps=2),
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
    assert layers == {"GroupNorm": 1, "GEGLU": 1}


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


@torch.no_grad()
def test_a_sum_hands_its_statistics_to_the_next_norm():
    first, second = (tiny_parts.fill(ResnetBlock2D(in_channels=16, temb_channels=8, groups=4)) for _ in range(2))
    both = nn.ModuleList([first, second])
    x, temb = torch.randn(2, 16, 5, 7) * 3 + 5, torch.randn(2, 8)
    want = second(first(x, temb), temb)
    choice = asyncdiff_fast.patch(both, kernels="triton")._layers.choice
    y = first(x, temb)
    assert choice.recall(y) is not None
    assert relative(second(y, temb), want) < TOLERANCE
    assert choice.recall(y) is None and choice.recall(x) is None, "a later sum has come"
    y = first(x, temb)
    y.mul_(2)
    assert choice.recall(y) is None, "it has been changed"
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


def test_lora():
    peft = pytest.importorskip("peft")
    model = unet()
    names = ["conv1", "conv2", "time_emb_proj", "conv_shortcut", "to_q", "proj", "proj_in"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False))
    tiny_parts.fill(model, seed=1)
    difference, _ = compare(model, *unet_inputs())
    assert difference < TOLERANCE


@torch.no_grad()
def test_lora_added_and_removed_while_patched():
    peft = pytest.importorskip("peft")
    model, args = unet(), unet_inputs()
    base = model(*args).sample
    asyncdiff_fast.patch(model, kernels="triton")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1", "to_q"], init_lora_weights=False))
    adapted = model(*args).sample
    asyncdiff_fast.unpatch(model)
    assert relative(adapted, model(*args).sample) < TOLERANCE
    model.delete_adapters("default")
    assert torch.equal(model(*args).sample, base) and relative(adapted, base) > TOLERANCE


@torch.no_grad()
def test_fused_projections():
    model, kwargs = tiny_denoisers.flux_transformer(), flux_inputs()
    want = model(**kwargs)[0]
    model.fuse_qkv_projections()
    difference, layers = compare(model, **kwargs)
    assert difference < TOLERANCE and layers["FluxAttention"] == 8
    asyncdiff_fast.patch(model, kernels="triton")
    model.unfuse_qkv_projections()
    assert relative(model(**kwargs)[0], want) < TOLERANCE
    model.fuse_qkv_projections()
    assert relative(model(**kwargs)[0], want) < TOLERANCE
    asyncdiff_fast.unpatch(model)


class _Quantised(nn.Linear):
    """A linear layer that has no use for `weight` as it stands."""

    @classmethod
    def of(cls, linear):
        made = cls(linear.in_features, linear.out_features)
        made.bias, made.scale = linear.bias, linear.weight.abs().max() / 127
        made.codes = (linear.weight.data / made.scale).round().to(torch.int8)
        made.weight = nn.Parameter(torch.full((1,), torch.nan))
        return made

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_quantised_linear_layers(kind):
    model = unet() if kind == "unet" else tiny_denoisers.flux_transformer()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, _Quantised.of(child))
    args, kwargs = (unet_inputs(), {}) if kind == "unet" else ((), flux_inputs())
    assert compare(model, *args, **kwargs)[0] < TOLERANCE


class _Times(ModelHook):
    def post_forward(self, module, output):
        return output * 1.5


@torch.no_grad()
def test_modules_with_hooks_are_called():
    model, args = unet(), unet_inputs()
    resnet = model.mid_block.resnets[0]
    calls = []
    resnet.norm2.register_forward_hook(lambda module, inputs, output: calls.append(1) or output * 1.5)
    HookRegistry.check_if_exists_or_initialize(resnet.conv1).register_hook(_Times(), "times")
    nn.utils.parametrizations.weight_norm(model.mid_block.resnets[1].conv1)
    assert compare(model, *args)[0] < TOLERANCE
    assert len(calls) == 3


@torch.no_grad()
def test_a_hook_put_on_afterwards_and_left_there():
    model, args = unet(), unet_inputs()
    want = model(*args).sample
    asyncdiff_fast.patch(model, kernels="triton")
    HookRegistry.check_if_exists_or_initialize(model.mid_block.resnets[0]).register_hook(ModelHook(), "theirs")
    assert relative(model(*args).sample, want) < TOLERANCE
    asyncdiff_fast.unpatch(model)
    assert torch.equal(model(*args).sample, want)


def test_gradients():
    model, args = unet(), unet_inputs()
    want = torch.autograd.grad(model(*args).sample.sum(), model.conv_in.weight)[0]
    asyncdiff_fast.patch(model, kernels="triton")
    got = torch.autograd.grad(model(*args).sample.sum(), model.conv_in.weight)[0]
    asyncdiff_fast.unpatch(model)
    assert torch.equal(got, want)


@torch.no_grad()
def test_autocast_runs_as_before():
    model, args = unet(), unet_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        want = model(*args).sample
        asyncdiff_fast.patch(model, kernels="triton")
        assert torch.equal(model(*args).sample, want)
    asyncdiff_fast.unpatch(model)


@torch.no_grad()
def test_a_copy_of_a_patched_model_is_its_own():
    model = unet()
    asyncdiff_fast.patch(model, kernels="triton")
    resnet = model.mid_block.resnets[0]
    twin = copy.deepcopy(resnet)
    twin.conv1.weight.zero_()
    x, temb = torch.randn(1, 16, 4, 4), torch.randn(1, 64)
    assert not torch.equal(twin(x, temb), resnet(x, temb))
    asyncdiff_fast.unpatch(model)


@torch.no_grad()
def test_compiled_without_a_break():
    torch._dynamo.reset()
    for model, args, kwargs in ((unet(), unet_inputs(), {}), (tiny_denoisers.flux_transformer(), (), flux_inputs())):
        want = model(*args, **kwargs)[0]
        asyncdiff_fast.patch(model, kernels="triton")
        for module in list(model.modules()):
            if type(module).__name__ in ("ResnetBlock2D", *model._repeated_blocks):
                module.compile(fullgraph=True, backend="aot_eager")
        assert relative(model(*args, **kwargs)[0], want) < TOLERANCE
        asyncdiff_fast.unpatch(model)


def _staged(rank):
    torch.set_grad_enabled(False)
    model, kwargs = tiny_denoisers.flux_transformer(), flux_inputs()
    want = model(**kwargs)[0]
    runtime = asyncdiff_fast.patch(model, num_stages=2, warmup_steps=1, kernels="triton", timeout_s=100)
    exact = model(**kwargs)[0]
    stale = model(**kwargs | dict(timestep=torch.tensor([0.4])))[0]
    units = [unit.name for unit in runtime.plan.graph.units]
    asyncdiff_fast.unpatch(model)
    return relative(exact, want), units, stale, torch.equal(model(**kwargs)[0], want)


def test_beneath_stages():
    first, second = ranks.run(2, _staged)
    assert first[0] < TOLERANCE and second[0] < TOLERANCE
    assert first[1] == second[1] and any("transformer_blocks" in name for name in first[1])
    assert torch.equal(first[2], second[2]) and first[2].isfinite().all()
    assert first[3] and second[3]
