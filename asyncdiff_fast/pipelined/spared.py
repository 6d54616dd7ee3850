"""Which modules need not run again in a call's later micro-steps, since the first one's results serve. Pure.

Two kinds: what follows from no rows, such as embeddings of the timestep and of the text; and, where the text behind
every unit is the first micro-step's, what a unit makes for its text alone.
"""

from ..tracing.recording import Enter, Exit, call_tree


def spared(whole, part, graph, rowless, text):
    """Names of modules, none within another, each called once.

    Args:
        whole, part: `Recording`s of a forward on the whole picture and on a patch.
        graph: of the units on the patch; `rowless`: those of its values that hold no rows.
        text: see `pipeline_text`.
    """
    nodes = list(_nodes(call_tree(part)))
    calls = {}
    for node in nodes:
        calls[node.name] = calls.get(node.name, 0) + 1
    shapes = {node.key: _shapes(whole, node) for node in _nodes(call_tree(whole))}
    units = {unit.key: unit for unit in graph.units}
    firsts = rowless if text == "unit" else frozenset()
    needless = _independent(part, nodes, units, firsts)
    if text == "unit":
        for node in nodes:
            if node.key in units:
                needless |= _for_text_alone(part, node, units[node.key], rowless)
    found = []

    def visit(node):
        alike = shapes.get(node.key) == _shapes(part, node)
        # Where one stands for several units, each of them is left out by itself: ranks follow their order.
        whole_units = not any(child.key in units for child in _nodes(node))
        if alike and node.eligible and calls[node.name] == 1 and node.key in needless and whole_units:
            found.append(node.name)
        else:
            for child in node.children:
                visit(child)

    for child in call_tree(part).children:
        visit(child)
    return frozenset(found)


def _nodes(node):
    for child in node.children:
        yield child
        yield from _nodes(child)


def _shapes(recording, node):
    return [ref and ref.shape for ref in recording.events[node.stop].leaves]


def _independent(recording, nodes, units, firsts):
    """Keys of the modules whose results do not follow from the latent; values `firsts` count as such."""
    stops, follows, found = {node.stop: node for node in nodes}, set(recording.latent), set()
    for i, event in enumerate(recording.events):
        if isinstance(event, Exit):
            node = stops[i]
            if node.key in units:
                leaves = zip(event.leaves, units[node.key].leaves, strict=True)
                follows -= {ref.storage for ref, leaf in leaves if leaf and leaf[0] == "value" and leaf[1] in firsts}
            if not any(ref is not None and ref.storage in follows for ref in event.leaves):
                found.add(node.key)
        elif not isinstance(event, Enter) and not follows.isdisjoint(event.reads):
            follows.update(event.writes)
    return found


def _for_text_alone(recording, unit_node, unit, rowless):
    """Keys of the modules within a unit of which nothing with rows is made."""
    inside = {node.start: node for node in _nodes(unit_node)}
    made, stack = {}, []
    for i in range(unit_node.start + 1, unit_node.stop):
        event = recording.events[i]
        if isinstance(event, Enter):
            stack.append(inside[i].key)
        elif isinstance(event, Exit):
            stack.pop()
        else:
            by = set(stack).union(*(made.get(s, ()) for s in event.reads))
            for storage in event.writes:
                made.setdefault(storage, set()).update(by)
    used = set()
    for ref, leaf in zip(recording.events[unit_node.stop].leaves, unit.leaves, strict=True):
        if ref is not None and not (leaf[0] == "value" and leaf[1] in rowless):
            used |= made.get(ref.storage, set())
    if unit.writes:
        return set()
    return {node.key for node in inside.values()} - used
