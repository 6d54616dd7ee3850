"""The pieces that replaced forwards are made of, and the single layers: norms, modulated norms, GEGLU.

Each piece runs the chosen implementation, or calls the modules in the order in which diffusers does.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models import activations, normalization
from torch import nn

from ..kernels.checks import rows_are_dense
from . import ops

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """How the layers of one class are replaced.

    Args:
        kind: the class; `run(module, choice, …)` takes the arguments of its forward.
        fits: whether an instance can be replaced at all.
        takes_over: the norms and activations of an instance that `run` may leave uncalled.
        across_rows: whether the rows of a picture meet in what is taken over.
    """

    kind: type
    run: Callable
    fits: Callable = lambda module: True
    takes_over: Callable = lambda module: ()
    across_rows: bool = False


def exact(choice, x):
    """True if a module's own forward must run: unpatched meanwhile, gradients, autocast, a device without kernels.

    A compiler fuses torch's ops itself, so that there, too, it takes `kernels="triton"` to have ours.
    """
    if not choice.active or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return True
    if choice.mode == "auto" and torch.compiler.is_compiling():
        return True
    return x.dtype not in _DTYPES or not (x.is_cuda or choice.on_cpu)


def plain(module, *kinds):
    """True if a module's work may be done without calling it: of such a class exactly, with no hook but ours."""
    if type(module) not in kinds or "forward" in module.__dict__:
        return False
    # Those of the tracer, on every module for one forward.
    return not (module._forward_hooks or module._forward_pre_hooks) or all(
        hook.__module__.startswith(__package__)
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def _spread(vector, x):
    """A (c,) or (n, c) tensor over the space of x (n, c, *spatial)."""
    return vector[(..., *[None] * (x.ndim - 2))]


def group_norm(norm, call, choice, x, act=None, conv_bias=None, temb=None, scale=None, shift=None):
    """act(norm(x + conv_bias + temb) * (1 + scale) + shift).

    Args:
        norm: the `nn.GroupNorm`; `call` runs it as it is.
        act: the module or function that follows, or None.
        conv_bias, temb, scale, shift: as `ops.group_norm` takes them.
    """
    silu = isinstance(act, nn.Module) and plain(act, nn.SiLU)
    if rows_are_dense(x) and (call is not norm or plain(norm, nn.GroupNorm)):
        partials = choice.sums.recall(x)

        def run(kernel):
            return ops.group_norm(
                x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, conv_bias, temb, scale, shift, partials,
                kernel,
            )  # fmt: skip

        facts = (norm.num_groups, silu, *(given is not None for given in (conv_bias, temb, scale, partials)))
        kernel = choice.pick("group_norm", x, facts, run)
        if kernel != "torch":
            y = run(kernel)
            return y if silu or act is None else act(y)
    for added in (conv_bias, temb):
        x = x if added is None else x + _spread(added, x)
    # A module with hooks, or torch's own norm was faster.
    y = ops.laid_out_as(x, call(x))
    if scale is not None:
        y = y * (1 + _spread(scale, y)) + _spread(shift, y)
    return y if act is None else act(y)


def modulated(norm, choice, x, scale, shift):
    """norm(x) * (1 + scale) + shift; x (b, s, c), scale and shift (b, c)."""
    if _modulates(norm, x, scale, shift):

        def run(kernel):
            return ops.adaln(x, scale, shift, norm.eps, kernel)

        kernel = choice.pick("adaln", x, (), run)
        if kernel != "torch":
            return run(kernel)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def gated_modulated(norm, choice, residual, x, gate, scale, shift):
    """residual + gate * x, and `modulated` of it; residual, x (b, s, c), gate, scale, shift (b, c)."""
    alike = residual.shape == x.shape and residual.dtype == x.dtype == gate.dtype and x.stride(-1) == 1
    if alike and _modulates(norm, residual, scale, shift):

        def run(kernel):
            return ops.gate_residual_adaln(residual, x, gate, scale, shift, norm.eps, kernel)

        kernel = choice.pick("gate_residual_adaln", residual, (), run)
        if kernel != "torch":
            return run(kernel)
    residual = residual + gate[:, None] * x
    return residual, norm(residual) * (1 + scale[:, None]) + shift[:, None]


def added_norm(norm, choice, residual, x):
    """x + residual, and norm of that; residual, x (b, s, c)."""
    alike = residual.shape == x.shape and residual.dtype == x.dtype
    if alike and residual.is_contiguous() and x.is_contiguous() and _normalises(norm, x):

        def run(kernel):
            return ops.add_layer_norm(residual, x, norm.weight, norm.bias, norm.eps, kernel)

        kernel = choice.pick("add_layer_norm", x, (norm.weight is None, norm.bias is None), run)
        if kernel != "torch":
            return run(kernel)
    residual = x + residual
    return residual, norm(residual)


def _normalises(norm, x):
    """True if a norm is a LayerNorm over the channels of x, with weights of its dtype or none."""
    if not plain(norm, nn.LayerNorm) or norm.normalized_shape != x.shape[-1:]:
        return False
    return all(given is None or given.dtype == x.dtype for given in (norm.weight, norm.bias))


def _modulates(norm, x, scale, shift):
    """True if a norm is a LayerNorm without weights, and what follows it has the shapes and dtype of the kernels."""
    weightless = plain(norm, nn.LayerNorm, normalization.FP32LayerNorm) and norm.weight is None and norm.bias is None
    if not weightless or x.ndim != 3 or x.stride(-1) != 1 or norm.normalized_shape != x.shape[-1:]:
        return False
    return x.dtype == scale.dtype == shift.dtype and scale.shape == shift.shape == (x.shape[0], x.shape[2])


def _group_norm_layer(self, choice, input):
    def call(x):
        return nn.GroupNorm.forward(self, x)

    return call(input) if exact(choice, input) else group_norm(self, call, choice, input)


def _sequential(self, choice, input):
    if not isinstance(input, torch.Tensor) or exact(choice, input):
        return nn.Sequential.forward(self, input)
    modules = list(self)
    while modules:
        module = modules.pop(0)
        if plain(module, nn.GroupNorm) and modules and type(modules[0]) is nn.SiLU:
            input = group_norm(module, module, choice, input, modules.pop(0))
        else:
            input = module(input)
    return input


def _normed_pairs(sequential):
    """The GroupNorms that a SiLU follows at once, and those SiLUs."""
    modules = list(sequential)
    pairs = [p for p in itertools.pairwise(modules) if [type(m) for m in p] == [nn.GroupNorm, nn.SiLU]]
    return [module for pair in pairs for module in pair]


def _geglu(self, choice, hidden_states, *args, **kwargs):
    if exact(choice, hidden_states):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    x = self.proj(hidden_states)

    def run(kernel):
        return ops.geglu(x, kernel)

    return run(choice.pick("geglu", x, (), run) if x.is_contiguous() else "torch")


def _ada_layer_norm_zero(self, choice, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
    if exact(choice, x):
        return type(self).forward(self, x, timestep, class_labels, hidden_dtype, emb)
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
    return modulated(self.norm, choice, x, scale, shift), *rest


def _ada_layer_norm_zero_single(self, choice, x, emb=None):
    if exact(choice, x):
        return type(self).forward(self, x, emb)
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return modulated(self.norm, choice, x, scale, shift), gate


def _ada_layer_norm_zero_x(self, choice, hidden_states, emb=None):
    if exact(choice, hidden_states):
        return type(self).forward(self, hidden_states, emb)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, 1)
    y = modulated(self.norm, choice, hidden_states, scale, shift)
    y2 = modulated(self.norm, choice, hidden_states, scale2, shift2)
    return y, gate, shift_mlp, scale_mlp, gate_mlp, y2, gate2


def _ada_layer_norm_continuous(self, choice, x, conditioning_embedding):
    if exact(choice, x):
        return type(self).forward(self, x, conditioning_embedding)
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return modulated(self.norm, choice, x, scale, shift)


def _own_norm(module):
    return (module.norm,)


ROWS = (
    Row(nn.Sequential, _sequential, _normed_pairs, _normed_pairs, across_rows=True),
    Row(activations.GEGLU, _geglu),
    Row(normalization.AdaLayerNormZero, _ada_layer_norm_zero, takes_over=_own_norm),
    Row(normalization.AdaLayerNormZeroSingle, _ada_layer_norm_zero_single, takes_over=_own_norm),
    Row(normalization.SD35AdaLayerNormZeroX, _ada_layer_norm_zero_x, takes_over=_own_norm),
    Row(normalization.AdaLayerNormContinuous, _ada_layer_norm_continuous, takes_over=_own_norm),
    Row(nn.GroupNorm, _group_norm_layer, across_rows=True),
)
