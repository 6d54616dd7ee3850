"""What the patches of one denoiser exchange in a call: which sites travel together, bytes and memory. Pure."""

import math
from dataclasses import dataclass, field

from .layout import Rows
from .site import Halo, Norm, Ring, Sum
from .sites import ATTENTION, CONV, NORM, SUM

# A group of sites is posted when one patch has this many bytes for another, or this many sites have come together.
GROUP_BYTES, GROUP_SITES = 2 << 20, 32
# More sends and receives of one rank do not go in one slot.
GROUP_MESSAGES = 256


@dataclass(frozen=True)
class PatchPlan:
    """The patches of one call of a denoiser.

    `sites`: in order of execution. `rows`: of the latent. `levels`: {rows: Rows} of every resolution. `kept_bytes`: of
    projections of the text and other constant inputs, which every patch keeps from call to call. `cuts`: what each
    input is cut by, in words. `summing`: names of modules that call what may sum over rows.
    """

    config: object
    rows: Rows
    levels: dict = field(repr=False)
    sites: tuple = field(repr=False)
    result_bytes: int = 0
    kept_bytes: int = 0
    cuts: tuple = ()
    summing: tuple = field(default=(), repr=False)

    @property
    def modules(self):
        """Names of the modules that calls must be watched in."""
        sums = any(site.kind == SUM for site in self.sites)
        # What a norm inside sums over channels must not be taken for a sum of the module around it.
        return {site.name for site in self.sites} | set(self.summing if sums else ())

    def displaced(self, i):
        """True if a site's messages travel after the call that makes them."""
        stale = self.config.group_norm not in ("sync", "local")
        return self.sites[i].exchanges and (stale or self.sites[i].kind != NORM)

    def groups(self, met):
        """Of the sites that are met, in their order, those that displaced steps post together."""
        groups, size, messages = [[]], 0, 0
        for i in filter(self.displaced, met):
            site = self.sites[i]
            messages += site.messages_of_one
            if size >= GROUP_BYTES or len(groups[-1]) >= GROUP_SITES or messages > GROUP_MESSAGES:
                groups.append([])
                size, messages = 0, site.messages_of_one
            groups[-1].append(i)
            size += site.message_bytes
        return [g for g in groups if g]

    def sent_bytes(self, patch, kind=None):
        """Bytes that a patch sends in one displaced call, in all or of one kind of site; without the result.

        In all, the worst error of predictions is among them where they are checked.
        """
        local = self.config.group_norm == "local"
        wanted = [s for s in self.sites if kind in (None, s.kind) and not (local and s.kind == NORM)]
        errors = 4 * (len(self.rows.held) - 1) if kind is None and self.config.checks else 0
        return sum(site.sent_bytes(patch) for site in wanted) + errors

    def sent_result_bytes(self, patch):
        """Bytes of its part of the denoiser's result that a patch sends in one call, whole rows of them."""
        start, stop = self.rows.held[patch]
        return self.result_bytes * (stop - start) // self.rows.size * (len(self.rows.held) - 1)

    @property
    def bytes_per_call(self):
        """Bytes that all patches together send in one displaced call."""
        patches = range(len(self.rows.held))
        return sum(self.sent_bytes(patch) + self.sent_result_bytes(patch) for patch in patches)

    def memory_bytes(self, patch):
        """Bytes of a patch's long-lived buffers: halos, statistics, keys and values of all patches and of the text.

        What is predicted is received beside the place where it is read, into two buffers by turns.
        """
        total = 2 * self.predicted_bytes(patch) + self.kept_bytes
        for site in self.sites:
            if isinstance(site, Ring):
                tokens = site.tokens.extra + sum(site.tokens.count(p) for p in range(len(site.shapes)))
                total += tokens * site.key[0] * site.features * site.item
            elif isinstance(site, Norm | Sum):
                total += len(site.shapes) * math.prod(site.message_shape()) * site.item
            elif isinstance(site, Halo) and site.exchanges:
                sizes = [m for m in site.messages if patch in (m.source, m.target)]
                total += sum(math.prod(site.rows_shape(m.source, m.stop - m.start)) for m in sizes) * site.item
        return total

    def predicted_bytes(self, patch):
        """Bytes of the keys, values and halos that a patch reads of others, if it predicts them, else 0."""
        if not self.config.predicts_patches:
            return 0
        return sum(
            math.prod(shape) * site.item
            for site in self.sites
            if site.exchanges and site.kind != NORM
            for source in range(len(site.shapes))
            for shape in site.sent(source).get(patch, ())
        )

    def digest(self):
        """The same on ranks that have the same plan."""
        return hash_of((self.rows, self.sites, self.result_bytes))

    def __str__(self):
        head = ("patch", "rows", "keys, values", "halos", "statistics", "result", "buffers")
        widths = (5, 9, 12, 8, 10, 7, 10)
        lines = [f"{len(self.rows.held)} patches of {self.rows.size} rows; MB sent per displaced call:"]
        lines.append("  ".join(f"{name:>{width}}" for name, width in zip(head, widths, strict=True)))
        for patch, (start, stop) in enumerate(self.rows.held):
            kv, halo, norm, sums = (self.sent_bytes(patch, kind) / 1e6 for kind in (ATTENTION, CONV, NORM, SUM))
            result = self.sent_result_bytes(patch) / 1e6
            lines.append(
                f"{patch:>5}  {f'{start}-{stop}':>9}  {kv:>12.2f}  {halo:>8.2f}  {norm + sums:>10.3f}  {result:>7.2f}  "
                f"{self.memory_bytes(patch) / 1e6:>7.1f} MB"
            )
        if self.cuts:
            lines.append(f"cut: {', '.join(self.cuts)}; all else whole")
        return "\n".join(lines)


@dataclass(frozen=True)
class MeshPlan:
    """The patches of a call, and the stages of each patch."""

    patches: PatchPlan
    stages: object

    @property
    def bytes_per_call(self):
        """Bytes that all ranks together send in one call, if every patch has the stages of the first."""
        return self.patches.bytes_per_call + len(self.patches.rows.held) * self.stages.bytes_per_call

    def __str__(self):
        return f"{self.patches}\neach patch in\n{self.stages}"


def hash_of(value):
    """A number that is the same in every process."""
    import zlib

    return zlib.crc32(repr(value).encode())
