"""The search for stages against a plain count, on random graphs."""

import itertools

import pytest
from graphs import graphs, owned_graphs
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdiff_fast.stages.division import HOP_WEIGHT, _Costs, describe, divide, from_names, np, output_unit
from asyncdiff_fast.stages.graph import Graph, Unit, Value
from asyncdiff_fast.tracing.recording import TensorRef


def brute_force(graph, owner, num_stages):
    """(balance, bytes, fewest and most hops), each by the words of its definition."""
    cost = [sum(u.cost for u, o in zip(graph.units, owner, strict=True) if o == s) for s in range(num_stages)]
    mean = sum(cost) / num_stages
    last = max(graph.values[v].unit for v in graph.output_reads)
    crossing = set()
    for reader, reads in [*enumerate(u.reads for u in graph.units), (last, graph.output_reads)]:
        crossing |= {(v, owner[reader]) for v in reads if owner[graph.values[v].unit] != owner[reader]}

    def ways(unit, reads):
        """Stage changes of every way that ends in `unit`."""
        producers = {graph.values[v].unit for v in reads}
        for p in producers:
            for hops in ways(p, graph.units[p].reads):
                yield hops + (owner[p] != owner[unit])
        is_output = unit == last and reads is graph.output_reads
        if not is_output and (unit in graph.reads_latent or not producers):
            yield 0

    hops = list(ways(last, graph.output_reads))
    return max(cost) / mean if mean else 0.0, sum(graph.values[v].nbytes for v, _ in crossing), min(hops), max(hops)


@settings(max_examples=150, deadline=None)
@given(owned_graphs())
def test_describe_counts_right(drawn):
    graph, owner, num_stages = drawn
    division = describe(graph, owner, num_stages)
    balance, cut_bytes, low, high = brute_force(graph, owner, num_stages)
    assert division.balance == pytest.approx(balance)
    assert division.cut_bytes == cut_bytes
    assert division.hops == (low, high)
    assert sum(division.costs) == pytest.approx(sum(u.cost for u in graph.units))
    assert division.owner[output_unit(graph)] == num_stages - 1
    groups = {frozenset(i for i, o in enumerate(of) if o == s) for of in (owner, division.owner) for s in set(of)}
    assert len(groups) == num_stages, "renumbering must not move a unit"


@settings(max_examples=80, deadline=None)
@given(graphs(), st.integers(1, 5))
def test_divide_is_valid(graph, num_stages):
    if num_stages > len(graph.units):
        with pytest.raises(ValueError, match="num_stages must not exceed the number of units"):
            divide(graph, num_stages)
        return
    division = divide(graph, num_stages)
    assert len(division.owner) == len(graph.units)
    assert set(division.owner) == set(range(num_stages))
    assert division == divide(graph, num_stages), "every rank must find the same"
    assert division.cut_bytes == brute_force(graph, division.owner, num_stages)[1]


@settings(max_examples=40, deadline=None)
@given(graphs(max_units=8), st.integers(2, 3))
def test_divide_beats_every_contiguous_division(graph, num_stages):
    """The contiguous shape is searched in full for two and three stages: nothing contiguous may be better."""
    if num_stages > len(graph.units) or not any(u.cost for u in graph.units):
        return
    costs = _Costs(graph, num_stages)
    hop_factor = 1 + HOP_WEIGHT * (num_stages - 1)

    def score(owner):
        return float(costs.score(np.array([owner]), hop_factor)[0])

    found = score(divide(graph, num_stages).owner)
    num_units = len(graph.units)
    for bounds in itertools.combinations(range(1, num_units), num_stages - 1):
        owner = [sum(i >= b for b in bounds) for i in range(num_units)]
        # A cyclic winner is judged with its own hop factor, which is at most one hop more.
        assert found <= score(owner) + 1e-9


def chain(costs, nbytes=2):
    """Units one after the other, each reading the one before."""
    values = [Value(i, TensorRef(i, (nbytes // 2,), "float16", nbytes, (0, (1,)))) for i in range(len(costs))]
    units = [Unit(f"u{i}", 0, c, (("value", i),), {i - 1: i} if i else {}) for i, c in enumerate(costs)]
    last = len(costs) - 1
    return Graph(tuple(units), tuple(values), {last: last + 1}, 0.0, frozenset({0}), frozenset())


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_even_chain_is_divided_evenly(num_stages):
    division = divide(chain([1.0] * 24), num_stages)
    assert division.balance == 1.0
    assert division.owner == tuple(i * num_stages // 24 for i in range(24))
    assert division.hops == (num_stages - 1, num_stages - 1)


@pytest.mark.parametrize("num_stages", [2, 4, 5])
def test_a_small_unit_at_the_end_moves_no_boundary(num_stages):
    division = divide(chain([1.0] * 20 + [0.1]), num_stages, contiguous=True)
    assert max(division.costs) == pytest.approx(20 / num_stages + 0.1)


@pytest.mark.parametrize("imbalance, predicts, hops", [(0.04, False, 2), (0.04, True, 1), (0.08, True, 2)])
def test_predictions_pay_balance_for_fewer_hops(imbalance, predicts, hops):
    """One unit makes half of the work. The others divide evenly around it, or unevenly with a hop less."""
    graph = chain([imbalance / 4] * 4 + [1.0] + [(1 - imbalance) / 24] * 24)
    division = divide(graph, 2, predicts)
    assert division.hops == (hops, hops)
    assert division.balance == pytest.approx(1 if hops == 2 else 1 + imbalance)


def test_from_names_keeps_the_users_stages():
    graph = chain([1.0, 5.0, 1.0])
    assert from_names(graph, [["u0", "u1"], ["u2"]]).owner == (0, 0, 1)
    # The stage that makes the prediction is numbered last.
    assert from_names(graph, [["u2"], ["u0", "u1"]]).owner == (0, 0, 1)


def test_a_result_of_no_unit_is_refused():
    graph = chain([1.0, 1.0])
    alone = Graph(graph.units, graph.values, {}, 0.0, graph.reads_latent, graph.reads_timestep)
    with pytest.raises(ValueError, match="does not depend on any unit"):
        divide(alone, 2)
