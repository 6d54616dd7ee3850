"""Random graphs of units for property tests: each value is read by later units, the last unit makes the prediction."""

from hypothesis import strategies as st

from asyncdiff_fast.stages.graph import Graph, Unit, Value
from asyncdiff_fast.tracing.recording import TensorRef


@st.composite
def graphs(draw, max_units=9):
    num_units = draw(st.integers(2, max_units))
    costs = draw(st.lists(st.integers(0, 50), min_size=num_units, max_size=num_units))
    values, leaves = [], []
    for i in range(num_units):
        count = draw(st.integers(1, 2))
        leaves.append(tuple(("value", len(values) + k) for k in range(count)))
        for _ in range(count):
            numel = draw(st.integers(0, 40))
            values.append(Value(i, TensorRef(len(values), (numel,), "float16", 2 * numel, (0, (1,)))))
    units = []
    for i in range(num_units):
        earlier = [v for v, value in enumerate(values) if value.unit < i]
        chosen = draw(st.sets(st.sampled_from(earlier), max_size=4)) if earlier else set()
        # The first touch lies between the maker's end and the reader.
        reads = {v: draw(st.integers(values[v].unit + 1, i)) for v in sorted(chosen)}
        units.append(Unit(f"u{i}", 0, float(costs[i]), leaves[i], reads))
    last = [v for v, value in enumerate(values) if value.unit == num_units - 1]
    others = draw(st.sets(st.sampled_from(range(len(values))), max_size=2))
    output = {v: num_units for v in {last[0], *others}}
    latent = frozenset({0} | draw(st.sets(st.integers(0, num_units - 1), max_size=2)))
    return Graph(tuple(units), tuple(values), output, 0.0, latent, frozenset())


@st.composite
def owned_graphs(draw, max_stages=4):
    """(graph, owner of each unit, number of stages), every stage with a unit."""
    graph = draw(graphs())
    num_units = len(graph.units)
    num_stages = draw(st.integers(2, min(max_stages, num_units)))
    owner = draw(st.lists(st.integers(0, num_stages - 1), min_size=num_units, max_size=num_units))
    for stage in range(num_stages):
        if stage not in owner:
            owner[stage] = stage
    if len(set(owner)) < num_stages:
        owner = [i % num_stages for i in range(num_units)]
    return graph, tuple(owner), num_stages
