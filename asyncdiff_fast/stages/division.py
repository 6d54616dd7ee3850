"""Divide the units of a graph into stages: balance first, then few bytes across, then few stale hops.

Stale values that are predicted instead of reused bear few hops well and many badly, so that hops weigh more there.

Three shapes of division are searched, all as boundaries in execution order. With stages written in that order,
`contiguous` is 0 1 2; `cyclic` is 2 0 1 2: one head stage has both ends of the model, so the latent enters and the
prediction leaves on the same rank; `nested` is 2 1 0 1 2: every stage has the two sides of one ring of a U-Net.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

# Imbalance up to this is as good as none; beyond it, balance outweighs bytes.
TOLERANCE = 0.006
# One percent of imbalance is worth ten percent of all activations crossing.
BALANCE_WEIGHT = 10.0
# Each stale hop from latent to prediction counts like this share more bytes.
HOP_WEIGHT = 0.1
# Where stale values are predicted, errors multiply from hop to hop: one hop less is worth this much imbalance.
PREDICTED_HOP_IMBALANCE = 0.05


@dataclass(frozen=True)
class Division:
    """`owner[i]` is the stage of unit i; the last stage makes the prediction.

    `balance` is the cost of the largest stage over the mean; `cut_bytes` counts each tensor once per stage that reads
    it and did not make it; `hops` is the number of stage changes on the shortest and the longest way from the latent
    to the prediction.
    """

    owner: tuple[int, ...]
    num_stages: int
    balance: float
    cut_bytes: int
    hops: tuple[int, int]
    costs: tuple[float, ...]


class _Costs:
    """Arrays of a graph for judging many divisions at once."""

    def __init__(self, graph, num_stages):
        self.num_stages = num_stages
        self.cost = np.array([u.cost for u in graph.units])
        self.prefix = np.concatenate([[0.0], np.cumsum(self.cost)])
        self.nbytes = np.array([v.nbytes for v in graph.values], dtype=np.float64)
        self.producer = np.array([v.unit for v in graph.values], dtype=np.int64)
        readers = [[] for _ in graph.values]
        for i, unit in enumerate(graph.units):
            for v in unit.reads:
                readers[v].append(i)
        last = output_unit(graph)
        for v in graph.output_reads:
            readers[v].append(last)
        self.edges = [(v, np.array(r)) for v, r in enumerate(readers) if r]

    def judge(self, owners):
        """(balance, bytes) of each row of `owners`, an integer array (num_divisions, num_units)."""
        stage_cost = np.stack([(self.cost * (owners == s)).sum(1) for s in range(self.num_stages)], 1)
        mean = max(self.cost.sum() / self.num_stages, 1e-30)
        crossing = np.zeros(len(owners))
        bits = np.left_shift(1, owners)
        for v, readers in self.edges:
            mask = np.bitwise_or.reduce(bits[:, readers], axis=1) & ~bits[:, self.producer[v]]
            if mask.any():
                crossing += self.nbytes[v] * np.bitwise_count(mask)
        return stage_cost.max(1) / mean, crossing

    def score(self, owners, hop_factor):
        """What the search minimises, for each row of `owners`."""
        balance, crossing = self.judge(owners)
        excess = np.maximum(balance - 1 - TOLERANCE, 0)
        return BALANCE_WEIGHT * excess + hop_factor * crossing / max(self.nbytes.sum(), 1.0)


def output_unit(graph):
    """Index of the last unit that the prediction reads: its stage makes the prediction."""
    if not graph.output_reads:
        raise ValueError("the model's result does not depend on any unit; list modules that make it in stages=")
    return max(graph.values[v].unit for v in graph.output_reads)


def stale_hops(graph, owner):
    """(fewest, most) stage changes between the latent and the prediction, over all ways through the graph."""
    low, high = [], []
    for i, unit in enumerate(graph.units):
        ways = [(p, owner[p] != owner[i]) for p in {graph.values[v].unit for v in unit.reads}]
        fresh = [0] if i in graph.reads_latent or not ways else []
        low.append(min(fresh + [low[p] + hop for p, hop in ways]))
        high.append(max(fresh + [high[p] + hop for p, hop in ways]))
    last = output_unit(graph)
    ends = [(p, owner[p] != owner[last]) for p in {graph.values[v].unit for v in graph.output_reads}]
    return min(low[p] + hop for p, hop in ends), max(high[p] + hop for p, hop in ends)


def describe(graph, owner, num_stages):
    """The `Division` with this owner of each unit, its stages renumbered so that the last makes the prediction."""
    last = owner[output_unit(graph)]
    order = [s for s in range(num_stages) if s != last] + [last]
    owner = tuple(order.index(s) for s in owner)
    costs = _Costs(graph, num_stages)
    balance, crossing = costs.judge(np.array([owner]))
    shares = tuple(float(costs.cost[np.array(owner) == s].sum()) for s in range(num_stages))
    return Division(owner, num_stages, float(balance[0]), int(crossing[0]), stale_hops(graph, owner), shares)


def _patterns(n):
    """Stage labels of the pieces, in execution order, for each shape of division."""
    head = n - 1
    yield list(range(n))
    yield [head, *range(n - 1), head]
    if n > 2:
        yield [*range(head, 0, -1), *range(n)]


def _owners(bounds, labels, num_units):
    """Owner of each unit for rows of piece boundaries (num_divisions, len(labels) - 1)."""
    piece = (np.arange(num_units)[None, :, None] >= bounds[:, None, :]).sum(2)
    return np.array(labels)[piece]


def _starts(costs, labels):
    """Balanced boundaries to begin the search from."""
    n, total = costs.num_stages, costs.prefix[-1]
    pieces = len(labels)
    fractions = []
    if pieces == n:
        fractions.append(np.arange(1, n) / n)
    for first in np.linspace(0.05, 0.95, 19):
        if pieces == n + 1:
            fractions.append((first + np.arange(n)) / n)
        elif pieces > n + 1:
            down = first * np.arange(1, n) / n
            fractions.append(np.concatenate([down, 1 - (1 - first) * np.arange(n - 1, 0, -1) / n]))
    reached = [np.searchsorted(costs.prefix, f * total).clip(0, len(costs.cost)) for f in fractions]
    # Units of one size: if all boundaries lie one unit late, no two of them that move make the largest stage smaller.
    return reached + [np.abs(costs.prefix[None] - f[:, None] * total).argmin(1) for f in fractions]


def _improve(costs, labels, bounds, hop_factor):
    """Move boundaries, two at a time, to wherever the score is least, until nothing improves."""
    num_units, k = len(costs.cost), len(labels) - 1
    best = float(costs.score(_owners(bounds[None], labels, num_units), hop_factor)[0])
    groups = list(combinations(range(k), 2)) or [(0,)]
    improved = True
    while improved:
        improved = False
        for group in groups:
            low = bounds[group[0] - 1] if group[0] else 0
            high = bounds[group[-1] + 1] if group[-1] + 1 < k else num_units
            grid = np.stack(np.meshgrid(*[np.arange(low, high + 1)] * len(group), indexing="ij"), -1)
            grid = grid.reshape(-1, len(group))
            rows = np.repeat(bounds[None], len(grid), 0)
            rows[:, group] = grid
            rows = rows[(np.diff(rows, axis=1) >= 0).all(1)]
            # Costs by prefix sums first: only rows that can win are judged in full.
            rows = rows[_balance_bound(costs, labels, rows) <= best]
            for chunk in np.array_split(rows, max(1, len(rows) // 4096)):
                if not len(chunk):
                    continue
                scores = costs.score(_owners(chunk, labels, num_units), hop_factor)
                if scores.min() < best - 1e-12:
                    best, bounds, improved = float(scores.min()), chunk[scores.argmin()], True
    return best, bounds


def _balance_bound(costs, labels, rows):
    """A lower bound of the score from balance alone."""
    edges = np.concatenate([np.zeros((len(rows), 1), int), rows, np.full((len(rows), 1), len(costs.cost))], 1)
    piece = np.diff(costs.prefix[edges], axis=1)
    stage = np.stack([piece[:, [i for i, s in enumerate(labels) if s == t]].sum(1) for t in range(costs.num_stages)], 1)
    mean = max(costs.prefix[-1] / costs.num_stages, 1e-30)
    return BALANCE_WEIGHT * np.maximum(stage.max(1) / mean - 1 - TOLERANCE, 0)


def divide(graph, num_stages, predicts=False, contiguous=False):
    """Search a division of the units into `num_stages` stages.

    Args:
        predicts: stale values will be predicted, not reused.
        contiguous: only stages that follow one another are wanted.
    Returns: `Division`.
    Raises: ValueError if there are fewer units than stages.
    """
    num_units = len(graph.units)
    if num_units < num_stages:
        raise ValueError(
            f"num_stages must not exceed the number of units: got num_stages={num_stages}, the traced model has "
            f"{num_units} units ({', '.join(u.name for u in graph.units)}); use fewer stages"
        )
    if num_stages == 1:
        return describe(graph, (0,) * num_units, 1)
    costs, found = _Costs(graph, num_stages), []
    for labels in list(_patterns(num_stages))[: 1 if contiguous else None]:
        if len(labels) > num_units:
            continue
        hop_factor = 1 + HOP_WEIGHT * (len(labels) - 1)
        starts = sorted(
            _starts(costs, labels), key=lambda b: costs.score(_owners(b[None], labels, num_units), hop_factor)[0]
        )
        for start in starts[:4]:
            score, bounds = _improve(costs, labels, start, hop_factor)
            owner = tuple(int(s) for s in _owners(bounds[None], labels, num_units)[0])
            if len(set(owner)) == num_stages:
                hops = stale_hops(graph, owner)[1] if predicts else 0
                found.append((score + BALANCE_WEIGHT * PREDICTED_HOP_IMBALANCE * hops, owner))
    # Without any cost to go by, no start gives every stage a unit: then as many units to each.
    even = tuple(i * num_stages // num_units for i in range(num_units))
    return describe(graph, min(found)[1] if found else even, num_stages)


def backward_reads(graph, division):
    """[(unit, unit of a later stage that it reads)]: none where one forward can pass through the stages in order."""
    found = []
    for i, unit in enumerate(graph.units):
        producers = {graph.values[v].unit for v in unit.reads}
        found += [(unit, graph.units[p]) for p in sorted(producers) if division.owner[p] > division.owner[i]]
    return found


def from_names(graph, stages):
    """The `Division` that a user's lists of module names ask for."""
    stage_of = {name: s for s, names in enumerate(stages) for name in names}
    return describe(graph, tuple(stage_of[u.name] for u in graph.units), len(stages))
