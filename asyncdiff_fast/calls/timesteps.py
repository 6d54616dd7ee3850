"""The next timestep of a generation, as the caller would pass it; needed to compute ahead (stride 2)."""

import torch

from .clock import timestep_value

# How pipelines turn a scheduler's timestep t into the denoiser's argument; N is the number of training timesteps.
MAPS = {
    "t": lambda t, n: t,
    "t / N": lambda t, n: t / n,
    "(N - t) / N": lambda t, n: (n - t) / n,
}


class Timesteps:
    """Follows one generation's timesteps during warm-up, then tells the next one."""

    def __init__(self, scheduler):
        values = getattr(scheduler, "timesteps", None)
        if values is None:
            raise ValueError(
                "stride=2 computes ahead and must know the next timestep: no scheduler with timesteps was seen; pass "
                "scheduler= to patch() or use stride=1"
            )
        self.values = [float(t) for t in torch.as_tensor(values).flatten().tolist()]
        self.train_steps = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000) or 1000)
        self.maps = list(MAPS)
        # Where an image-to-image pipeline begins; a timestep may stand in the list twice.
        self.index = (getattr(scheduler, "begin_index", None) or 0) - 1

    def see(self, timestep):
        """Find an exact step's timestep in the scheduler's list, searching forward from the last one found.

        Raises: ValueError if no known map leads from the scheduler's timesteps to the caller's, or tokens of a
            timestep by token have others than the step's and 0.
        """
        value = timestep_value(timestep)
        if isinstance(timestep, torch.Tensor) and bool(((timestep != timestep.max()) & (timestep != 0)).any()):
            raise ValueError(
                "stride=2 computes ahead, and cannot know the next timesteps of tokens that have one of their own: got "
                f"{float(timestep.min()):g} to {value:g} in one call, where only the step's and 0 (for given tokens) "
                "are understood; use stride=1"
            )
        dtype = timestep.dtype if isinstance(timestep, torch.Tensor) and timestep.is_floating_point() else torch.float32
        close = max(4 * torch.finfo(dtype).eps, 1e-5)
        for i in range(self.index + 1, len(self.values)):
            fits = [m for m in self.maps if self._near(MAPS[m](self.values[i], self.train_steps), value, close)]
            if fits:
                self.maps, self.index = fits, i
                return
        raise ValueError(
            f"stride=2 needs the caller's timesteps to be the scheduler's, as {', '.join(MAPS)}: got {value:g}, "
            f"scheduler's {self.values[:4]} ...; use stride=1"
        )

    @staticmethod
    def _near(a, b, close):
        return abs(a - b) <= close * max(abs(a), abs(b), 1e-3)

    def skip(self):
        """One more step has passed."""
        self.index += 1

    @property
    def is_last(self):
        """True at the last timestep of the list."""
        return self.index + 1 >= len(self.values)

    def following(self, timestep):
        """The next timestep in the type, shape, dtype and device of the caller's; given tokens keep 0."""
        value = MAPS[self.maps[0]](self.values[self.index + 1], self.train_steps)
        if isinstance(timestep, torch.Tensor):
            return torch.where(timestep == timestep.max(), torch.full_like(timestep, value), timestep)
        return type(timestep)(value)
