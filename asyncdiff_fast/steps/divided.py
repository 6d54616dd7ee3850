"""The denoiser's outputs at the points of a window: each point is evaluated by one rank, and known to all."""

import torch

from .shared import SharedOutputs


class Divided:
    """Rank r of N evaluates points r, r + N, … of every window, and all ranks exchange once.

    Args:
        predict: see `sample_window`.
        linear: the sampler.
        noise: (…), for its dtype and device.
        window: points of a round, at most.
        exchange: of the ranks of `world`, or None for one.
    """

    def __init__(self, predict, linear, noise, window, world, exchange):
        self._predict, self._noise, self._world = predict, noise, world
        self._timesteps = linear.timesteps.to(noise.device)
        self._scales = noise.new_tensor(linear.scales, dtype=torch.float64)
        self._shared = None
        if exchange is not None:
            self._shared = SharedOutputs(world, exchange)
            # What is predicted in half precision fits; guidance may have been added in fp32.
            dtype = torch.promote_types(noise.dtype, torch.float32)
            self._mine = noise.new_zeros(-(-window // world.size), *noise.shape, dtype=dtype)
            # The slot is made before a rank can fail in `predict`, so that the others are told at once.
            self._shared.all(self._mine)

    def __call__(self, points, begin):
        """(n, …) fp64: the outputs at points (n, …) fp64 of steps `begin`, `begin` + 1, …. Collective."""
        rank, size = self._world.rank, self._world.size
        steps = range(begin, begin + len(points))[rank::size]
        own = self._outputs(points[rank::size], slice(steps.start, steps.stop, size)) if steps else None
        if self._shared is None:
            return own.double()
        if steps:
            self._mine[: len(steps)] = own
        outputs = torch.empty_like(points)
        for other, theirs in enumerate(self._shared.all(self._mine)):
            outputs[other::size] = theirs[: len(outputs[other::size])]
        return outputs

    def _outputs(self, points, steps):
        """The caller's outputs. Raises: ValueError if they are not one tensor of the points' shape."""
        scales = self._scales[steps].view(-1, *[1] * self._noise.dim())
        inputs = (points * scales).to(self._noise.dtype)
        outputs = self._predict(inputs, self._timesteps[steps])
        if not isinstance(outputs, torch.Tensor) or outputs.shape != inputs.shape:
            got = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise ValueError(
                f"predict must return one tensor of its points' shape, {tuple(inputs.shape)}: got {got}; "
                "combine guidance, and leave out a learned variance, inside predict"
            )
        return outputs
