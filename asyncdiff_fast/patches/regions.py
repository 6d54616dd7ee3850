"""The region of a denoiser of tokens in which alone a patch works; before it and behind it every patch has it all.

A denoiser may count on its picture's size where it makes tokens of it and pixels of them: a fixed table of positions,
only square pictures, numbers of rows that it knows from the beginning. Its blocks take any tokens. So its forward runs
on the whole picture up to its first block, whose inputs are cut to a patch's tokens; behind its last block, or behind
its last layer of tokens, the patches' results are put together, and the rest runs on the whole again.
"""

import functools
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Leaf:
    """One tensor among the inputs or results of a module."""

    shape: tuple[int, ...]
    floating: bool
    # Made of the picture; of the prompt, but not of the picture.
    picture: bool
    text: bool

    def dims(self, starts, size):
        """The dimensions along sequences that have the picture's tokens: one, but of masks of queries and keys two.

        Args:
            starts: {length of a sequence: place of the picture's first token in it}.
            size: the picture's tokens.
        """
        found = [d for d, n in enumerate(self.shape) if n in starts]
        last = len(self.shape) - 1
        if last not in (0, 3) and self.floating:
            # Features, but masks end with keys.
            found = [d for d in found if d != last]
        # As many tokens of text as of the picture are text.
        if not found or (self.text and self.shape[found[0]] == size):
            return ()
        return tuple(found) if found[-2:] == [last - 1, last] else (found[0],)


@dataclass
class OuterCall:
    """A call of a module from the forward itself: its tensors, and what lies in it, by numbers that count up.

    `given`, `made`: `Leaf` of each leaf of its arguments and of its result, None for what is no tensor. `met`,
    `attentions`, `calls`: where it begins and ends among the watched functions, attentions and calls of modules.
    """

    key: tuple
    given: tuple
    met: tuple
    attentions: tuple
    calls: tuple
    made: tuple = ()

    def sizes(self):
        """Sizes of the dimensions, but features, of what it is given that is made of the picture."""
        return {n for x in self.given if x is not None and x.picture for n in x.shape[:-1]}


class OuterCalls(list):
    """Those of one forward, as a `Recorder` sees them; `text`: `Followed` of the prompt."""

    def __init__(self, recorder, text):
        super().__init__()
        self._recorder, self._text, self._calls = recorder, text, 0

    def enter(self, key, tree):
        """A module is called, with these arguments."""
        if len(self._recorder.stack) == 2:
            now = self._now()
            self.append(OuterCall(key, self._leaves(tree), *((n, n) for n in now)))
        self._calls += 1

    def leave(self, tree):
        """The module that was called last and has not ended has made this."""
        if len(self._recorder.stack) == 2:
            call, now = self[-1], self._now()
            call.made = self._leaves(tree)
            call.met, call.attentions, call.calls = (
                (began, n) for (began, _), n in zip((call.met, call.attentions, call.calls), now, strict=True)
            )

    def attending(self, number):
        """The call in which an attention lies, by its number; None: the forward itself calls it."""
        return next((call for call in self if call.attentions[0] <= number < call.attentions[1]), None)

    def _now(self):
        return len(self._recorder.met), self._recorder.attentions, self._calls

    def _leaves(self, tree):
        return tuple(
            Leaf(tuple(x.shape), x.is_floating_point() or x.is_complex(), *self._made_of(x))
            if isinstance(x, torch.Tensor)
            else None
            for x in tree_flatten(tree)[0]
        )

    def _made_of(self, x):
        picture = x in self._recorder.picture
        return picture, not picture and x in self._text


