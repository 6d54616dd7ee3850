"""What steps side by side have done, counted."""

import collections

# Errors of so many blocks stay where they were computed: to read them waits for the device.
MOST_UNREAD = 256


class StepStats:
    """Counts since `clear`: evaluations by this rank, exact steps, blocks by length, errors of predicted latents."""

    def __init__(self):
        self.clear()

    def clear(self):
        """Begin to count anew."""
        self.evaluations = self.exact_steps = self.cut_short = 0
        self._lengths, self._errors, self._unread = collections.Counter(), [], []
        self.exact_because, self._replay_s = {}, 0.0

    def block(self, length, errors, replay_s):
        """A block is over.

        Args:
            errors: relative ones of its predicted latents, a tensor that is not yet waited for.
            replay_s: host time from the exchange to the end.
        """
        self._replay_s += replay_s
        self._lengths[length] += 1
        self._unread.append(errors)
        if len(self._unread) == MOST_UNREAD:
            self._read()

    def _read(self):
        self._errors += [error for errors in self._unread for error in errors.tolist()]
        self._unread.clear()

    @property
    def blocks(self):
        """How many blocks there were."""
        return sum(self._lengths.values())

    def as_dict(self):
        """Dict, fit for JSON."""
        self._read()
        errors = self._errors
        return {
            "evaluations": self.evaluations,
            "exact_steps": self.exact_steps,
            "blocks": self.blocks,
            "blocks_cut_short": self.cut_short,
            "block_lengths": dict(sorted(self._lengths.items())),
            "replay_s": self._replay_s,
            "latent_error": {"mean": sum(errors) / len(errors), "worst": max(errors)} if errors else {},
            "exact_because": dict(self.exact_because),
        }
