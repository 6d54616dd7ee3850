"""Picard iteration on a sliding window of steps: the increments of the last iterate, summed from the first point.

Every round evaluates all points of the window at once. The first of them is final, so at least one more becomes so, and
with it all before the first that still moves by more than the tolerance allows.
Source: ParaDiGMS (Shih et al., arXiv 2305.16317), algorithm 1, and StableDiffusionParadigmsPipeline of diffusers.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Picard:
    """Options of "picard".

    Args:
        window: points that a round evaluates, at most; default all.
        tolerance: a point is final when it moves by less, in standard deviations of the next step's variance.
        end_at_one: the last step of DDIM goes to α = 1, as published, whatever the scheduler says.
    """

    window: int | None = None
    tolerance: float = 0.1
    end_at_one: bool = False

    def rounds(self, linear, noise, evaluate):
        """Yield (first step, step after the last, points) of every round.

        Args:
            linear: the sampler.
            noise: (…) fp64.
            evaluate: function of points (n, …) and the first one's step; returns outputs (n, …) fp64.
        Points are (num_steps + 1, …) fp64, from noise to picture, in the same memory in every round.
        """
        num_steps = linear.num_steps
        window = min(self.window or num_steps, num_steps)
        # The picture has no next step: it is never final before its turn.
        variances = noise.new_tensor([*linear.variances[1:], 0.0])
        points = noise.repeat(num_steps + 1, *[1] * noise.dim())
        begin, end = 0, window
        while begin < num_steps:
            outputs = evaluate(points[begin:end], begin)
            increments = torch.stack(
                [
                    linear.a[k] * points[k] + linear.b[k] * u - points[k]
                    for k, u in zip(range(begin, end), outputs, strict=True)
                ]
            )
            new = points[begin] + increments.cumsum(0)
            moved = (new - points[begin + 1 : end + 1]).flatten(1).square().mean(1)
            still = (moved <= self.tolerance**2 * variances[begin:end]).tolist()
            final = still.index(False) if False in still else len(still)
            points[begin + 1 : end + 1] = new
            done = begin, end
            begin = min(begin + 1 + final, end)
            end = min(begin + window, num_steps)
            points[done[1] + 1 : end + 1] = points[done[1]]
            yield *done, points
