"""Joined projections and channels_last weights: the same values, seen by whoever looks, and undone."""

import copy

import fused_checks
import pytest
import safetensors.torch
import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional as F

from asyncdiff_fast.fused.attending import attended, projected
from asyncdiff_fast.fused.joined import Joined
from asyncdiff_fast.fused.memory_format import ChannelsLast


def _attention(**changes):
    torch.manual_seed(0)
    return Attention(query_dim=32, heads=4, dim_head=8, **changes).eval()


def _own(func, args, kwargs):
    return func(*args, **kwargs)


def _storages(module):
    return {weight.untyped_storage().data_ptr() for weight in module.parameters()}


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"qk_norm": "layer_norm"}], ids=str)
@torch.no_grad()
def test_one_product_makes_all_three(options):
    module, x = _attention(**options), torch.randn(2, 9, 32)
    want, state, storages = module(x), copy.deepcopy(module.state_dict()), len(_storages(module))
    joined = Joined(module, active=True)
    weights = joined.of(module)
    assert len(_storages(module)) == storages - (4 if "bias" in options else 2)
    assert all(torch.equal(a, b) for a, b in zip(weights(x, "torch"), projected(module, x, x), strict=True))
    got = attended(module, _own, (x,), {}, lambda *_: weights(x, "joined"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(module(x), want)
    assert module.state_dict().keys() == state.keys()
    saved = safetensors.torch.load(safetensors.torch.save(module.state_dict()))
    assert all(torch.equal(value, state[name]) for name, value in saved.items())
    module.to_k.weight.mul_(2)
    changed = F.linear(x, module.to_k.weight, module.to_k.bias)
    torch.testing.assert_close(weights(x, "joined")[1], changed, rtol=1e-5, atol=1e-6)
    joined.remove()
    assert len(_storages(module)) == storages and joined.of(module) is None
    module.to_k.weight.div_(2)
    assert torch.equal(module(x), want)


def _replaced(module):
    module.to_v.weight = nn.Parameter(module.to_v.weight.clone())


def _moved(module):
    module.to(torch.float64).to(torch.float32)


def _wrapped(module):
    module.to_q = nn.Sequential(module.to_q)


def _hooked(module):
    module.to_k.register_forward_hook(lambda module, args, result: None)


def _loaded(module):
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [_replaced, _moved, _wrapped, _hooked, _loaded])
@torch.no_grad()
def test_layers_that_are_others_now_run_for_themselves(change):
    module = _attention()
    joined = Joined(module, active=True)
    assert joined.of(module) is not None and joined.of(copy.deepcopy(module)) is None
    change(module)
    assert joined.of(module) is None
    joined.remove()


@torch.no_grad()
def test_what_cannot_be_joined_is_left_alone():
    tied = _attention()
    tied.to_k.weight = tied.to_q.weight
    for module in (_attention(cross_attention_dim=24), tied, _attention().to("meta")):
        assert Joined(module, active=True).of(module) is None
    assert Joined(_attention(), active=False).layers == set()


@torch.no_grad()
def test_channels_last_while_it_is_patched():
    unet, given = fused_checks.unet(), fused_checks.unet_inputs()
    want = unet(*given).sample
    strides = [weight.stride() for weight in unet.parameters()]
    converted = ChannelsLast(unet, active=True)
    assert converted.count > 10
    assert all(
        module.weight.is_contiguous(memory_format=torch.channels_last)
        for module in unet.modules()
        if isinstance(module, nn.Conv2d)
    )
    torch.testing.assert_close(unet(*given).sample, want, rtol=1e-4, atol=1e-5)
    unet.conv_in.weight = nn.Parameter(unet.conv_in.weight.clone())
    converted.remove()
    assert [weight.stride() for weight in unet.parameters()][1:] == strides[1:]
    assert torch.equal(unet(*given).sample, want) or unet.conv_in.weight.stride() != strides[0]
    assert ChannelsLast(nn.Sequential(nn.Conv3d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2)), True).count == 0
