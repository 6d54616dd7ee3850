"""Forwards of diffusers' residual blocks: each norm with what comes before and after it in one go, so is the sum.

What eager torch does in passes of their own, here rides along: a convolution's bias and the time embedding enter the
statistics per channel, SiLU is applied as the norm writes, bias and division go into the residual sum, which leaves the
statistics for the next norm.
"""

from diffusers.models import resnet
from torch import nn

from . import ops
from .layers import Row, exact, group_norm, plain


def _resnet_block_2d(self, choice, input_tensor, temb, *args, **kwargs):
    if exact(choice, input_tensor):
        return type(self).forward(self, input_tensor, temb, *args, **kwargs)
    h = group_norm(self.norm1, self.norm1, choice, input_tensor, self.nonlinearity)
    h, bias = _convolved(self.conv1, choice, h)
    temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
    if self.time_embedding_norm == "scale_shift":
        scale, shift = temb.chunk(2, dim=1)
        h = group_norm(self.norm2, self.norm2, choice, h, self.nonlinearity, bias, None, scale, shift)
    else:
        h = group_norm(self.norm2, self.norm2, choice, h, self.nonlinearity, bias, temb)
    h, bias = _convolved(self.conv2, choice, self.dropout(h))
    if self.conv_shortcut is not None:
        input_tensor = self.conv_shortcut(input_tensor)
    return summed(choice, h, input_tensor, bias, self.output_scale_factor)


def _temporal_resnet_block(self, choice, input_tensor, temb):
    if exact(choice, input_tensor):
        return type(self).forward(self, input_tensor, temb)
    h = group_norm(self.norm1, self.norm1, choice, input_tensor, self.nonlinearity)
    h, bias = _convolved(self.conv1, choice, h)
    if self.time_emb_proj is not None:
        # Another one for each frame, so it is no constant of a channel.
        temb = self.time_emb_proj(self.nonlinearity(temb)).transpose(1, 2)
        h = h + temb[..., None, None]
    h = group_norm(self.norm2, self.norm2, choice, h, self.nonlinearity, bias)
    h, bias = _convolved(self.conv2, choice, self.dropout(h))
    if self.conv_shortcut is not None:
        input_tensor = self.conv_shortcut(input_tensor)
    return summed(choice, h, input_tensor, bias, 1.0)


def _convolved(conv, choice, x):
    """(convolution, its bias if that is still to be added): torch adds a bias in a pass over the whole result."""
    apart = choice.alone and plain(conv, nn.Conv2d, nn.Conv3d) and conv.bias is not None
    return (conv._conv_forward(x, conv.weight, None), conv.bias) if apart else (conv(x), None)


def summed(choice, h, shortcut, bias, divisor):
    """(shortcut + h + bias) / divisor."""

    def run(kernel):
        return ops.residual_add(h, shortcut, bias, divisor, kernel)

    alike = h.shape == shortcut.shape and h.stride() == shortcut.stride() and h.dtype == shortcut.dtype
    kernel = choice.pick("residual_add", h, (bias is not None, divisor), run) if alike else "torch"
    y, partials = run(kernel)
    if kernel != "torch":
        choice.sums.remember(y, partials)
    return y


def _norms(block):
    return block.norm1, block.norm2


def usual(block):
    """True for a residual block as UNets have them: with a time embedding, and no resampling inside."""
    return block.upsample is None and block.downsample is None and block.time_emb_proj is not None


ROWS = (
    Row(resnet.ResnetBlock2D, _resnet_block_2d, usual, _norms, across_rows=True),
    Row(resnet.TemporalResnetBlock, _temporal_resnet_block, takes_over=_norms, across_rows=True),
)
