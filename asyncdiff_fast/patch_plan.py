"""What the patches of one denoiser exchange: sites with their rows, messages and bytes. Pure but for dtypes."""

import math
from dataclasses import dataclass, field

import torch

from . import layout
from .layout import Rows, Tokens
from .sites import ATTENTION, CONV, NORM, RESIZE

# A group of sites is posted when this many bytes (of all patches) have come together, or this many sites.
GROUP_BYTES, GROUP_SITES = 4 << 20, 32


@dataclass(frozen=True)
class Site:
    """One watched call. `shapes`: of its input (of the keys, for attention), for each patch."""

    name: str
    call: int
    place: int
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


@dataclass(frozen=True)
class PatchPlan:
    """The patches of one call of a denoiser.

    `sites`: in order of execution. `rows`: of the latent. `levels`: {rows: Rows} of every resolution.
    """

    config: object
    rows: Rows
    levels: dict = field(repr=False)
    sites: tuple = field(repr=False)
    result_bytes: int = 0

    def displaced(self, i):
        """True if a site's messages travel after the call that makes them."""
        stale = self.config.group_norm not in ("sync", "local")
        return self.sites[i].exchanges and (stale or self.sites[i].kind != NORM)

    def groups(self, met):
        """Of the sites that are met, in their order, those that displaced steps post together."""
        groups, size = [[]], 0
        for i in filter(self.displaced, met):
            site = self.sites[i]
            groups[-1].append(i)
            size += sum(site.sent_bytes(p) for p in range(len(site.shapes)))
            if size >= GROUP_BYTES or len(groups[-1]) >= GROUP_SITES:
                groups.append([])
                size = 0
        return [g for g in groups if g]

    def sent_bytes(self, patch, kind=None):
        """Bytes that a patch sends in one displaced call, in all or of one kind of site; without the result.

        In all, the worst error of predictions is among them where they are checked.
        """
        local = self.config.group_norm == "local"
        wanted = [s for s in self.sites if kind in (None, s.kind) and not (local and s.kind == NORM)]
        errors = 4 * (len(self.rows.held) - 1) if kind is None and self.config.checks else 0
        return sum(site.sent_bytes(patch) for site in wanted) + errors

    def memory_bytes(self, patch):
        """Bytes of a patch's long-lived buffers: halos, statistics, keys and values of all patches.

        What is predicted is received beside the place where it is read, into two buffers by turns.
        """
        total = 2 * self.predicted_bytes(patch)
        for site in self.sites:
            if isinstance(site, Ring):
                tokens = site.tokens.extra + sum(site.tokens.count(p) for p in range(len(site.shapes)))
                total += tokens * site.key[0] * site.features * site.item
            elif isinstance(site, Norm):
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
            kv, halo, norm = (self.sent_bytes(patch, kind) / 1e6 for kind in (ATTENTION, CONV, NORM))
            result = self.result_bytes * (stop - start) / self.rows.size * (len(self.rows.held) - 1) / 1e6
            lines.append(
                f"{patch:>5}  {f'{start}-{stop}':>9}  {kv:>12.2f}  {halo:>8.2f}  {norm:>10.3f}  {result:>7.2f}  "
                f"{self.memory_bytes(patch) / 1e6:>7.1f} MB"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class MeshPlan:
    """The patches of a call, and the stages of each patch."""

    patches: PatchPlan
    stages: object

    def __str__(self):
        return f"{self.patches}\neach patch in\n{self.stages}"


def hash_of(value):
    """A number that is the same in every process."""
    import zlib

    return zlib.crc32(repr(value).encode())


def factor_of(recorder, size, axis=-2):
    """Rows of the latent in one row of the coarsest resolution, by the convolutions and interpolations of a forward."""
    factor, known = 1, {size}
    for found in resamplings(recorder):
        before, after = found.shape[axis], found.result[axis]
        if before in known and after < before and after not in known:
            factor *= -(-before // after)
        known.add(after)
    return factor


def levels_of(recorder, rows, axis=-2):
    """{size: Rows} of every resolution that convolutions and interpolations lead to."""
    levels = {rows.size: rows}
    for found in resamplings(recorder):
        before, after = found.shape[axis], found.result[axis]
        if before in levels and after not in levels:
            known = levels[before]
            if after < before:
                levels[after] = known.coarser(after, -(-before // after))
            else:
                levels[after] = known.finer(after, after // before)
    return levels


def resamplings(recorder):
    """The `Seen` convolutions and interpolations of pictures, in order."""
    found = [s for key in recorder.order for s in recorder.sites[key]]
    return [s for s in found if s.kind in (CONV, RESIZE) and len(s.shape) >= 4]


def resampling_sites(recorder, levels):
    """Sites of convolutions and interpolations alone, which are known before the patches' shapes."""
    sites = []
    for key in recorder.order:
        for place, whole in enumerate(recorder.sites[key]):
            if whole.kind in (CONV, RESIZE):
                sites.append(_resampling((*key, place, whole.kind, (), whole.dtype), whole, levels, False))
    return sites


def make_sites(recorder, levels, start, patches, sees_latent, frames=1):
    """Sites of the plan, from one forward on the whole picture and one on each patch.

    Args:
        levels: {size: Rows}.
        start: the size of the latent's own resolution.
        patches: for each patch, {(module, call): [Seen]}.
        sees_latent: True if the first convolution can read rows of the latent around its own.
        frames: of a clip whose tokens lie in one sequence.
    Raises: ValueError that names the module if a site's rows cannot be told.
    """
    sites, level, first = [], start, True
    for key in recorder.order:
        if any(len(p.get(key, ())) != len(recorder.sites[key]) for p in patches):
            raise ValueError(f"{key[0]} takes another way on a patch than on the whole picture")
        for place, whole in enumerate(recorder.sites[key]):
            parts = [p[key][place] for p in patches]
            common = (*key, place, whole.kind, tuple(s.shape for s in parts), whole.dtype)
            if whole.kind in (CONV, RESIZE):
                site = _resampling(common, whole, levels, first and sees_latent)
                if type(site) is not Site:
                    _check_rows(key, site.before, parts)
                    level, first = whole.result[-2], False
                sites.append(site)
            elif whole.kind == NORM:
                sites.append(_norm(common, whole, parts, levels, level))
            else:
                sites.append(_ring(common, whole, parts, levels[level], frames))
    return tuple(sites)


def _resampling(common, whole, levels, first):
    """The site of a convolution or interpolation."""
    if len(whole.shape) < 4 or whole.shape[-2] not in levels:
        return Site(*common)
    before, after = levels[whole.shape[-2]], levels[whole.result[-2]]
    if whole.kind == RESIZE:
        return _resize(common, whole, before, after)
    return _halo(common, whole, before, after, first)


def _check_rows(key, before, parts):
    held = [stop - start for start, stop in before.held]
    found = [s.shape[-2] for s in parts]
    if held != found:
        raise ValueError(f"{key[0]} gets {found} rows on the patches, not {held}: something before it changes the rows")


def _halo(common, whole, before, after, first):
    kernel, stride, padding, dilation = whole.options[len(whole.shape) - 4]
    if padding is None:
        raise ValueError(f"{common[0]} pads more rows below than above (padding='same' with an even kernel)")
    windows = tuple(layout.window(before, after, p, kernel, stride, padding, dilation) for p in range(len(before.held)))
    return Halo(*common, before, after, windows, layout.halos(before, windows), first and kernel > 1)


def _resize(common, whole, before, after):
    if whole.options[0] != "nearest":
        raise ValueError(f"{common[0]} interpolates {whole.options[0]}: patches support nearest-neighbour only")
    for (low, high), (start, stop) in zip(before.held, after.held, strict=True):
        first, last = (row * before.size // after.size for row in (start, stop - 1))
        if start < stop and not low <= first <= last < high:
            raise ValueError(
                f"{common[0]} interpolates {before.size} rows to {after.size}, and a patch that holds rows {low} to "
                f"{high} needs rows {first} to {last + 1}: use a size that the strides divide, or num_stages"
            )
    return Resize(*common, before, after, (whole.result[2:-2], whole.result[-1:]))


def _norm(common, whole, parts, levels, level):
    if all(s.shape == whole.shape for s in parts):
        return Site(*common)
    if len(whole.shape) >= 4:
        return Norm(*common, whole.options[0], levels[whole.shape[-2]])
    rows = levels[level]
    if not rows.aligned:
        raise ValueError(f"{common[0]} normalises a sequence, and patches share rows of it: use fewer patches")
    layout.tokens_of(rows, whole.shape[-1], [s.shape[-1] for s in parts])
    return Norm(*common, whole.options[0], rows)


def _ring(common, whole, parts, rows, frames):
    if all(s.shape[-2] == whole.shape[-2] for s in parts):
        return Site(*common)
    try:
        per_row, extra = layout.tokens_of(rows, whole.shape[-2], [s.shape[-2] for s in parts])
    except ValueError as error:
        raise ValueError(f"{common[0]} attends to tokens that are not rows of the picture: {error}") from error
    (value_shape, causal), shape = parts[0].options, parts[0].shape
    if causal or len(shape) not in (3, 4):
        how = "causally" if causal else f"with keys of {len(shape)} dimensions"
        raise ValueError(f"{common[0]} attends {how}: patches cannot share it")
    # (b, s, d) is one head.
    heads = [s[1] if len(s) == 4 else 1 for s in (shape, value_shape)]
    key, value = (shape[0], heads[0], shape[-1]), (shape[0], heads[1], value_shape[-1])
    return Ring(*common, layout.Tokens(rows, per_row, extra, frames), key, value)
