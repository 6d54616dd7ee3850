"""What stale values stand for: h(k) ~ h(k-1) + weight * (h(k-1) - h(k-2)), with weight = damping * ratio.

`ratio` is the sampler's interval from the call that made the last value to the one that reads it, over the interval
between the calls that made the two values. The reader predicts, so nothing more travels. A prediction answers the
fastest change, one that turns at every call, with 1 + 2 * weight; over a chain of stale hops these gains multiply, and
the sampler feeds a share of the outcome, its interval, back into the next call. `damping` bounds that loop.
"""

from ..calls.timesteps import Timesteps
from ..calls.watch import last_scheduler

# Largest gain of a chain of stale hops, for each step of the generation: see docs/prediction.md.
GAIN_PER_STEP = 0.54
# Between fewer steps a change says less of the next: half as many steps, half as much of it.
FULL_STEPS = 20
# Where no scheduler tells how many steps there are.
ASSUMED_STEPS = 25
# A trend is not carried further than this many of the intervals that it was seen over.
LARGEST_RATIO = 1.0


class Instants:
    """The sampler's timestep at each step of one generation; the step's own number where no scheduler tells.

    Args:
        scheduler: the last one seen, or None.
        timestep: the denoiser's at `step`; read from the device here, once a generation.
    """

    def __init__(self, scheduler, timestep, step):
        self._values, self._first, self.num_steps = (), 0, ASSUMED_STEPS
        try:
            known = Timesteps(scheduler)
            known.see(timestep)
        except (ValueError, TypeError):
            return
        self._values, self._first = known.values, known.index - step
        # A multistep solver extrapolates too: it answers fast changes like one of longer steps.
        order = getattr(getattr(scheduler, "config", None), "solver_order", None) or 1
        self.num_steps = len(known.values) / order

    def at(self, step):
        """The timestep at a step, counted from 0."""
        place = self._first + step
        return self._values[place] if place < len(self._values) else float(step)


def damping(hops, num_steps):
    """The share of a change that is carried forward, in (0, 1], for a chain of `hops` stale values."""
    gain = (GAIN_PER_STEP * num_steps) ** (1 / max(hops, 1))
    return min(max((gain - 1) / 2, 0.0), 1.0) * min(num_steps / FULL_STEPS, 1.0)


def ratio(read_at, last, before):
    """Interval from `last` to `read_at` over that from `before` to `last`; 0 (reuse) where there is no such trend."""
    if last is None or before is None or last == before:
        return 0.0
    return min(max((read_at - last) / (last - before), 0.0), LARGEST_RATIO)


class Trend:
    """When the last two values of a pass were made, and how much of their difference a prediction adds.

    `last_step` is that of its latest call, -1 where this generation had none yet.

    Args:
        hops: most stale values on a way from the latent to the prediction.
        stride: steps between two computing calls.
    """

    def __init__(self, hops, stride=1):
        self._hops, self._stride = hops, stride
        self.weight = self.weight_before = 0.0
        self.last_step = -1
        self.begin(Instants(None, None, 0))

    def end(self):
        """What was made until now is not read again."""
        self.last_step = -1

    def follow(self, step, timestep, scheduler=None):
        """A call at a step, with the denoiser's timestep; True if it is the first of a generation.

        Args:
            scheduler: the loop's, if it is not the one seen last.
        """
        first = self.last_step < 0
        if first:
            self.begin(Instants(scheduler or last_scheduler(), timestep, step))
        self.last_step = step
        return first

    def begin(self, instants):
        """A generation begins: values that were made before are not looked at again."""
        self._instants = instants
        self._damping = damping(self._hops, instants.num_steps / self._stride)
        self._last = self._before = None

    def made(self, step):
        """New values were made, for a step."""
        self._last, self._before = self._instants.at(step), self._last

    def weigh(self, step):
        """Set `weight` for values that are read for a step; 0 is reuse. The last call's is kept in `weight_before`."""
        self.weight_before = self.weight
        self.weight = self._damping * ratio(self._instants.at(step), self._last, self._before)


def extrapolate(before, last, weight):
    """`before` becomes last + weight * (last - before); tensors of one shape and dtype, products in fp32."""
    if weight == 0:
        before.copy_(last)
    else:
        before.lerp_(last, 1 + weight)
