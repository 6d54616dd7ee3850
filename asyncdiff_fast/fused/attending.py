"""The forward of diffusers' usual attention module written out: no look at signatures, and nothing divided by one.

On one device its attention runs on the fastest of torch's backends: of one segment of keys cuDNN's is hard to beat on a
Hopper chip, so our kernel, which is for several, is no candidate.
"""

import functools

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from ..kernels.checks import suits_attention
from . import attention_ops
from .layers import Row, exact

_PLAIN = {
    "spatial_norm": None,
    "group_norm": None,
    "norm_cross": None,
    "residual_connection": False,
    "rescale_output_factor": 1.0,
}
_TAKES = {"hidden_states", "encoder_hidden_states", "attention_mask"}


def projected(module, x, text):
    """Queries, keys and values of an attention module."""
    return module.to_q(x), module.to_k(text), module.to_v(text)


def attended(module, attention, args, kwargs, project=projected):
    """What an attention module returns, to the bit; NotImplemented for modules and calls of another kind.

    Args:
        attention: called as `attention(F.scaled_dot_product_attention, args, kwargs)`.
        args, kwargs: the module's: hidden states (b, s, c), perhaps those that keys and values are made of.
        project: what makes queries, keys and values, as `projected`.
    """
    if type(module) is not Attention or type(module.processor) is not AttnProcessor2_0:
        return NotImplemented
    named = dict(zip(("hidden_states", "encoder_hidden_states", "attention_mask"), args, strict=False)) | kwargs
    x, text = named.get("hidden_states"), named.get("encoder_hidden_states")
    if named.keys() - _TAKES or named.get("attention_mask") is not None or x is None or x.ndim != 3:
        return NotImplemented
    if any((getattr(module, name) or plain) != plain for name, plain in _PLAIN.items()):
        return NotImplemented
    text = x if text is None else text
    q, k, v = project(module, x, text)
    q, k, v = (y.view(y.shape[0], -1, module.heads, k.shape[-1] // module.heads).transpose(1, 2) for y in (q, k, v))
    q = q if module.norm_q is None else module.norm_q(q)
    k = k if module.norm_k is None else module.norm_k(k)
    y = attention(F.scaled_dot_product_attention, (q, k, v), {"attn_mask": None, "dropout_p": 0.0, "is_causal": False})
    y = y.transpose(1, 2).reshape(x.shape[0], -1, v.shape[1] * v.shape[3])
    return module.to_out[1](module.to_out[0](y.to(q.dtype)))


def _attention(self, choice, hidden_states, encoder_hidden_states=None, attention_mask=None, **cross_attention_kwargs):
    given = (hidden_states, encoder_hidden_states, attention_mask)
    if choice.alone and not exact(choice, hidden_states):
        attention, project = (functools.partial(function, choice) for function in (_by_choice, _projected))
        result = attended(self, attention, given, cross_attention_kwargs, project)
        if result is not NotImplemented:
            return result
    return type(self).forward(self, *given, **cross_attention_kwargs)


def _projected(choice, module, x, text):
    weights = choice.joined.of(module) if choice.joined is not None and x is text else None
    if weights is not None and choice.mode == "auto":

        def run(kernel):
            return weights(x, kernel)

        kernel = choice.pick("joined_projections", x, (*weights.sizes, weights.bias is not None), run)
        if kernel != "torch":
            return run(kernel)
    return projected(module, x, text)


def _by_choice(choice, func, args, options):
    """Attention of queries, keys and values (b, h, s, d)."""
    q, k, v = (x.transpose(1, 2) for x in args)
    if choice.mode == "auto" and q.shape[2:] == k.shape[2:] == v.shape[2:] and all(map(suits_attention, (q, k, v))):

        def run(kernel):
            return attention_ops.attention(q, [k], [v], q.shape[-1] ** -0.5, kernel)

        kernel = choice.pick("whole_attention", q, (k.shape[1],), run)
        if kernel != "torch":
            return run(kernel).transpose(1, 2)
    return func(*args, **options)


ROWS = (Row(Attention, _attention, across_rows=True),)
