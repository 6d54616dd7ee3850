"""How many steps ranks evaluate side by side: as many as their predicted latents will probably bear. Pure.

The output expected at a step is off by an error that grows with the distance, and latents gather it: the latent that
was predicted m steps ahead is off by about m (m + 1) / 2 times what one step ahead is. So errors of one block tell how
long the next may be. Nothing is ever taken back: where they were larger than expected, the next block is shorter, down
to exact steps, after which is known how far a prediction would have been.
"""


class Lengths:
    """Lengths of the blocks of one generation, 1 to `most`.

    Args:
        warmup_steps: exact steps at the beginning.
        tolerance: largest relative error of a predicted latent that is expected of a block.
    """

    def __init__(self, most, warmup_steps, tolerance):
        self.most, self._warmup_steps, self._tolerance = most, warmup_steps, tolerance
        # The error of a latent that is predicted one step ahead.
        self._error = None

    def at(self, step, left):
        """Length of the block that begins at a step, of which `left` come at most; 1 is an exact step."""
        length, most = 1, min(self.most, left)
        if step < self._warmup_steps or self._error is None:
            return 1
        while length < most and self._error * growth(length) <= self._tolerance:
            length += 1
        return length

    def learn(self, error, ahead):
        """A block is over: the relative error of its last latents, which had been predicted so many steps ahead."""
        self._error = error / growth(ahead)


def growth(ahead):
    """How many times as far off a latent is that was predicted so many steps ahead, as one step ahead."""
    return ahead * (ahead + 1) / 2
