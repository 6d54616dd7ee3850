"""Units of a denoiser, their costs, and who reads whom through the code between them.

Derived from a `Recording`, purely. Every unit result tensor is a value; tags of values flow through the operations of
the glue (all code outside units), so a unit's reads are exact whatever the glue does: concatenation, residual sums,
tuples, attributes.
"""

from dataclasses import dataclass, replace

from ..tracing.recording import LATENT, TIMESTEP, Enter, Exit, TensorRef, call_tree

# Tags from here downwards stand for tensors that a unit (-10: the first) made and did not return.
_HIDDEN = -10


@dataclass(frozen=True)
class Value:
    """A tensor that a unit makes. `unit` is the unit's index; `argument` the argument it is written into, if any."""

    unit: int
    ref: TensorRef
    argument: int | None = None

    @property
    def nbytes(self):
        """Bytes of the tensor."""
        return self.ref.nbytes


@dataclass(frozen=True)
class Unit:
    """A module call that runs or is replayed as a whole.

    `leaves` has for each result leaf ("value", id), ("argument", index) where an argument is handed through, or None
    where the leaf is no tensor. `reads` maps each value read to the position of its first touch: the unit before which
    (or in which) its data are first used.
    """

    name: str
    call: int
    cost: float
    leaves: tuple[tuple[str, int] | None, ...]
    reads: dict[int, int]
    writes: tuple[int, ...] = ()

    @property
    def key(self):
        """(name, call): what the unit is known by."""
        return self.name, self.call


@dataclass(frozen=True)
class Graph:
    """Units in execution order, values, and what the prediction reads. `glue_cost` is everything outside units.

    `leaks` are units that leave a tensor behind which is read later, though they did not return it: cut there, and its
    reader would find nothing. `remembers` are modules that keep what follows from units' results for their next call,
    which would differ between ranks.
    """

    units: tuple[Unit, ...]
    values: tuple[Value, ...]
    output_reads: dict[int, int]
    glue_cost: float
    reads_latent: frozenset[int]
    reads_timestep: frozenset[int]
    leaks: frozenset[int] = frozenset()
    remembers: tuple[str, ...] = ()

    def with_costs(self, seconds):
        """The same graph with measured costs; `seconds` maps (name, call) to a number."""
        return replace(self, units=tuple(replace(u, cost=seconds[u.key]) for u in self.units))


