"""What the halves, patches and stages of one denoiser have in common."""

from dataclasses import dataclass
from typing import Any

import torch

from .calls.signature import CallSignature
from .config import Config
from .fused.choice import KernelChoice
from .fused.graphs import Graphs
from .fused.packed import PackedWeights


@dataclass(frozen=True)
class Shared:
    """`choice` is None where only torch's kernels are to run, `scheduler` where the caller has named none, `graphs`
    where calls are not captured.
    """

    denoiser: torch.nn.Module
    config: Config
    signature: CallSignature
    packed: PackedWeights
    choice: KernelChoice | None = None
    scheduler: Any = None
    graphs: Graphs | None = None
