"""Which calls show how predictable what a rank receives is: each value is looked at once, where it is read."""

from .self_check import Report, SelfCheck


class CallCheck:
    """`errors` is a `SelfCheck`, None where nothing is predicted.

    `report` is what all ranks know of the worst error, read on the host.
    """

    def __init__(self):
        self.errors, self.report = None, Report()
        self._rows, self._notes, self._exact, self._was_exact = {}, False, False, False

    def bind(self, names, device):
        """What is looked at: {key: name} of values."""
        self._rows = {key: row for row, key in enumerate(names)}
        self.errors = SelfCheck(names.values(), device)

    def begin_generation(self):
        """What an earlier generation left is not compared with."""
        if self.errors is not None:
            self.errors.restart()
        self.report.forget()

    def begin(self, exact, keep):
        """A call begins. `keep`: whether its values may be predicted from later."""
        self._exact, self._was_exact = exact, self._exact
        if self.errors is None:
            return
        if exact and not self._was_exact:
            self.errors.restart()
        # A stale call sees what the call before made: of an exact one, that was seen already.
        self._notes = keep and (exact or not self._was_exact)

    def wants(self, key):
        """True if a value is to be noted in this call."""
        return self._notes and key in self._rows

    def note(self, key, value):
        """The latest value, a tensor of one dimension."""
        self.errors.note(self._rows[key], value)

    def judge(self, trend):
        """All values of this call are noted; `trend` is the `Trend` that they are predicted by."""
        if self._notes:
            self.errors.judge(trend.weight if self._exact else trend.weight_before)
