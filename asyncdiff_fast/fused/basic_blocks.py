"""Forwards of diffusers' `BasicTransformerBlock`, and of what holds a UNet's: a sum and the norm after it in one pass.

PixArt's blocks are modulated from a table of their own; UNets' have norms with weights. A UNet's transformer gives its
result in the memory format of what it was given, so that no convolution after it has to change it back.
"""

import itertools

import torch
from diffusers.models import attention
from diffusers.models.transformers import transformer_2d
from torch import nn

from .blocks import tokens_by_row
from .layers import Row, added_norm, exact, modulated, plain
from .unet import summed


def _basic_block(
    self,
    choice,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    timestep=None,
    cross_attention_kwargs=None,
    class_labels=None,
    added_cond_kwargs=None,
):
    extra = cross_attention_kwargs or {}
    usual = self._chunk_size is None and hidden_states.ndim == 3 and not extra.keys() & {"gligen", "scale"}
    if exact(choice, hidden_states) or not usual:
        return type(self).forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    first = {
        "encoder_hidden_states": encoder_hidden_states if self.only_cross_attention else None,
        "attention_mask": attention_mask,
    } | extra
    second = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask} | extra
    run = _modulated_block if self.norm_type == "ada_norm_single" else _weighted_block
    return run(self, choice, tokens_by_row(hidden_states), timestep, first, second)


def _modulated_block(self, choice, x, timestep, first, second):
    rows = self.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = rows.unbind(1)
    y = self.attn1(modulated(self.norm1, choice, x, scale, shift), **first)
    x = torch.addcmul(x, gate[:, None], y)
    if self.attn2 is not None:
        x = x + self.attn2(x, **second)
    return torch.addcmul(x, gate_mlp[:, None], self.ff(modulated(self.norm2, choice, x, scale_mlp, shift_mlp)))


def _weighted_block(self, choice, x, timestep, first, second):
    next_norm, choice.next_norm = choice.next_norm, None
    norm, normed = choice.results.recall(x) or (None, None)
    normed = normed if norm is self.norm1 else self.norm1(x)
    x, normed = added_norm(self.norm2, choice, x, self.attn1(normed, **first))
    x, normed = added_norm(self.norm3, choice, x, self.attn2(normed, **second))
    y = self.ff(normed)
    if next_norm is None:
        return y + x
    x, normed = added_norm(next_norm, choice, x, y)
    choice.results.remember(x, (next_norm, normed))
    return x


def _first_norm(block):
    """The norm that a UNet's block begins with, if the sum of the block before may go through it at once; else None."""
    known = type(block) is attention.BasicTransformerBlock and block.norm_type == "layer_norm" and _is_known(block)
    usual = known and block._chunk_size is None and plain(block.norm1, nn.LayerNorm)
    return block.norm1 if usual and not torch.is_inference_mode_enabled() else None


def _is_known(block):
    """True for blocks that are modulated from a table of their own, and for UNets', without extras."""
    if block.pos_embed is not None or hasattr(block, "fuser"):
        return False
    return block.norm_type == "ada_norm_single" or (block.norm_type == "layer_norm" and block.attn2 is not None)


def _norms_after_sums(block):
    return (block.norm2, block.norm3) if block.norm_type == "layer_norm" else ()


def _transformer_2d(
    self,
    choice,
    hidden_states,
    encoder_hidden_states=None,
    timestep=None,
    added_cond_kwargs=None,
    class_labels=None,
    cross_attention_kwargs=None,
    attention_mask=None,
    encoder_attention_mask=None,
    return_dict=True,
):
    masked = attention_mask is not None or encoder_attention_mask is not None
    last = hidden_states.ndim == 4 and hidden_states.is_contiguous(memory_format=torch.channels_last)
    if not choice.alone or exact(choice, hidden_states) or masked or not last or hidden_states.is_contiguous():
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, class_labels,
            cross_attention_kwargs, attention_mask, encoder_attention_mask, return_dict,
        )  # fmt: skip
    n, _, height, width = hidden_states.shape
    tokens, _ = self._operate_on_continuous_inputs(hidden_states)
    blocks = list(self.transformer_blocks)
    for block, after in itertools.zip_longest(blocks, blocks[1:]):
        choice.next_norm = _first_norm(after)
        tokens = block(
            tokens,
            attention_mask=None,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=None,
            timestep=timestep,
            cross_attention_kwargs=cross_attention_kwargs,
            class_labels=class_labels,
        )
    choice.next_norm = None
    tokens = self.proj_out(tokens) if self.use_linear_projection else tokens
    y = tokens.reshape(n, height, width, -1).permute(0, 3, 1, 2)
    y = summed(choice, y if self.use_linear_projection else self.proj_out(y), hidden_states, None, 1.0)
    return transformer_2d.Transformer2DModelOutput(sample=y) if return_dict else (y,)


ROWS = (
    Row(transformer_2d.Transformer2DModel, _transformer_2d, lambda model: model.is_input_continuous),
    Row(attention.BasicTransformerBlock, _basic_block, _is_known, _norms_after_sums),
)
