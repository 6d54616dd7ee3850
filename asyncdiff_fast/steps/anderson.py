"""Triangular Anderson acceleration of a sliding window of steps.

Point q solves x[q] = the linear sampler from k steps before it, with outputs at the points of the last iterate. Each
round moves a point by its residual R, and then by what the last rounds' changes of R and x tell: γ minimises
|R - ΔR γ|² + λ |γ|², summed over the points from the window's first to q, since those after it have no say in it.
Source: ParaTAA (Tang et al., arXiv 2402.09970), and class ParallelDDIM of TZW1998/ParaTAA-Diffusion. As in that code, a
point that entered late is moved by the oldest differences that are kept; and the last point of a window, which begins
at zero, is made anew when the window moves on. Both show in the rounds only, not in what they end with. Unlike there,
it is kept where the window moves on by its whole length: it is what the next one begins with.
"""

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Anderson:
    """Options of "anderson".

    Args:
        window: points that a round evaluates, at most; default all.
        order: steps that one equation spans, k.
        memory: rounds that are looked at; 1 is the iteration without acceleration.
        regularisation: λ.
        tol1: a step is done when its residual's root mean square is no more than this,
        tol2: or no more than this many standard deviations of DDPM's step.
    """

    window: int | None = None
    order: int = 20
    memory: int = 3
    regularisation: float = 1e-3
    tol1: float = 1e-3
    tol2: float = 1e-3

    def rounds(self, linear, noise, evaluate):
        """Yield (first step, step after the last, points) of every round, as `Picard.rounds` does."""
        num_steps = linear.num_steps
        window = min(self.window or num_steps, num_steps)
        points = noise.new_zeros(num_steps + 1, *noise.shape)
        points[0] = noise
        begin, entered, history = 0, 1, []
        while begin < num_steps:
            end, reached = min(begin + window, num_steps), min(begin + window, num_steps + 1)
            # The point that the window now begins with is final; the published code loses it where a round solved all.
            entered = max(entered, begin + 1)
            if entered < reached:
                points[entered:reached] = points[entered - 1].clone()
                entered = reached
            outputs = evaluate(points[begin:end], begin)
            unsolved = self._unsolved(linear, points, outputs, begin)
            residuals = _residuals(linear, points, outputs, begin, self.order)
            new = points[begin + 1 : end + 1] + residuals
            history = [*history, Round(points, residuals, begin, end)][-self.memory :]
            if unsolved is not None and len(history) > 1:
                first = unsolved + 2
                new[first - begin - 1 :] -= _correction(history, first, self.regularisation)
            done = begin, end
            points[begin + 1 : end + 1] = new
            begin = end if unsolved is None else unsolved + 1
            yield *done, points

    def _unsolved(self, linear, points, outputs, begin):
        """The first step of the window whose equation does not hold yet, or None."""
        residuals = _residuals(linear, points, outputs, begin, 1)
        for k, rms in enumerate(residuals.flatten(1).square().mean(1).sqrt().tolist(), begin):
            if rms > self.tol1 and rms > self.tol2 * linear.variances[k] ** 0.5:
                return k
        return None


class Round:
    """One round's points and residuals, by number of the point: 0 where it had none."""

    def __init__(self, points, residuals, begin, end):
        self.begin, self.end = begin, end
        self.points, self.residuals = torch.zeros_like(points), torch.zeros_like(points)
        self.points[begin + 1 : end + 1] = points[begin + 1 : end + 1]
        self.residuals[begin + 1 : end + 1] = residuals


def _residuals(linear, points, outputs, begin, order):
    """(n, …): what n steps from `begin` on make of the points `order` steps before, less the points that are there."""
    found = []
    for k in range(begin, begin + len(outputs)):
        first = max(k + 1 - order, begin)
        x = points[first]
        for j in range(first, k + 1):
            x = linear.a[j] * x + linear.b[j] * outputs[j - begin]
        found.append(x - points[k + 1])
    return torch.stack(found)


def _correction(history, first, regularisation):
    """(n, …): what is taken from the points `first` … of the last round's window after their residuals are added."""
    begin, end = history[-1].begin, history[-1].end
    seen = slice(begin + 1, end + 1)
    pairs = list(itertools.pairwise(history))
    # (m, points, numbers)
    change = torch.stack([(new.residuals - old.residuals)[seen].flatten(1) for old, new in pairs])
    moved = torch.stack([(new.points - old.points)[seen].flatten(1) for old, new in pairs]) + change
    residuals = history[-1].residuals[seen].flatten(1)
    # Sums over the points up to each.
    products = torch.einsum("cqd,eqd->qce", change, change).cumsum(0)
    sides = torch.einsum("cqd,qd->qc", change, residuals).cumsum(0)
    # A point of r rounds has r - 1 differences. Where a column is 0, so is its γ.
    rounds = torch.tensor([sum(h.end >= q for h in history) for q in range(begin + 1, end + 1)])
    used = (torch.arange(len(pairs)) < rounds[:, None] - 1).to(products)
    products = products * used[:, :, None] * used[:, None, :]
    ridge = regularisation * torch.eye(len(pairs), dtype=products.dtype, device=products.device)
    gamma = torch.linalg.solve(products + ridge, (sides * used)[..., None])[..., 0]
    correction = torch.einsum("qc,cqd->qd", gamma, moved)
    return correction.view(history[-1].residuals[seen].shape)[first - begin - 1 :]
