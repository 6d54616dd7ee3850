"""What the denoiser will predict at the next steps, from what it predicted at the last ones: the same on every rank."""

# Outputs that are looked at.
KEPT = 3


class Outputs:
    """The newest outputs of one generation, as they reached the sampler's step."""

    def __init__(self):
        self._newest = []

    def add(self, output):
        """The output of the next step, in order."""
        self._newest = [*self._newest[1 - KEPT :], output]

    def __bool__(self):
        return bool(self._newest)

    def ahead(self, number):
        """The output expected `number` steps after the newest known: 1 for the next."""
        return self._newest[-1]
