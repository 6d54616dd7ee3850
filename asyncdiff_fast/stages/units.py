"""Which module calls become units: small enough to balance, whole enough that little crosses between them."""

from ..tracing.recording import Enter, Exit, call_tree
from .graph import build_graph

# A unit is at most this share of a stage where the model can be divided so finely.
GRAIN = 0.01
# Modules that read the latent but no other unit are repeated on every rank up to this share of the total cost.
REPEAT_SOURCE = 0.005
# So are modules that do not depend on the latent (text and time embeddings).
REPEAT_CONDITIONING = 0.05
# A residual block is divided only when it is more than this share of a stage.
DIVIDE_BLOCK = 0.6


def _joins(recording, node):
    """True if the module's own code merges several sources into a result, as a residual sum does.

    Sources are its arguments and the results of its children. Cutting such a module would make each of them travel.
    """
    events, depth = recording.events, 0
    sources = {ref.storage: {ref.storage} for ref in events[node.start].leaves if ref is not None}
    made = set()
    for event in events[node.start + 1 : node.stop]:
        if isinstance(event, Enter):
            depth += 1
        elif isinstance(event, Exit):
            depth -= 1
            if depth == 0:
                sources.update((ref.storage, {ref.storage}) for ref in event.leaves if ref is not None)
        elif depth == 0:
            merged = set().union(*(sources.get(s, ()) for s in event.reads))
            sources.update((s, merged) for s in event.writes)
            made.update(event.writes)
    results = {ref.storage for ref in events[node.stop].leaves if ref is not None}
    return any(len(sources.get(s, ())) > 1 for s in results & made)


def _varies_within(node):
    """True if sizes alone keep what a call calls from being units."""

    def clean(child):
        return not child.opaque and all(map(clean, child.children))

    return any(child.varies for child in node.children) and all(map(clean, node.children))


def choose_units(recording, num_stages, containers):
    """Pick the units: `_pick`, again without the modules that leak, until none does.

    Args and result: as `_pick`; never a module that leaves a tensor behind for others to read.
    """
    leaky = set()
    while True:
        nodes = _pick(recording, num_stages, containers, leaky)
        leaks = build_graph(recording, nodes).leaks
        if not leaks:
            return nodes
        leaky.update(nodes[i].key for i in leaks)


def _pick(recording, num_stages, containers, leaky):
    """Pick units top-down.

    A module is divided while it costs more than `GRAIN` of a stage, its own code does little work outside its
    children, and its own code does not join its parts (a residual block, whose parts would all have to travel).

    Args:
        recording: `Recording` of one forward.
        num_stages: how many stages the units will be divided into.
        containers: names of modules that hold a list of modules (`nn.ModuleList`).
        leaky: keys of call-tree nodes that cannot be units.
    Returns: list of call-tree nodes in execution order.
    """
    root = call_tree(recording)
    stage_cost = max(root.flops, 1) / num_stages
    chosen = []

    def visit(node):
        if not node.runs:
            return
        whole = node.own_flops > 0.1 * node.flops or not node.children
        if node.name not in containers and node.flops <= DIVIDE_BLOCK * stage_cost:
            whole = whole or _joins(recording, node)
        if node.eligible and node.key not in leaky and (whole or node.flops <= GRAIN * stage_cost):
            chosen.append(node)
            return
        if node.eligible and node.key not in leaky and _varies_within(node):
            # As a mixture of experts.
            chosen.append(node)
            return
        for child in node.children:
            visit(child)

    for child in root.children:
        visit(child)
    return _without_repeated(recording, chosen, root.flops)


def _without_repeated(recording, nodes, total):
    """Drop the units that every rank computes for itself: embeddings, and cheap modules next to the input."""
    graph = build_graph(recording, nodes)
    from_latent, from_timestep = set(), set()
    keep = []
    for i, (unit, node) in enumerate(zip(graph.units, nodes, strict=True)):
        producers = {graph.values[v].unit for v in unit.reads}
        if i in graph.reads_latent or producers & from_latent:
            from_latent.add(i)
        if i in graph.reads_timestep or producers & from_timestep:
            from_timestep.add(i)
        if i not in from_latent:
            repeated = i in from_timestep or unit.cost <= REPEAT_CONDITIONING * total
        else:
            repeated = not (producers & set(from_latent)) and unit.cost <= REPEAT_SOURCE * total
        if not repeated:
            keep.append(node)
    return keep


def merge_units(recording, graph, owner):
    """Larger units for the same division: whole modules whose inside nobody else reads or feeds.

    Where all units of a module belong to one stage, the module itself becomes the unit if its first unit is the first
    to read from other stages and only its last one is read by them; then nothing is posted later or awaited earlier
    than before, and ranks that replay it skip everything between its parts. If others are read too, it becomes the unit
    where its result is smaller than all of them, as the sum of a residual block's parts is.

    Args:
        owner: stage of each unit of `graph`.
    Returns: list of call-tree nodes in execution order.
    """
    index = {unit.key: i for i, unit in enumerate(graph.units)}
    producer = [value.unit for value in graph.values]
    read_elsewhere = {producer[v] for i, u in enumerate(graph.units) for v in u.reads if owner[producer[v]] != owner[i]}
    read_elsewhere |= {producer[v] for v in graph.output_reads if owner[producer[v]] != max(owner)}
    merged, sizes = [], {}
    for v, value in enumerate(graph.values):
        sizes[producer[v]] = sizes.get(producer[v], 0) + value.nbytes

    def fits(node, inside):
        if not node.eligible or len({owner[i] for i in inside}) != 1:
            return False
        leaves = {ref.storage: ref.nbytes for ref in recording.events[node.stop].leaves if ref is not None}
        read = read_elsewhere.intersection(inside)
        if not read <= {inside[-1]} and sum(leaves.values()) >= sum(sizes[i] for i in read):
            return False
        reads = [(v, touch) for i in inside for v, touch in graph.units[i].reads.items()]
        return all(touch <= inside[0] for v, touch in reads if owner[producer[v]] != owner[inside[0]])

    def visit(node):
        """Append the largest units within a node; returns the indices of the units inside."""
        if node.key in index:
            merged.append(node)
            return [index[node.key]]
        before = len(merged)
        inside = [i for child in node.children for i in visit(child)]
        if inside and fits(node, inside):
            merged[before:] = [node]
        return inside

    for child in call_tree(recording).children:
        visit(child)
    return merged


def keys_within(node, wanted):
    """Keys of a call-tree node, or of those within it, that are in `wanted`, in execution order."""
    if node.key in wanted:
        return [node.key]
    return [key for child in node.children for key in keys_within(child, wanted)]
