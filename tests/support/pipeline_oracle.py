"""Patches that pass through stages, computed in one process the plain way: no stages, no slots, nothing shared.

Patch after patch runs the whole denoiser on the whole picture. In its run, what belongs to its rows is its own, what
belongs to the rows of patches before it is what their runs of this step had, and what belongs to those after it is what
theirs had one step before. Text is each patch's own.
"""

import patch_oracle
import torch


class Simulation(patch_oracle.Simulation):
    """As the one of displaced patches, in turn; with `carried` so much of its last change is added to what is stale,
    but for statistics.
    """

    def __init__(self, *args, carried=0.0, **options):
        super().__init__(*args, **options)
        self.carried = carried

    def restart(self):
        super().restart()
        self.before = None

    @torch.no_grad()
    def _call(self, latent, *args, **kwargs):
        self.step += 1
        exact = self.step <= self.warmup_steps
        if not exact:
            self._carry_on()
        parts = []
        for patch in [None] if exact else range(len(self.held)):
            with _View(self, patch) as view:
                result = self.forward(latent, *args, **kwargs)
            if exact:
                self.before, self.memory = self.memory or None, view.made
                return result
            self._take_over(patch, view)
            dim = -2 if result.sample.dim() == 4 else 1
            start, stop = self.held_at(result.sample.shape[dim])[patch]
            parts.append(result.sample.narrow(dim, start, stop - start))
        result.sample = torch.cat(parts, dim)
        return result

    def _carry_on(self):
        last = {site: (kind, [x.clone() for x in known]) for site, (kind, known) in self.memory.items()}
        for site, (kind, known) in self.memory.items() if self.before else ():
            if kind != "norm":
                for x, before in zip(known, self.before[site][1], strict=True):
                    x += self.carried * (x - before)
        self.before = last

    def _take_over(self, patch, view):
        """What a patch's run had for its own rows takes the place of what was known of them."""
        for site, (kind, known) in self.memory.items():
            made = view.made[site][1]
            if kind == "norm":
                known[patch] = made[patch]
                continue
            for old, new in zip(known, made, strict=True):
                size, dim, first, per_row = self._place(kind, new)
                start, stop = self.owned(size)[patch]
                rows = slice(first + start * per_row, first + stop * per_row)
                old.transpose(0, dim)[rows] = new.transpose(0, dim)[rows]


class _View(patch_oracle._View):
    def _moments(self, site, size, fresh):
        rule, own = self.simulation, fresh[self.patch]
        parts = list(rule.memory[site][1])
        before, parts[self.patch] = parts[self.patch], own
        moments = sum(w * part for w, part in zip(rule.weights(size), parts, strict=True))
        if rule.group_norm == "corrected":
            moments = moments + sum(rule.weights(size)[self.patch + 1 :]) * (own - before)
        return moments