class _Walk:
    """One pass over the events that carries the tags of every storage."""

    def __init__(self, recording, nodes):
        self.recording = recording
        self.nodes = {node.start: node for node in nodes}
        # A tag maps a value to the position of the first touch of its data, None while nothing has touched them.
        self.tags = {s: {LATENT: None} for s in recording.latent}
        self.tags |= {s: {TIMESTEP: None} for s in recording.timestep}
        self.units, self.values = [], []
        self.glue_cost = 0.0
        self.branch_reads = {}

    def run(self):
        """Returns the `Graph`."""
        events, i = self.recording.events, 0
        while i < len(events):
            node = self.nodes.get(i)
            if node is not None:
                self._unit(node)
                i = node.stop + 1
                continue
            if not isinstance(events[i], Enter | Exit):
                self._glue(events[i])
            i += 1
        output = {}
        for ref in self.recording.output:
            if ref is not None:
                _merge(output, self._touched(self.tags.get(ref.storage, {}), len(self.units)))
        if self.branch_reads or self.recording.steered:
            # Numbers decide what Python does, so another step may read anything that was made before.
            for i, reads in enumerate((*(r for _, r in self.units), output)):
                reads.update((v, value.unit + 1) for v, value in enumerate(self.values) if value.unit < i)
        hidden = {tag for reads in (output, *(r for _, r in self.units)) for tag in reads if tag <= _HIDDEN}
        inputs = [frozenset(i for i, (_, reads) in enumerate(self.units) if tag in reads) for tag in (LATENT, TIMESTEP)]
        leaks = frozenset(_HIDDEN - tag for tag in hidden)
        units = tuple(replace(u, reads=_values_only(reads)) for u, reads in self.units)
        made = {s for s, tags in self.tags.items() if any(tag >= 0 or tag <= _HIDDEN for tag in tags)}
        remembers = tuple(name for name, storages in self.recording.state if made.intersection(storages))
        return Graph(units, tuple(self.values), _values_only(output), self.glue_cost, *inputs, leaks, remembers)

    def _touched(self, tags, position):
        return {tag: position if touch is None else touch for tag, touch in tags.items()}

    def _glue(self, op):
        self.glue_cost += op.flops
        position, tags = len(self.units), {}
        for storage in op.reads:
            _merge(tags, self._touched(self.tags.get(storage, {}), position))
        if op.branches:
            _merge(self.branch_reads, tags)
        for storage in op.writes:
            # A storage that was only allocated has no tags; one that is written in place keeps those it had.
            merged = dict(self._touched(self.tags.get(storage, {}), position))
            _merge(merged, tags)
            self.tags[storage] = merged

    def _unit(self, node):
        events, index = self.recording.events, len(self.units)
        reads, inner, mutated = dict(self.branch_reads), set(), set()
        existing = {ref.storage for ref in events[node.start].leaves if ref is not None} | set(self.tags)
        for event in events[node.start + 1 : node.stop]:
            if isinstance(event, Enter | Exit):
                continue
            for storage in event.reads:
                if storage not in inner:
                    _merge(reads, self._touched(self.tags.get(storage, {}), index))
            mutated.update(s for s in event.writes if s in existing and s not in inner)
            inner.update(event.writes)
        # What is not returned is not there on ranks that replay the unit; whoever reads it makes it a leak.
        self.tags.update((s, {_HIDDEN - index: None}) for s in inner - mutated)
        leaves, writes = self._results(node, index, inner, mutated, reads)
        self.units.append((Unit(node.name, node.call, float(node.flops), leaves, {}, writes), reads))

    def _results(self, node, index, inner, mutated, reads):
        """Make a value of each tensor the unit made; hand through what it only passed on."""
        arguments = self.recording.events[node.start].leaves
        known, leaves, fresh = [], [], {}
        for ref in self.recording.events[node.stop].leaves:
            if ref is None:
                leaves.append(None)
                continue
            same = next((i for i, a in enumerate(arguments) if a is not None and a.same_tensor(ref)), None)
            if same is not None and ref.storage not in inner:
                leaves.append(("argument", same))
                continue
            value = next((v for v, r in known if r.same_tensor(ref)), None)
            if value is None:
                value = self._value(index, ref, same if ref.storage in mutated else None)
                known.append((value, ref))
                if ref.storage not in inner:
                    # A view of something from outside: its owner must have it to send it.
                    _merge(reads, self._touched(self.tags.get(ref.storage, {}), index))
                fresh.setdefault(ref.storage, {})[value] = None
            leaves.append(("value", value))
        writes = []
        for i, ref in enumerate(arguments):
            if ref is not None and ref.storage in mutated:
                value = next((v for v, r in known if r.same_tensor(ref)), None)
                if value is None:
                    value = self._value(index, ref, i)
                    known.append((value, ref))
                    fresh.setdefault(ref.storage, {})[value] = None
                writes.append(value)
        for storage, tags in fresh.items():
            # Where only a part of a tensor was changed, the rest is still what it was.
            if storage in inner and all(self.values[v].argument is None or self.values[v].ref.whole for v in tags):
                self.tags[storage] = tags
            else:
                # What is written into must have arrived before.
                old = self.tags.get(storage, {})
                self.tags[storage] = {**(self._touched(old, index) if storage in inner else old), **tags}
        return tuple(leaves), tuple(dict.fromkeys(writes))

    def _value(self, unit, ref, argument):
        self.values.append(Value(unit, ref, argument))
        return len(self.values) - 1


def _merge(into, tags):
    """Union of tags, in place; the earliest touch wins."""
    for tag, touch in tags.items():
        into[tag] = touch if tag not in into else min(into[tag], touch)


def _values_only(tags):
    return {tag: touch for tag, touch in tags.items() if tag >= 0}


def build_graph(recording, nodes):
    """Who reads whom when `nodes` (of `call_tree`) are the units. Returns `Graph`."""
    return _Walk(recording, nodes).run()


def named_nodes(recording, names):
    """The call-tree nodes of modules given by name. Returns (nodes, names that were never called)."""
    wanted = set(names)
    found = _outermost(recording, lambda node: node.name in wanted)
    return [node for node in found if node.runs], sorted(wanted - {node.name for node in found})


def keyed_nodes(recording, keys):
    """The call-tree nodes with these (name, call), in execution order."""
    return [node for node in _outermost(recording, lambda node: node.key in keys) if node.runs]


def _outermost(recording, wanted):
    found = []

    def visit(node):
        if wanted(node):
            found.append(node)
        else:
            for child in node.children:
                visit(child)

    for child in call_tree(recording).children:
        visit(child)
    return found
