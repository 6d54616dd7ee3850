"""How long a sampling loop is: no block reaches past its last step."""

import torch

CLOSE = 1e-4


def num_steps(scheduler, timestep, told):
    """Steps of a loop from its first one on; None if neither the scheduler nor the pipeline tells.

    Args:
        scheduler: the loop's.
        timestep: what its first `step` was given.
        told: the pipeline's own count, or None.
    """
    found = [n for n in (_left(scheduler, timestep), told) if isinstance(n, int) and n > 0]
    return min(found, default=None)


def _left(scheduler, timestep):
    """Entries of the scheduler's list from a timestep on."""
    values = getattr(scheduler, "timesteps", None)
    if values is None or timestep is None:
        return None
    values = [float(t) for t in torch.as_tensor(values).flatten().tolist()]
    value = float(timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep)
    first = getattr(scheduler, "begin_index", None) or 0
    for i, known in enumerate(values[first:], first):
        if abs(known - value) <= CLOSE * max(abs(known), abs(value), 1.0):
            return len(values) - i
    return None
