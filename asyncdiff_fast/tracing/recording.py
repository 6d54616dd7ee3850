"""What one forward did, as plain numbers: module calls, tensor operations, costs.

A recording is a flat list of events in execution order. Tensors appear only as the number of the storage they live in,
so everything that is derived from a recording (units, who reads whom, stages) is pure and needs no device.
"""

from dataclasses import dataclass, field, replace

# Tags of the denoiser's own inputs. Values made by units have tags >= 0.
LATENT, TIMESTEP = -1, -2


@dataclass(frozen=True)
class TensorRef:
    """One tensor: storage number, layout within it, what is needed to allocate a copy, and if it fills the storage."""

    storage: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    layout: tuple = ()
    whole: bool = True

    def same_tensor(self, other):
        """True if both name the same elements of the same storage."""
        return (self.storage, self.shape, self.layout) == (other.storage, other.shape, other.layout)


@dataclass(frozen=True)
class Enter:
    """A module call begins. `leaves` are the flattened arguments, None where a leaf is no tensor.

    `varies`: its sizes, or those of a call beside it, change with the values of the latent.
    """

    name: str
    call: int
    leaves: tuple[TensorRef | None, ...]
    opaque: bool
    varies: bool = False


@dataclass(frozen=True)
class Exit:
    """The module call that was entered last ends. `leaves` are its flattened results."""

    leaves: tuple[TensorRef | None, ...]
    opaque: bool


@dataclass(frozen=True)
class Op:
    """One tensor operation that reads or writes data. `branches`: its result steers Python (`.item()`).

    `nbytes`: of the activations that it reads and writes; weights are not counted.
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    flops: int = 0
    branches: bool = False
    nbytes: int = 0


@dataclass
class Recording:
    """Events of one forward, with the storages of the latent and of the timestep, and the final result."""

    events: list = field(default_factory=list)
    latent: frozenset[int] = frozenset()
    timestep: frozenset[int] = frozenset()
    output: tuple[TensorRef | None, ...] = ()
    # (module, storages) of what modules keep for their next call.
    state: tuple[tuple[str, tuple[int, ...]], ...] = ()
    # True if Python compared a timestep that is a plain number.
    steered: bool = False

    def keep_together(self, other, kinds):
        """Mark calls whose sizes are others in another forward, and all that their callers call.

        Args:
            other: [(name, shapes of its tensor arguments)] of that forward's calls, in order.
            kinds: {name of a module: its class}.
        """
        counts, theirs, varying = {}, {}, set()
        for name, shapes in other:
            call = counts[name] = counts.get(name, -1) + 1
            theirs[name, call] = shapes
        enters = {(e.name, e.call): e for e in self.events if isinstance(e, Enter)}
        for key in enters.keys() | theirs.keys():
            mine = [leaf.shape for leaf in enters[key].leaves if leaf is not None] if key in enters else None
            if mine != theirs.get(key):
                varying.add(key[0])
        # The module that chooses: the nearest that is called alike in both.
        outer = {name.rsplit(".", 1)[0] if "." in name else "" for name in varying}
        callers = {name for name, _ in enters} - varying
        while outer - callers - {""}:
            outer = {n if n in callers or not n else n.rpartition(".")[0] for n in outer}
        choosing = {kinds[name] for name in outer - {""}}
        inside = tuple(f"{name}." for name in {n for n, kind in kinds.items() if n and kind in choosing} | varying)
        for i, e in enumerate(self.events):
            if isinstance(e, Enter) and (e.name in varying or e.name.startswith(inside)):
                self.events[i] = replace(e, varies=True)


@dataclass
class Node:
    """One module call in the tree of calls; `start` and `stop` are its Enter and Exit events.

    `runs` is False if it does nothing: an idle module, or one that a hook leaves uncalled.
    """

    name: str
    call: int
    start: int
    stop: int = -1
    flops: int = 0
    own_flops: int = 0
    nbytes: int = 0
    eligible: bool = True
    # Whether it cannot be a unit for what it does or returns, and whether for its sizes.
    opaque: bool = False
    varies: bool = False
    runs: bool = False
    children: list = field(default_factory=list)

    @property
    def key(self):
        """(name, call): what a unit is known by."""
        return self.name, self.call


def call_tree(recording):
    """Fold the events into a tree of module calls with inclusive FLOPs and bytes, and own FLOPs. Returns the root."""
    root = Node("", 0, -1, len(recording.events))
    stack = [root]
    for i, event in enumerate(recording.events):
        if isinstance(event, Enter):
            eligible = not event.opaque and not event.varies
            node = Node(event.name, event.call, i, eligible=eligible, opaque=event.opaque, varies=event.varies)
            stack[-1].children.append(node)
            stack.append(node)
        elif isinstance(event, Exit):
            node = stack.pop()
            node.stop = i
            node.opaque |= event.opaque or not any(leaf is not None for leaf in event.leaves)
            node.eligible &= not node.opaque
        else:
            stack[-1].own_flops += event.flops
            for node in stack:
                node.flops += event.flops
                node.nbytes += event.nbytes
                node.runs = True
    return root
