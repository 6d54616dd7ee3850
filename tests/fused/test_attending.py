"""The written-out forward of attention modules: the same bits as their own, and a word where it does not apply."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from asyncdiff_fast.fused.attending import attended


def _own(func, args, kwargs):
    return func(*args, **kwargs)


def _attention(**changes):
    torch.manual_seed(0)
    return Attention(query_dim=32, heads=4, dim_head=8, **{"processor": AttnProcessor2_0()} | changes).eval()


PLAIN = {
    "self": (dict(), 32),
    "text": (dict(cross_attention_dim=24), 24),
    "norms": (dict(qk_norm="layer_norm"), 32),
    "narrow": (dict(cross_attention_dim=24, bias=True, out_bias=False), 24),
}


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_the_same_bits(name):
    options, width = PLAIN[name]
    module, x = _attention(**options), torch.randn(2, 9, 32)
    text = None if name == "self" else torch.randn(2, 5, width)
    want = module(x, encoder_hidden_states=text)
    assert torch.equal(attended(module, _own, (x, text), {}), want)
    assert torch.equal(attended(module, _own, (x,), {"encoder_hidden_states": text, "attention_mask": None}), want)


@torch.no_grad()
def test_other_modules_and_calls_are_left_alone():
    x = torch.randn(2, 9, 32)
    others = [
        _attention(residual_connection=True),
        _attention(rescale_output_factor=2.0),
        _attention(norm_num_groups=4),
        _attention(cross_attention_dim=32, cross_attention_norm="layer_norm"),
        _attention(processor=AttnProcessor()),
        torch.nn.Linear(32, 32),
    ]
    for module in others:
        assert attended(module, _own, (x,), {}) is NotImplemented
    module = _attention()
    for args, kwargs in [
        ((x.unflatten(1, (3, 3)).permute(0, 3, 1, 2),), {}),
        ((x, None, torch.zeros(2, 1, 9)), {}),
        ((x,), {"temb": x}),
        ((), {}),
    ]:
        assert attended(module, _own, args, kwargs) is NotImplemented
