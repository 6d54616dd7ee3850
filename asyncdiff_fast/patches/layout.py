"""Which rows of the picture each patch holds, at every resolution of the denoiser, and which it must be sent. Pure.

A patch is neighbouring rows of the latent (of tokens, where the latent is a sequence). At coarser resolutions it holds
the rows that these touch. Where patches do not begin at a multiple of the coarsest row, two of them hold one coarse
row; the first owns it.
"""

from dataclasses import dataclass
from itertools import pairwise

# A patch may exceed the ideal share by this much before patches are cut finer than the coarsest row.
UNEVEN = 1.1


@dataclass(frozen=True)
class Rows:
    """One resolution: `size` rows, of which patch i holds `held[i]`, a half-open range."""

    size: int
    held: tuple[tuple[int, int], ...]

    @property
    def owned(self):
        """What each patch holds first: these ranges cover every row once."""
        ends = [0, *(stop for _, stop in self.held)]
        return tuple((max(start, end), stop) for (start, stop), end in zip(self.held, ends, strict=False))

    @property
    def aligned(self):
        """True if no row is held twice."""
        return self.owned == self.held

    def coarser(self, size, factor):
        """The resolution of `size` rows, each of which stands for `factor` of these."""
        return Rows(size, tuple((start // factor, min(-(-stop // factor), size)) for start, stop in self.held))

    def finer(self, size, factor):
        """The resolution of `size` rows, `factor` for each of these."""
        return Rows(size, tuple((min(start * factor, size), min(stop * factor, size)) for start, stop in self.owned))


def split(size, num_patches, factor=1, aligned=False):
    """Patches of `size` rows, as even as whole coarsest rows allow, or finer where that is too uneven.

    Args:
        factor: rows of the latent in one row of the coarsest resolution.
        aligned: begin every patch at a coarsest row.
    Returns: `Rows`.
    Raises: ValueError if there are fewer rows than patches.
    """
    candidates = []
    for align in range(factor, 0, -1):
        units = -(-size // align)
        if factor % align or units < num_patches or (aligned and align < factor):
            continue
        cuts = [min(align * (units * i // num_patches), size) for i in range(num_patches)] + [size]
        rows = Rows(size, tuple(pairwise(cuts)))
        largest = max(stop - start for start, stop in rows.held)
        if largest * num_patches <= UNEVEN * size:
            return rows
        candidates.append((largest, len(candidates), rows))
    if not candidates:
        unit = factor if aligned else 1
        raise ValueError(
            f"num_patches must not exceed the rows of the latent{f' / {unit}' if unit > 1 else ''}: got "
            f"num_patches={num_patches}, {size} rows; use fewer patches or a taller picture"
        )
    return min(candidates)[2]


@dataclass(frozen=True)
class Window:
    """What one patch reads around its rows to make its rows of a convolution's result.

    The input is `zeros[0]` rows of zeros, rows `needs` of the whole, and `zeros[1]` rows of zeros.
    """

    needs: tuple[int, int]
    zeros: tuple[int, int]


def window(before, after, patch, kernel, stride, padding, dilation):
    """`Window` of one patch for a convolution from rows `before` to rows `after`."""
    start, stop = after.held[patch]
    first, last = start * stride - padding, (stop - 1) * stride - padding + dilation * (kernel - 1) + 1
    return Window((max(first, 0), min(last, before.size)), (max(-first, 0), max(last - before.size, 0)))


@dataclass(frozen=True)
class Message:
    """Rows `start` to `stop` of the whole, from the patch that owns them to one that reads them."""

    source: int
    target: int
    start: int
    stop: int


def halos(rows, windows):
    """Messages that bring every patch the rows of its window that it does not hold."""
    found = []
    for target, need in enumerate(windows):
        held = rows.held[target]
        for missing in ((need.needs[0], min(held[0], need.needs[1])), (max(held[1], need.needs[0]), need.needs[1])):
            for source, owned in enumerate(rows.owned):
                start, stop = max(missing[0], owned[0]), min(missing[1], owned[1])
                if start < stop and source != target:
                    found.append(Message(source, target, start, stop))
    return tuple(found)


@dataclass(frozen=True)
class Tokens:
    """A sequence with `inner` tokens for each row of a resolution, and `extra` others (the text of a joint attention).

    Every patch has all of the others. The rows of a clip lie frame by frame: `outer` is the number of its frames.
    `before`: how many of the others come before the picture; None: all or none, as a call will tell.
    """

    rows: Rows
    inner: int
    extra: int = 0
    outer: int = 1
    before: int | None = None

    def count(self, patch):
        """Tokens of the picture that a patch owns."""
        start, stop = self.rows.owned[patch]
        return (stop - start) * self.inner

    def own(self, patch):
        """Where those begin and end among the tokens of the picture that the patch holds."""
        # Rows are held twice in pictures only, whose tokens lie row by row.
        skipped = (self.rows.owned[patch][0] - self.rows.held[patch][0]) * self.inner
        return skipped, skipped + self.count(patch)

    def places(self, patch):
        """Places of the tokens that a patch holds among the picture's."""
        (start, stop), width = self.rows.held[patch], self.inner // self.outer
        frames = range(0, self.outer * self.rows.size * width, self.rows.size * width)
        return [first + i for first in frames for i in range(start * width, stop * width)]


def tokens_of(rows, length, lengths):
    """(tokens to a row, other tokens) of a sequence of `length`, of which the patches have `lengths`.

    Every patch has all of the other tokens. Raises: ValueError if no whole numbers fit.
    """
    patches, held = len(lengths), [stop - start for start, stop in rows.held]
    over = sum(held) - patches * rows.size
    per_row = (sum(lengths) - patches * length) // over if over else 0
    extra = length - per_row * rows.size
    if extra < 0 or any(n != extra + per_row * h for n, h in zip(lengths, held, strict=True)):
        raise ValueError(f"a sequence of {length} is {list(lengths)} on patches of {held} of {rows.size} rows")
    return per_row, extra
