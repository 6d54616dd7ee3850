"""What shows that a tensor was written in place: torch's count of such writes."""

import torch


def version(x):
    """Number that grows when a tensor is written in place; None for what has none, as a tensor of inference mode."""
    return x._version if isinstance(x, torch.Tensor) and not x.is_inference() else None
