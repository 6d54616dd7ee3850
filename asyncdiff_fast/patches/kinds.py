"""The state of each kind of site on one patch."""

from .halo import HaloState, ResizeState
from .norm import NormState
from .ring import RingState
from .site import Halo, Norm, Resize, Ring
from .state import State

KINDS = {Halo: HaloState, Norm: NormState, Ring: RingState, Resize: ResizeState}


def make_state(site, patch, device, predicts=False):
    """The `State` of a site; with `predicts` it carries on the trend of what it receives."""
    return KINDS.get(type(site), State)(site, patch, device, predicts)