@dataclass(frozen=True)
class Region:
    """The calls of modules from the forward itself from `begin` to `end`, each (name, number of its call).

    `given`: {call: (shape, dimensions of tokens) of each leaf of its arguments, None where nothing is cut}. `made`:
    shapes of the leaves of the last's result on the whole picture, None for what is no tensor. `met`, `calls`: as in
    `OuterCall`, of all of it.
    """

    begin: tuple
    end: tuple
    given: dict = field(repr=False)
    made: tuple = field(repr=False)
    met: tuple = field(repr=False)
    calls: tuple = field(repr=False)

    @property
    def modules(self):
        """Names of the modules whose calls must be seen."""
        return {name for name, _ in self.given}

    def __str__(self):
        return f"tokens from {self.begin[0]} on, put together behind {self.end[0]}"

    def cut(self, key, cutter, args, kwargs, known):
        """(args, kwargs) of a module call for a patch, and [(tensor, what it was cut to)].

        Args:
            known: {id: such a pair} of this call of the denoiser, to which new ones are added.
        """
        leaves, spec = tree_flatten((args, kwargs))
        for i, how in enumerate(self.given[key]):
            # What blocks hand to each other is a patch's already.
            if how is None or tuple(leaves[i].shape) != how[0]:
                continue
            x = leaves[i]
            if id(x) not in known:
                known[id(x)] = x, functools.reduce(cutter.take, how[1], x)
            leaves[i] = known[id(x)][1]
        return tree_unflatten(leaves, spec)

    def whole_like(self, result):
        """The last module's result on the whole picture, without its values, of that on a patch; and such pairs."""
        leaves, spec = tree_flatten(result)
        pairs = []
        for i, shape in enumerate(self.made):
            if shape is not None and tuple(leaves[i].shape) != shape:
                pairs.append((leaves[i], leaves[i].new_zeros(shape)))
                leaves[i] = pairs[-1][1]
        return tree_unflatten(leaves, spec), pairs

    def joints(self, cutter, result):
        """The dimension of tokens in each tensor of the last module's result on a patch, None where it has none.

        Raises: ValueError if tokens are in several, or are not the picture's.
        """
        found = []
        for shape, x in zip(self.made, tree_flatten(result)[0], strict=True):
            if shape is not None:
                dims = [d for d, (m, n) in enumerate(zip(shape, x.shape, strict=False)) if m != n]
                if len(dims) > 1 or len(shape) != x.dim() or any(shape[d] not in cutter.starts for d in dims):
                    raise ValueError(f"{self.end[0]} gives {list(shape)}, of a patch {list(x.shape)}")
                found.append((shape, dims[0] if dims else None))
        return found

    @staticmethod
    def apart(cutter, joints, result):
        """[tokens (…, frames, rows, to a row, …) between those before and after them] of each tensor of a result."""
        found, grid = [], cutter.grid
        tensors = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        for (shape, dim), x in zip(joints, tensors, strict=True):
            if dim is None:
                found.append((x,))
                continue
            start, others = cutter.starts[shape[dim]], shape[dim] - grid.size
            before, picture, after = x.split((start, x.shape[dim] - others, others - start), dim)
            found.append((before, picture.unflatten(dim, (grid.outer, -1, grid.inner)), after))
        return found

    @staticmethod
    def together(joints, parts, result):
        """A result as it was before `apart`, of such `parts`."""
        leaves, spec = tree_flatten(result)
        numbers = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        for i, (_, dim), found in zip(numbers, joints, parts, strict=True):
            if dim is None:
                leaves[i] = found[0]
            else:
                before, picture, after = found
                leaves[i] = torch.cat((before, picture.flatten(dim, dim + 2), after), dim)
        return tree_unflatten(leaves, spec)


def find(recorder):
    """The regions, likely ones first, of a forward on the whole picture; none where its tokens are not known."""
    order = recorder.tokens
    if order is None:
        return []

    def how(leaf):
        dims = () if leaf is None else leaf.dims(order.starts, order.size)
        return (leaf.shape, dims) if dims else None

    def has_tokens(leaves):
        return any(x is not None and x.picture and how(x) is not None for x in leaves)

    calls = recorder.outer
    block = calls.attending(order.first)
    if block is None or not has_tokens(block.given):
        return []
    first = calls.index(block)
    ends = [i for i in range(first, len(calls)) if has_tokens(calls[i].made)]
    attending = [i for i in ends if calls[i].attentions[0] < calls[i].attentions[1]]
    found = []
    for last in dict.fromkeys(ends[-1:] + attending[-1:]):
        begin, end, inside = calls[first], calls[last], calls[first : last + 1]
        found.append(
            Region(
                begin.key,
                end.key,
                {c.key: tuple(map(how, c.given)) for c in inside},
                tuple(None if x is None else x.shape for x in end.made),
                (begin.met[0], end.met[1]),
                (begin.calls[0], end.calls[1]),
            )
        )
    return found
