"""The denoiser's result on one patch: patches send each other their rows of it, and all have the whole."""

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..exchange.slots import Recv, Send


class PatchResult:
    """The tensors of a denoiser's result, in buffers of every patch's part.

    Args:
        rows: `Rows` of the latent.
        patch: this one.
        whole, mine: the result on the whole picture and on this patch; the dimension in which they differ has the rows.
            A tensor without rows, as of the sound beside a clip, is the first patch's on all of them.
        reports: whether each patch sends one number more, in `reports` (patches, 1) fp32.
    Raises: ValueError if a tensor has more than one dimension of rows, or none has any.
    """

    def __init__(self, rows, patch, whole, mine, reports):
        self._rows, self._patch, self._parts, self._exchange = rows, patch, [], None
        for a, b in zip(_tensors(whole), _tensors(mine), strict=True):
            dims = [d for d in range(a.dim()) if a.shape[d : d + 1] != b.shape[d : d + 1]]
            if len(dims) > 1 or a.dim() != b.dim():
                _refuse(a, b)
            self._parts.append((dims[0], self._buffers(a, dims[0])) if dims else (None, self._alone(a)))
        if all(dim is None for dim, _ in self._parts):
            _refuse(whole, mine)
        with torch.inference_mode(False):
            device = self._parts[0][1][0].device
            self.reports = torch.zeros(len(rows.held), 1, device=device) if reports else None

    def move(self, device):
        """Put the buffers on a device, before `bind`."""
        with torch.inference_mode(False):
            self._parts = [(dim, [torch.zeros_like(x, device=device) for x in parts]) for dim, parts in self._parts]

    def bind(self, exchange, phase):
        """Register the slot for the parts. Collective."""
        self._exchange, self._phase = exchange, f"{phase} result"
        sends, recvs = [], []
        reports = [] if self.reports is None else [self.reports]
        for parts in (*(parts for _, parts in self._parts), *reports):
            for patch, part in enumerate(parts):
                if patch == self._patch:
                    sends += [Send(t, (part,)) for t in range(len(self._rows.held)) if t != patch]
                else:
                    recvs.append(Recv(patch, (part,)))
        self._slot = exchange.slot("result", sends, recvs, depth=1)
        exchange.freeze(self._phase)

    def share(self, result, check):
        """The result for the whole picture, in new tensors, of this patch's result and the others'. Collective.

        `check`: the `CallCheck` whose worst error travels with it, if patches report that.
        """
        if self.reports is not None:
            self.reports[self._patch].copy_(check.errors.worst)
        leaves, spec = tree_flatten(result)
        mine = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        for i, (_, parts) in zip(mine, self._parts, strict=True):
            if self._patch < len(parts):
                parts[self._patch].copy_(leaves[i])
        self._exchange.post(self._slot)
        self._exchange.wait(self._slot)
        for i, (dim, parts) in zip(mine, self._parts, strict=True):
            leaves[i] = parts[0].clone() if dim is None else torch.cat(parts, dim)
        if self.reports is not None:
            check.report.give(self.reports.amax(0))
        return tree_unflatten(leaves, spec)

    def release(self):
        """Forget the slot."""
        if self._exchange is not None:
            self._exchange.release(self._phase)

    @staticmethod
    def _alone(whole):
        """The buffer of the first patch, of a tensor without rows."""
        with torch.inference_mode(False):
            return [torch.zeros(whole.shape, dtype=whole.dtype, device=whole.device)]

    def _buffers(self, whole, dim):
        """Buffers for every patch's part of a tensor."""
        shape = list(whole.shape)
        per_row, rest = divmod(shape[dim], self._rows.size)
        if rest:
            size = self._rows.size
            raise ValueError(f"the denoiser returns {shape[dim]} rows for {size}: not a whole number for each")
        parts = []
        with torch.inference_mode(False):
            for start, stop in self._rows.held:
                shape[dim] = per_row * (stop - start)
                parts.append(torch.zeros(shape, dtype=whole.dtype, device=whole.device))
        return parts


def _refuse(whole, mine):
    shapes = [[tuple(x.shape) for x in _tensors(result)] for result in (whole, mine)]
    raise ValueError(
        f"the denoiser returns {shapes[0]} for the whole picture and {shapes[1]} for a patch: patches need one "
        "dimension of rows in it"
    )


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
