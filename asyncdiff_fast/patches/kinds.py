"""The state of each kind of site on one patch."""

from .halo import HaloState, PadState, PoolState, ResizeState
from .norm import NormState
from .ring import RingState
from .site import Halo, Norm, Pad, Pool, Resize, Ring, Sum
from .state import State
from .sums import SumState

KINDS = {
    Halo: HaloState, Pool: PoolState, Pad: PadState, Norm: NormState, Ring: RingState, Resize: ResizeState,
    Sum: SumState,
}  # fmt: skip


def make_state(site, patch, device, predicts=False):
    """The `State` of a site; with `predicts` it carries on the trend of what it receives."""
    return KINDS.get(type(site), State)(site, patch, device, predicts)
