"""What patches exchange at one watched call: rows, messages and bytes of each kind of site. Pure but for dtypes."""

import math
from dataclasses import dataclass

import torch

from .layout import Rows, Tokens


@dataclass(frozen=True)
class Site:
    """One watched call. `shapes`: of its input (of the keys, for attention), for each patch."""

    name: str
    call: int
    # Of the watched functions in the module's call; sums are counted apart, as "sum 0".
    place: int | str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    # Whether patches tell each other anything here.
    exchanges = False

    def sent(self, source):
        """{target: [shape]} of what a patch sends here."""
        return {}

    def sent_bytes(self, source):
        """Bytes that a patch sends here, once."""
        shapes = [shape for found in self.sent(source).values() for shape in found]
        return sum(math.prod(shape) for shape in shapes) * self.item

    @property
    def message_bytes(self):
        """The most bytes that one patch sends another here, once."""
        shapes = [found for source in range(len(self.shapes)) for found in self.sent(source).values()]
        return max((sum(map(math.prod, found)) for found in shapes), default=0) * self.item

    @property
    def messages_of_one(self):
        """The most messages that one patch sends and receives here, once."""
        sent = [{t: len(found) for t, found in self.sent(p).items()} for p in range(len(self.shapes))]
        return max(
            (sum(mine.values()) + sum(theirs.get(p, 0) for theirs in sent) for p, mine in enumerate(sent)), default=0
        )

    @property
    def item(self):
        """Bytes of one number of a message."""
        return self.dtype.itemsize

    @property
    def label(self):
        """The module's name, with the number of its call if it is called more than once."""
        return f"{self.name}#{self.call}" if self.call else self.name


@dataclass(frozen=True)
class Halo(Site):
    """A convolution from rows `before` to rows `after`, `messages` bringing the rows around each patch."""

    before: Rows = None
    after: Rows = None
    windows: tuple = ()
    messages: tuple = ()
    # The rows come from the denoiser's own input, which every rank has.
    from_latent: bool = False

    @property
    def exchanges(self):
        return bool(self.messages) and not self.from_latent

    @property
    def plain(self):
        """True if every patch's convolution is the module's own: nothing to add or leave out."""
        return not self.messages and all(
            w.needs == held and w.zeros == (0, 0) for w, held in zip(self.windows, self.before.held, strict=True)
        )

    def rows_shape(self, patch, count):
        """Shape of `count` rows of a patch's input."""
        shape = self.shapes[patch]
        return (*shape[:-2], count, shape[-1])

    def sent(self, source):
        found = {}
        for m in self.messages if self.exchanges else ():
            if m.source == source:
                found.setdefault(m.target, []).append(self.rows_shape(source, m.stop - m.start))
        return found


@dataclass(frozen=True)
class Pool(Halo):
    """Pooling, as a convolution."""


@dataclass(frozen=True)
class Pad(Halo):
    """Padding of a picture's rows by a call of its own: inside the picture, neighbours' rows take its place.

    `edges`: for each patch, the rows that the padding itself adds above and below it.
    """

    edges: tuple = ()

    plain = False


@dataclass(frozen=True)
class Sum(Site):
    """A sum over rows, or tokens of the picture. Each patch sends its own; `shapes` are those of the result.

    `how`: "sum", "mean", "norm", "max" or "min". `shares`: what each patch's own is multiplied by: 1, or its share of
    the rows where they are averaged.
    """

    how: str = "sum"
    shares: tuple[float, ...] = ()

    exchanges = True

    def message_shape(self):
        """The result's."""
        return self.shapes[0]

    def sent(self, source):
        return {t: [self.message_shape()] for t in range(len(self.shapes)) if t != source}


@dataclass(frozen=True)
class Norm(Site):
    """A GroupNorm over rows. Each patch sends mean and variance of its own, (n, groups, 2) fp32."""

    num_groups: int = 1
    rows: Rows = None

    exchanges = True

    @property
    def item(self):
        return 4

    @property
    def weights(self):
        """Share of the rows that each patch owns."""
        return tuple((stop - start) / self.rows.size for start, stop in self.rows.owned)

    def message_shape(self):
        """(n, groups, 2)"""
        return (self.shapes[0][0], self.num_groups, 2)

    def sent(self, source):
        return {t: [self.message_shape()] for t in range(len(self.shapes)) if t != source}


@dataclass(frozen=True)
class Ring(Site):
    """Self-attention over the tokens of all patches. Each sends its keys and values, (tokens, b, features)."""

    tokens: Tokens = None
    # (b, heads, head size) of keys and of values
    key: tuple = ()
    value: tuple = ()

    exchanges = True

    @property
    def features(self):
        """Numbers of one token's key and value in one sample."""
        return math.prod(self.key[1:]) + math.prod(self.value[1:])

    def part_shape(self, patch):
        """(tokens, b, features) that a patch owns."""
        return (self.tokens.count(patch), self.key[0], self.features)

    def sent(self, source):
        if not self.tokens.count(source):
            return {}
        return {t: [self.part_shape(source)] for t in range(len(self.shapes)) if t != source}


@dataclass(frozen=True)
class Resize(Site):
    """A nearest-neighbour interpolation from rows `before` to rows `after`; `around`: the result's other sizes."""

    before: Rows = None
    after: Rows = None
    around: tuple = ((), ())

    @property
    def plain(self):
        """True if every patch's interpolation is the module's own."""
        ratio, rest = divmod(self.after.size, self.before.size)
        return not rest and all(
            (a[0], a[1]) == (b[0] * ratio, b[1] * ratio) for a, b in zip(self.after.held, self.before.held, strict=True)
        )
