"""Displaced patches, computed in one process the plain way: the truth for ranks that exchange only what is needed.

Every patch runs the whole denoiser on the whole picture. In its run, the input of each convolution, the keys and values
of each self-attention and the statistics of each GroupNorm are its own where they belong to its rows, and elsewhere
those that their owner's run had one step before. No shared rows, no halos, no rings.
"""

import threading

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

SITES = {torch.conv2d, F.group_norm, F.scaled_dot_product_attention}


class Simulation:
    """Replaces a denoiser's forward by the rule of displaced patches; `restart()` begins a new generation.

    Args:
        held: rows of the latent (tokens, if it is a sequence) of each patch, half-open ranges.
        sequences: {number of keys of a self-attention: (place of the first of the picture's, their rows)}.
    """

    def __init__(self, denoiser, held, sequences, warmup_steps, group_norm="corrected", exchange="displaced"):
        self.denoiser, self.forward = denoiser, denoiser.forward
        self.held, self.sequences, self.warmup_steps = held, sequences, warmup_steps
        self.group_norm = "local" if exchange == "none" else group_norm
        self.frozen = exchange == "none"
        self.size = held[-1][1]
        self.restart()

    def restart(self):
        self.step, self.memory = 0, {}

    def __enter__(self):
        self.denoiser.forward = self._call
        return self

    def __exit__(self, *_):
        del self.denoiser.forward

    def held_at(self, size):
        """The rows that each patch computes where there are `size` rows."""
        factor = self.size // size
        return [(start // factor, -(-stop // factor)) for start, stop in self.held]

    def owned(self, size):
        """Of those, the ones that no patch before it computes too."""
        end, found = 0, []
        for start, stop in self.held_at(size):
            found.append((max(start, end), stop))
            end = stop
        return found

    def weights(self, size):
        return [(stop - start) / size for start, stop in self.owned(size)]

    @torch.no_grad()
    def _call(self, latent, *args, **kwargs):
        self.step += 1
        if self.step <= self.warmup_steps:
            with _View(self, None) as view:
                result = self.forward(latent, *args, **kwargs)
            self.memory = view.made
            return result
        results, views = [None] * len(self.held), [_View(self, p) for p in range(len(self.held))]
        # The patches meet at every norm, so that "sync" can read what the others have just made.
        barrier = threading.Barrier(len(self.held))

        def run(patch):
            try:
                views[patch].meet = barrier.wait
                with torch.no_grad(), views[patch]:
                    results[patch] = self.forward(latent, *args, **kwargs)
            except BaseException:
                barrier.abort()
                raise

        self.views = views
        threads = [threading.Thread(target=run, args=(p,)) for p in range(len(self.held))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not self.frozen:
            self.memory = {site: self._joined(site) for site in self.memory}
        whole = results[0].sample
        dim = -2 if whole.dim() == 4 else 1
        held = self.held_at(whole.shape[dim])
        parts = [r.sample.narrow(dim, a, b - a) for r, (a, b) in zip(results, held, strict=True)]
        results[0].sample = torch.cat(parts, dim)
        return results[0]

    def _joined(self, site):
        """What the owners have made of a site in this step."""
        kind = self.memory[site][0]
        made = [view.made[site] for view in self.views]
        if kind == "norm":
            return kind, [m[1][p] for p, m in enumerate(made)]
        joined = []
        for tensors in zip(*(m[1] for m in made), strict=True):
            size, dim, first, per_row = self._place(kind, tensors[0])
            whole = tensors[0].clone()
            for patch, (start, stop) in enumerate(self.owned(size)):
                rows = slice(first + start * per_row, first + stop * per_row)
                whole.transpose(0, dim)[rows] = tensors[patch].transpose(0, dim)[rows]
            joined.append(whole)
        return kind, joined

    def _place(self, kind, x):
        """(rows, their dimension, place of the first, tokens to a row)"""
        if kind == "conv":
            return x.shape[-2], x.dim() - 2, 0, 1
        first, rows = self.sequences[x.shape[-2]]
        return rows, x.dim() - 2, first, (x.shape[-2] - first if first else self._tokens(x.shape[-2])) // rows

    def _tokens(self, length):
        # Where the picture comes first, the others come last; the number of rows divides only the picture's.
        return length - length % self.sequences[length][1]


class _View(TorchFunctionMode):
    """One patch's run (`patch` None: an exact one). `made`: {site: (kind, what it had there)}."""

    def __init__(self, simulation, patch):
        super().__init__()
        self.simulation, self.patch, self.made, self.count = simulation, patch, {}, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in SITES:
            return func(*args, **kwargs)
        site, self.count = self.count, self.count + 1
        if func is F.group_norm:
            return self._norm(site, *args, **kwargs)
        if func is torch.conv2d:
            first = not any(kind == "conv" for kind, _ in self.made.values())
            x, *others = args
            (mixed,) = self._mixed(site, "conv", [x], fresh=first)
            return func(mixed, *others, **kwargs)
        query, key, value = (*args, *(kwargs.pop(n) for n in ("query", "key", "value")[len(args) :]))[:3]
        if key.shape[-2] not in self.simulation.sequences:
            return func(query, key, value, *args[3:], **kwargs)
        key, value = self._mixed(site, "attention", [key, value])
        return func(query, key, value, *args[3:], **kwargs)

    def _mixed(self, site, kind, tensors, fresh=False):
        self.made[site] = kind, [x.clone() for x in tensors]
        if self.patch is None or fresh:
            return tensors
        found = []
        for x, old in zip(tensors, self.simulation.memory[site][1], strict=True):
            size, dim, first, per_row = self.simulation._place(kind, x)
            # A convolution reads all rows that the patch has; keys and values of a row come from its owner.
            start, stop = (self.simulation.held_at if kind == "conv" else self.simulation.owned)(size)[self.patch]
            mixed, picture = x.clone(), slice(first, first + size * per_row)
            mine = slice(first + start * per_row, first + stop * per_row)
            mixed.transpose(0, dim)[picture] = old.transpose(0, dim)[picture]
            mixed.transpose(0, dim)[mine] = x.transpose(0, dim)[mine]
            found.append(mixed)
        return found

    def _norm(self, site, x, num_groups, weight=None, bias=None, eps=1e-5):
        rule, size = self.simulation, x.shape[-2]
        fresh = [_moments(x[..., a:b, :], num_groups) for a, b in rule.owned(size)]
        self.made[site] = "norm", fresh
        if self.patch is None:
            return F.group_norm(x, num_groups, weight, bias, eps)
        own = fresh[self.patch]
        if rule.group_norm == "local":
            start, stop = rule.held_at(size)[self.patch]
            moments = _moments(x[..., start:stop, :], num_groups)
        else:
            moments = self._moments(site, size, fresh)
        mean, var = moments[0], moments[1] - moments[0] ** 2
        if rule.group_norm == "corrected":
            var = torch.where(var < 0, own[1] - own[0] ** 2, var)
        groups = x.double().reshape(len(x), num_groups, -1)
        y = ((groups - mean[..., None]) / (var[..., None] + eps).sqrt()).reshape(x.shape)
        return (y * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)).to(x.dtype)

    def _moments(self, site, size, fresh):
        """Those of the whole picture, as this patch takes them to be."""
        rule, own = self.simulation, fresh[self.patch]
        parts = list(rule.memory[site][1])
        if rule.group_norm == "sync":
            self.meet()
            parts = [view.made[site][1][p] for p, view in enumerate(rule.views)]
        before = parts[self.patch]
        if rule.group_norm == "stale":
            parts[self.patch] = own
        moments = sum(w * part for w, part in zip(rule.weights(size), parts, strict=True))
        return moments + own - before if rule.group_norm == "corrected" else moments


def _moments(x, num_groups):
    """(2, n, groups): mean and mean square, in double precision; zeros of no rows."""
    if x.numel() == 0:
        return torch.zeros(2, len(x), num_groups, dtype=torch.float64)
    groups = x.double().reshape(len(x), num_groups, -1)
    return torch.stack((groups.mean(-1), (groups**2).mean(-1)))
