"""Cuts a call's inputs to one patch's rows, and tensors of positions with them."""

import functools
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import tree_map_only, tree_unflatten

from ..calls.containers import flattened
from . import layout, site_rows
from .grid import Grid, tiled, tiling
from .sites import PROMPT

# These may have a value for each token.
_BY_TOKEN = ("timestep", "guidance", "mask")


@dataclass(frozen=True)
class Cutter:
    """Which dimension of which input holds rows of the picture.

    `dim`: of the latent. `sizes`: {(rows, width): Rows} of pictures at every resolution. `grid`: of tokens, or None.
    `starts`: {length of a sequence: place of the grid's first token in it}. `other`: names of inputs that are cut where
    they seem not to be, or the other way round. `given`: {name: dimensions}, as the caller says.
    """

    latent_name: str
    dim: int
    axis: int
    rows: layout.Rows
    levels: dict
    sizes: dict
    grid: Grid | None
    patch: int
    starts: dict
    other: tuple
    given: dict

    @classmethod
    def of(cls, recorder, latent, latent_name, config, axis, split=None):
        """The first patch's cutter for one forward on the whole picture; `axis` is -2 for rows, -1 for columns.

        `split(rows of the latent, of them in one of the coarsest resolution)`: the patches' `Rows`; default: even ones.
        """
        sequence = latent.dim() == 3
        dim = 1 if sequence else latent.dim() + axis
        size = latent.shape[dim]
        factor, order = site_rows.factor_of(recorder, size, axis), recorder.tokens
        if order is not None:
            factor = max(factor, size // order.rows)
        aligned = config.naive or order is not None or tiling(recorder) is not None
        rows = split(size, factor) if split else layout.split(size, config.num_patches, factor, aligned)
        levels = site_rows.levels_of(recorder, rows, axis)
        pictures = {tuple(latent.shape[-2:])} | {s.result[-2:] for s in site_rows.resamplings(recorder)}
        sizes = {} if sequence else {hw: levels[hw[axis]] for hw in pictures if hw[axis] in levels}
        if order is not None:
            grid = Grid(rows.coarser(order.rows, size // order.rows), order.outer, order.inner)
        else:
            grid = Grid(rows, 1, 1) if sequence else tiled(recorder, levels)
        starts = {} if grid is None else {grid.size: 0} if order is None else order.starts
        if axis == -1 and grid is not None:
            raise ValueError("patch_axis must be rows where the denoiser works on tokens: pass patch_axis='rows'")
        return cls(latent_name, dim, axis, rows, levels, sizes, grid, 0, starts, (), dict(config.cut))

    def of_patch(self, patch):
        """The same of another patch."""
        return replace(self, patch=patch)

    def other_than(self, name):
        """The same but for one input, which is cut other than it seems to be."""
        return replace(self, other=(name,))

    def lies_in(self, x, latent):
        """True if a tensor is a view of the whole latent, rows for rows."""
        same = x.untyped_storage()._cdata == latent.untyped_storage()._cdata
        return same and x.dim() >= 4 and (x.stride(-2), x.stride(-1)) == (latent.stride(self.dim), latent.stride(-1))

    def rows_beside(self, x, latent, above, count):
        """`count` rows of the latent seen as its view `x` sees its own, from `above` rows relative to its first.

        Returns: None if `x` can be no such view.
        """
        stride = x.stride(-2)
        if stride != latent.stride(self.dim) or x.untyped_storage().nbytes() != latent.untyped_storage().nbytes():
            return None
        shape = (*x.shape[:-2], count, x.shape[-1])
        return torch.as_strided(x, shape, x.stride(), x.storage_offset() + above * stride)

    def describe(self, patch):
        """A patch in words."""
        start, stop = self.rows.held[patch]
        return f"{'rows' if self.axis == -2 else 'columns'} {start} to {stop} of {self.rows.size}"

    def cut(self, signature, args, kwargs):
        """(args, kwargs) of this patch."""
        named = signature.named(args, kwargs)
        leaves, spec = flattened(named)
        cut = tree_unflatten([self.cut_input(path[0].key, x) for path, x in leaves], spec)
        return signature.as_call(cut, args, kwargs)

    def cut_input(self, name, x):
        """What this patch gets of one input, or of a part of it."""
        if not isinstance(x, torch.Tensor):
            return x
        if name == self.latent_name:
            return self._narrow(x, self.dim, self.rows)
        if name in self.given:
            return self._cut_as_given(name, x)
        if x.dim() >= 4 and tuple(x.shape[-2:]) in self.sizes and name not in self.other:
            return self._narrow(x, self.axis, self.sizes[tuple(x.shape[-2:])])
        for dim in self.token_dims(name, x):
            x = self.take(x, dim)
        return x

    def _cut_as_given(self, name, x):
        for dim in self.given[name]:
            size = x.shape[dim] if -x.dim() <= dim < x.dim() else None
            if size in self.starts:
                x = self.take(x, dim)
            elif size in self.levels:
                x = self._narrow(x, dim, self.levels[size])
            else:
                known = sorted({*self.starts, *self.levels})
                raise ValueError(
                    f"cut={{{name!r}: {self.given[name]}}}: dimension {dim} of {list(x.shape)} must have as many "
                    f"elements as the picture has rows or tokens: {', '.join(map(str, known))}"
                )
        return x

    def candidates(self, x):
        """The dimension along which an input may run with tokens: the batch is none, nor are features."""
        dims = (0, 1) if x.dim() == 2 else range(1, x.dim() - 1)
        return [d for d in dims if x.shape[d] in self.starts][:1]

    def token_dims(self, name, x):
        """Dimensions of an input that run along sequences with the picture's tokens."""
        usual = self.usual_dims(name, x)
        if name not in self.other:
            return usual
        return [] if usual else self.candidates(x)

    def usual_dims(self, name, x):
        """Those by its name and sizes."""
        by_token = any(word in name for word in _BY_TOKEN) and x.dim() > 1
        if by_token and not any(word in name for word in PROMPT):
            return [d for d in range(1, x.dim()) if x.shape[d] in self.starts]
        if any(word in name for word in (*PROMPT, *_BY_TOKEN)) or x.dim() not in (2, 3):
            return []
        dim = x.dim() - 2
        known = self.starts if x.dim() == 3 else () if self.grid is None else (self.grid.size,)
        return [dim] if x.shape[dim] in known else []

    def take(self, x, dim):
        """A patch's tokens of dimension `dim`, and all others in it."""
        start, size = self.starts[x.shape[dim]], self.grid.size
        picture = self.grid.take(x.narrow(dim, start, size), dim, self.patch)
        stop = start + size
        if x.shape[dim] == size:
            return picture
        return torch.cat((x.narrow(dim, 0, start), picture, x.narrow(dim, stop, x.shape[dim] - stop)), dim)

    def _narrow(self, x, dim, rows):
        start, stop = rows.held[self.patch]
        return x.narrow(dim, start, stop - start)

    def positions(self, tree, beside=()):
        """A module's result that follows from positions alone, for this patch; None if it has no rows in it.

        Args:
            beside: numbers of those of its tensors whose rows are not the picture's.
        """
        found = []

        def cut(x):
            dim = None if len(found) in beside else self.position_dim(x, x.shape)
            found.append(dim)
            return x if dim is None else self._position(x, dim)

        result = tree_map_only(torch.Tensor, cut, tree)
        return result if any(dim is not None for dim in found) else None

    def position_dim(self, x, result):
        """The dimension of `x`, counted from the end, that runs with the rows (tokens) of `result`; None without."""
        for dim in range(-x.dim(), -1):
            whole = -dim <= len(result) and x.shape[dim] == result[dim] > 1
            if whole and x.shape[dim] in self.starts:
                return dim
            if whole and dim == -2 and x.dim() >= 3 and tuple(x.shape[-2:]) in self.sizes:
                return dim
        return None

    def _position(self, x, dim):
        if x.shape[dim] in self.starts:
            return self.take(x, dim)
        return self._narrow(x, dim, self.sizes[tuple(x.shape[-2:])])

    def joined(self, join):
        """The value of a `Join` cut as its result is; None if it has no rows in it."""
        x = join.value
        dim = self.position_dim(x, join.shape)
        if dim is not None:
            return self._position(x, dim)
        dims = [d for d in join.along if x.shape[d] in self._flat]
        return self._flat_rows(x, dims[0] % x.dim()) if dims else None

    @functools.cached_property
    def _flat(self):
        """{pixels of a picture: its (rows, width)}, of those sizes that no other has."""
        counts = Counter(h * w for h, w in self.sizes)
        return {h * w: (h, w) for h, w in self.sizes if counts[h * w] == 1}

    def _flat_rows(self, x, dim):
        """A patch's pixels, which lie in dimension `dim` row by row."""
        size = self._flat[x.shape[dim]]
        start, stop = self.sizes[size].held[self.patch]
        picture = x.unflatten(dim, size)
        return picture.narrow(dim + 2 + self.axis, start, stop - start).flatten(dim, dim + 1)
