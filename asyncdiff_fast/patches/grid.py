"""The tokens of a picture in one dimension, and the convolution that makes them."""

from dataclasses import dataclass

from . import layout, site_rows
from .sites import CONV


@dataclass(frozen=True)
class Grid:
    """Tokens of a picture (or clip) in one dimension: `outer` times the rows of a resolution, `inner` to a row."""

    rows: layout.Rows
    outer: int
    inner: int

    @property
    def size(self):
        """Tokens in all."""
        return self.outer * self.rows.size * self.inner

    def take(self, x, dim, patch):
        """A patch's tokens of dimension `dim`."""
        dim %= x.dim()
        start, stop = self.rows.held[patch]
        parts = x.unflatten(dim, (self.outer, self.rows.size, self.inner)).narrow(dim + 1, start, stop - start)
        return parts.flatten(dim, dim + 2)


def tiling(recorder):
    """The first convolution if its kernel is its stride, so that it makes tokens of the latent; else None."""
    first = next(iter(site_rows.resamplings(recorder)), None)
    if first is None or first.kind != CONV:
        return None
    kernel, stride, *_ = first.options[len(first.shape) - 4]
    return first if kernel == stride else None


def tiled(recorder, levels):
    """The grid of tokens that this convolution makes; None without one."""
    first = tiling(recorder)
    if first is None or first.result[-2] not in levels:
        return None
    return Grid(levels[first.result[-2]], first.result[2] if len(first.result) == 5 else 1, first.result[-1])
