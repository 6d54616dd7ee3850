"""Records what one rank does with its slots, and every operation of torch that touches their memory.

The record is a list of plain tuples, so `replay.py` can carry it out elsewhere:

    ("slot", number, name, sends, recvs, depth)     sends, recvs: (peer, places); a place is (memory, begin, bytes)
    ("freeze", phase, numbers), ("release", phase), ("drain", phases or None)
    ("acquire", number), ("post", number), ("wait", number, lag)
    ("kernel", name, places read, places written)
"""

import functools
import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Past so many pieces a strided tensor counts as everything between its ends.
_MOST_PIECES = 1024


def _pieces(tensor):
    """[(begin, bytes)] of a tensor in its storage, in bytes."""
    item = tensor.element_size()
    dims = sorted((stride, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and stride)
    block = 1
    while dims and dims[0][0] == block:
        block *= dims.pop(0)[1]
    outer = [range(0, stride * n, stride) for stride, n in dims]
    count = 1
    for steps in outer:
        count *= len(steps)
    first = tensor.storage_offset()
    if count > _MOST_PIECES:
        return [(first * item, (sum(steps[-1] for steps in outer) + block) * item)]
    return [((first + sum(at)) * item, block * item) for at in itertools.product(*outer)]


class Recorder(TorchDispatchMode):
    """A mode around the calls of a patched model; `attach` it to the model's exchange first."""

    def __init__(self):
        super().__init__()
        self.events, self.memories = [], {}
        self._kept, self._numbers, self._inside = [], {}, False

    def attach(self, exchange):
        """Record the calls of an exchange, whatever carries it out."""
        for name in ("slot", "freeze", "acquire", "post", "wait", "drain", "release"):
            setattr(exchange, name, self._noted(name, getattr(exchange, name)))

    def _noted(self, name, original):
        @functools.wraps(original)
        def call(*args, **kwargs):
            # One public call may be made of others.
            outermost, self._inside = not self._inside, True
            try:
                result = original(*args, **kwargs)
            finally:
                self._inside = self._inside and not outermost
            if outermost:
                getattr(self, f"_note_{name}")(result, *args, **kwargs)
            return result

        return call

    def _note_slot(self, slot, name, sends=(), recvs=(), depth=2):
        self._numbers[id(slot)] = number = len(self._kept)
        self._kept.append(slot)
        listed = [[(x.peer, [self._place(b) for b in x.buffers]) for x in side] for side in (sends, recvs)]
        self.events.append(("slot", number, name, *listed, depth))
        self._unfrozen = [*getattr(self, "_unfrozen", []), number]

    def _note_freeze(self, _, phase, order=None):
        self.events.append(("freeze", phase, self._unfrozen))
        self._unfrozen = []

    def _note_acquire(self, _, slot):
        self.events.append(("acquire", self._numbers[id(slot)]))

    def _note_post(self, _, slot):
        self.events.append(("post", self._numbers[id(slot)]))

    def _note_wait(self, _, slot, lag=0):
        self.events.append(("wait", self._numbers[id(slot)], lag))

    def _note_drain(self, _, phases=None):
        self.events.append(("drain", None if phases is None else sorted(phases)))

    def _note_release(self, _, phase):
        self.events.append(("release", phase))

    def _place(self, buffer):
        storage = buffer.untyped_storage()
        memory, _ = self.memories.setdefault(storage.data_ptr(), (len(self.memories), storage.nbytes()))
        ((begin, nbytes),) = _pieces(buffer)
        return memory, begin, nbytes

    def _places(self, values):
        """Pieces of slots' memory among the tensors of some values."""
        found = set()
        for x in tree_leaves(values):
            if isinstance(x, torch.Tensor) and x.layout is torch.strided and x.numel():
                memory = self.memories.get(x.untyped_storage().data_ptr())
                if memory is not None:
                    found.update((memory[0], *piece) for piece in _pieces(x))
        return sorted(found)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = function._schema
        # What only makes another view of its argument touches nothing.
        view = any(x.alias_info is not None and not x.alias_info.is_write for x in schema.returns)
        if self.memories and not view and function.namespace != "c10d":
            given = dict(zip((x.name for x in schema.arguments), args, strict=False)) | kwargs
            writes = {x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write}
            read = self._places([value for name, value in given.items() if name not in writes])
            written = self._places([value for name, value in given.items() if name in writes])
            if read or written:
                self.events.append(("kernel", str(function), read, written))
        return function(*args, **kwargs)

    def record(self):
        """(sizes of the memories in bytes, events)."""
        return [nbytes for _, nbytes in sorted(self.memories.values())], self.events
