"""Replaced layers beside adapters, hooks, quantised weights, gradients, autocast, compilers and stages."""

import copy

import pytest
import ranks
import tiny_denoisers
import tiny_parts
import torch
from diffusers.hooks import HookRegistry, ModelHook
from fused_checks import TOLERANCE, compare, flux_inputs, relative, unet, unet_inputs
from torch import nn

import asyncdiff_fast


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
