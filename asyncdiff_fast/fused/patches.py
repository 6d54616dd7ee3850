"""Residual blocks on a patch: norm, SiLU and the neighbours' rows in one pass, written where the convolution reads."""

from diffusers.models import resnet
from torch import nn

from ..modules import is_plain
from .layers import Row, exact
from .unet import summed, usual


def _resnet_block_2d(self, choice, input_tensor, temb, *args, **kwargs):
    if exact(choice, input_tensor) or choice.patches is None:
        return type(self).forward(self, input_tensor, temb, *args, **kwargs)
    h = _convolved(self, choice, self.norm1, self.conv1, input_tensor)
    temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
    if self.time_embedding_norm == "scale_shift":
        scale, shift = temb.chunk(2, dim=1)
        h = _convolved(self, choice, self.norm2, self.conv2, h, scale=scale, shift=shift)
    else:
        h = _convolved(self, choice, self.norm2, self.conv2, h, temb=temb)
    if self.conv_shortcut is not None:
        input_tensor = self.conv_shortcut(input_tensor)
    return summed(choice, h, input_tensor, None, self.output_scale_factor)


def _convolved(block, choice, norm, conv, x, temb=None, scale=None, shift=None):
    """conv(SiLU(norm(x + temb) * (1 + scale) + shift)); temb, scale, shift (n, c), or None."""
    if is_plain(norm, nn.GroupNorm) and is_plain(block.nonlinearity, nn.SiLU):
        added = {"temb": temb, "scale": scale, "shift": shift}
        y = choice.patches.norm_before(norm, conv, x, **{name: v for name, v in added.items() if v is not None})
        if y is not None:
            return conv(y)
    y = norm(x if temb is None else x + temb[..., None, None])
    if scale is not None:
        y = y * (1 + scale[..., None, None]) + shift[..., None, None]
    return conv(block.nonlinearity(y))


ROWS = (Row(resnet.ResnetBlock2D, _resnet_block_2d, usual),)
