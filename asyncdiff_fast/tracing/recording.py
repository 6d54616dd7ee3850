"""What one forward did, as plain numbers: module calls, tensor operations, costs.

A recording is a flat list of events in execution order. Tensors appear only as the number of the storage they live in,
so everything that is derived from a recording (units, who reads whom, stages) is pure and needs no device.
"""

from dataclasses import dataclass, field

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
    """A module call begins. `leaves` are the flattened arguments, None where a leaf is no tensor."""

    name: str
    call: int
    leaves: tuple[TensorRef | None, ...]
    opaque: bool


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
            node = Node(event.name, event.call, i, eligible=not event.opaque)
            stack[-1].children.append(node)
            stack.append(node)
        elif isinstance(event, Exit):
            node = stack.pop()
            node.stop = i
            node.eligible &= not event.opaque and any(leaf is not None for leaf in event.leaves)
        else:
            stack[-1].own_flops += event.flops
            for node in stack:
                node.flops += event.flops
                node.nbytes += event.nbytes
                node.runs = True
    return root
