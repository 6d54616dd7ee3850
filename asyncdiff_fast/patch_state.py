"""What every site has on one patch: the parts that it sends, those it receives, and its own way to run.

Every state keeps what it receives. A synchronous step fills it in this call, a displaced one reads what the call before
has left, and either leaves this patch's own part to be sent.
"""

from .slots import Recv, Send


class State:
    """A site on one patch that needs no other patch."""

    def __init__(self, site, patch, device):
        self.site, self.patch = site, patch

    def sends(self):
        """[(target, tensor)] that travel after every call."""
        return []

    def recvs(self):
        """[(source, tensor)] that are filled by them."""
        return []

    def run(self, func, args, kwargs, step):
        """The function's result on this patch; `step`, the `Band`, has the call's mode and what sites share."""
        return func(*args, **kwargs)


def messages(state):
    """(sends, receives) of a state, as slots take them."""
    sends = [Send(target, (x,)) for target, x in state.sends()]
    return sends, [Recv(source, (x,)) for source, x in state.recvs()]
