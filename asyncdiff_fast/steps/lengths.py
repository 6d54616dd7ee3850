"""How many steps ranks evaluate side by side: as many as were predicted well last time, and one more. Pure."""

# Steps with more than one evaluation each, and what their schedulers say of it.
TWO_EVALUATIONS = "makes more than one evaluation a step"


class Lengths:
    """Lengths of the blocks of one generation, 1 to `most`.

    Args:
        warmup_steps: exact steps at the beginning; None: until a prediction was within the tolerance.
        tolerance: largest relative error of a predicted latent that is accepted. Nothing is ever taken back: an error
            above it makes the next block shorter.
    """

    def __init__(self, most, warmup_steps, tolerance):
        self.most, self._warmup_steps, self._tolerance = most, warmup_steps, tolerance
        self._length = 1

    def at(self, step, left):
        """Length of the block that begins at a step; at most `left` steps come."""
        if step < self._warmup_steps:
            return 1
        return max(1, min(self._length, self.most, left))

    def learn(self, step, errors):
        """A block that began at a step is over.

        Args:
            errors: relative errors of its latents 1, 2, … as they had been predicted; none of an exact step.
        """
        good = 0
        for error in errors:
            if not error <= self._tolerance:
                break
            good += 1
        self._length = min(good + 2, self.most)
