"""The state of each kind of site on one patch."""

from .patch_halo import HaloState, ResizeState
from .patch_norm import NormState
from .patch_ring import RingState
from .patch_site import Halo, Norm, Resize, Ring
from .patch_state import State

KINDS = {Halo: HaloState, Norm: NormState, Ring: RingState, Resize: ResizeState}


def make_state(site, patch, device, predicts=False):
    """The `State` of a site; with `predicts` it carries on the trend of what it receives."""
    return KINDS.get(type(site), State)(site, patch, device, predicts)
