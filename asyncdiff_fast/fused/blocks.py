"""Forwards of diffusers' transformer blocks: gate, residual sum and modulated norm in one pass; FLUX's attention.

FLUX's queries and keys are normalised, rotated and written to their places among text and image in one pass, and its
single blocks apply GELU as they write beside the attention's result.
"""

import torch
from diffusers.models import attention
from diffusers.models.transformers import transformer_flux as flux
from torch import nn

from . import attention_ops, ops
from .layers import Row, exact, gated_modulated, plain


def _joint_block(self, choice, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
    if exact(choice, hidden_states) or self._chunk_size is not None:
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    extra = joint_attention_kwargs or {}
    x, text = tokens_by_row(hidden_states), encoder_hidden_states
    normed, gate, shift, scale, gate_mlp, *second = self.norm1(x, emb=temb)
    if self.context_pre_only:
        normed_text = self.norm1_context(text, temb)
    else:
        normed_text, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(text, emb=temb)
    y, text_y = self.attn(hidden_states=normed, encoder_hidden_states=normed_text, **extra)
    if second:
        normed2, gate2 = second
        x = torch.addcmul(x, gate[:, None], y)
        y, gate = self.attn2(hidden_states=normed2, **extra), gate2
    x, normed = gated_modulated(self.norm2, choice, x, y, gate, scale, shift)
    x = torch.addcmul(x, gate_mlp[:, None], self.ff(normed))
    if self.context_pre_only:
        return None, x
    text, normed_text = gated_modulated(self.norm2_context, choice, text, text_y, text_gate, text_scale, text_shift)
    return torch.addcmul(text, text_gate_mlp[:, None], self.ff_context(normed_text)), x


def _flux_block(
    self, choice, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    if exact(choice, hidden_states):
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )
    x, text = hidden_states, encoder_hidden_states
    normed, gate, shift, scale, gate_mlp = self.norm1(x, emb=temb)
    normed_text, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(text, emb=temb)
    y, text_y, *image_prompt = self.attn(
        hidden_states=normed,
        encoder_hidden_states=normed_text,
        image_rotary_emb=image_rotary_emb,
        **joint_attention_kwargs or {},
    )
    x, normed = gated_modulated(self.norm2, choice, x, y, gate, scale, shift)
    x = torch.addcmul(x, gate_mlp[:, None], self.ff(normed))
    for added in image_prompt:
        x = x + added
    text, normed_text = gated_modulated(self.norm2_context, choice, text, text_y, text_gate, text_scale, text_shift)
    text = torch.addcmul(text, text_gate_mlp[:, None], self.ff_context(normed_text))
    return _in_range(text), x


def _flux_single_block(
    self, choice, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    if exact(choice, hidden_states) or not plain(self.act_mlp, nn.GELU):
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )
    num_text = encoder_hidden_states.shape[1]
    residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate = self.norm(residual, emb=temb)
    mlp = self.proj_mlp(normed)
    y = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **joint_attention_kwargs or {})

    def run(kernel):
        return ops.gelu_beside(y, mlp, self.act_mlp.approximate, kernel)

    joined = run(choice.pick("gelu_beside", mlp, (y.shape[-1],), run) if mlp.is_contiguous() else "torch")
    x = _in_range(torch.addcmul(residual, gate[:, None], self.proj_out(joined)))
    return x[:, :num_text], x[:, num_text:]


def tokens_by_row(x):
    """Tokens (b, s, c), each in one row: a patch embedding leaves them by columns, and sums with them would stay so."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_range(x):
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _flux_attention(
    self,
    choice,
    hidden_states,
    encoder_hidden_states=None,
    attention_mask=None,
    image_rotary_emb=None,
    **kwargs,
):
    weights = None if exact(choice, hidden_states) else _flux_norms(self, encoder_hidden_states)
    if weights is None or kwargs:
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
        )
    projected = flux._get_qkv_projections(self, hidden_states, encoder_hidden_states)
    # Image first; here text comes first.
    projected = [x.unflatten(-1, (-1, self.head_dim)) for x in projected[: 3 * len(weights[0])]]
    parts = [projected[i::3][::-1] for i in range(3)]
    cos, sin = image_rotary_emb if image_rotary_emb is not None else (None, None)

    def run(kernel):
        return attention_ops.joint_qk_norm_rope(*parts, *weights, self.norm_q.eps, cos, sin, kernel)

    facts = (tuple(x.shape[1] for x in parts[0]), cos is not None)
    q, k, v = run(choice.pick("joint_qk_norm_rope", projected[0], facts, run))
    processor = self.processor
    y = flux.dispatch_attention_fn(
        q,
        k,
        v,
        attn_mask=attention_mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    y = y.flatten(2, 3).to(q.dtype)
    if encoder_hidden_states is None:
        return y
    text, y = y.split_with_sizes([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
    y = self.to_out[1](self.to_out[0](y.contiguous()))
    return y, self.to_add_out(text.contiguous())


def _flux_norms(self, encoder_hidden_states):
    """Weights of the norms of queries and of keys, of text and image or of all; None if they must be called."""
    norms = [[self.norm_q], [self.norm_k]]
    if encoder_hidden_states is not None and self.added_kv_proj_dim is not None:
        norms = [[self.norm_added_q, self.norm_q], [self.norm_added_k, self.norm_k]]
    elif encoder_hidden_states is not None or self.added_kv_proj_dim is not None:
        return None
    flat = [norm for pair in norms for norm in pair]
    alike = all(plain(n, nn.RMSNorm) and n.weight is not None and n.eps == self.norm_q.eps for n in flat)
    if type(self.processor) is not flux.FluxAttnProcessor or not alike or self.norm_q.eps is None:
        return None
    return [[norm.weight for norm in pair] for pair in norms]


def _second_norms(block):
    return block.norm2, block.norm2_context


ROWS = (
    Row(attention.JointTransformerBlock, _joint_block, takes_over=_second_norms),
    Row(flux.FluxTransformerBlock, _flux_block, takes_over=_second_norms),
    Row(flux.FluxSingleTransformerBlock, _flux_single_block, takes_over=lambda block: (block.act_mlp,)),
    Row(flux.FluxAttention, _flux_attention),
)
