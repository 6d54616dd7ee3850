"""Which rows each site reads, from one forward on the whole picture and one on each patch. Pure."""

import math

from . import layout
from .site import Halo, Norm, Pad, Pool, Resize, Ring, Site, Sum
from .sites import CONV, NORM, PAD, POOL, RESIZE, SUM, SUMS

_RESAMPLING = (CONV, RESIZE, POOL)


def factor_of(recorder, size, axis=-2):
    """Rows of the latent in one row of the coarsest resolution, by the convolutions and interpolations of a forward."""
    known = {size: 1}
    for _, found, shape in _changes(recorder):
        before, after = shape[axis], found.result[axis]
        if before in known and after not in known:
            larger = after > before
            known[after] = max(known[before] * before // after, 1) if larger else known[before] * -(-before // after)
    return math.lcm(*known.values())


def levels_of(recorder, rows, axis=-2):
    """{size: Rows} of every resolution that convolutions, pooling and interpolations lead to, or pixel shuffles."""
    levels, latest = {rows.size: rows}, rows.size
    made = {call.site for call in recorder.calls}
    for site, found, shape in _changes(recorder):
        before, after = shape[axis], found.result[axis]
        if before not in levels and site in made and _mixes_rows(found) and before % latest == 0:
            levels[before] = levels[latest].finer(before, before // latest)
        if before in levels and after not in levels:
            known = levels[before]
            if after < before:
                levels[after] = known.coarser(after, -(-before // after))
            else:
                levels[after] = known.finer(after, after // before)
        if site in made and after in levels:
            latest = after
    return levels


def resamplings(recorder):
    """The `Seen` convolutions, pooling and interpolations of pictures, in order."""
    return [found for _, found, _ in _changes(recorder)]


def _changes(recorder):
    """[(site, `Seen`, shape)] of these: the shape is that before rows were padded by a call of its own."""
    padded, found = _padded(recorder), []
    for key, place in recorder.order:
        seen, site = recorder.sites[key][place], (*key, place)
        if seen.kind in _RESAMPLING and len(seen.shape) >= 4:
            pad = padded.get(site)
            found.append((site, seen, seen.shape if pad is None else recorder.sites[pad[:2]][pad[2]].shape))
    return found


def _padded(recorder):
    """{site of a convolution: that of the padding of rows which it reads}"""
    found, pad = {}, None
    for key, place in recorder.order:
        seen = recorder.sites[key][place]
        if pad is not None and seen.kind == CONV and seen.shape == recorder.sites[pad[:2]][pad[2]].result:
            found[*key, place] = pad
        pad = (*key, place) if seen.kind == PAD and any(seen.options[0]) else None
    return found


def _named(module):
    return module or "its own forward"


def _mixes_rows(seen):
    return seen.kind != CONV or seen.options[len(seen.shape) - 4][0] > 1


def resampling_sites(recorder, levels):
    """Sites of convolutions and interpolations alone, which are known before the patches' shapes."""
    sites, padded = [], _padded(recorder)
    for key, place in recorder.order:
        whole = recorder.sites[key][place]
        if whole.kind in (*_RESAMPLING, PAD) and (*key, place) not in recorder.outside:
            sites.append(_resampling((*key, place, whole.kind, (), whole.dtype), whole, levels, False, padded))
    return sites


def make_sites(recorder, cutter, patches, sees_latent):
    """Sites of the plan, from one forward on the whole picture and one on each patch.

    Args:
        cutter: `Cutter`, which knows the rows of every resolution and the order of tokens.
        patches: for each patch, {(module, call): [Seen]}.
        sees_latent: True if the first convolution can read rows of the latent around its own.
    Raises: ValueError that names the module if a site's rows cannot be told.
    """
    levels, grid, padded = cutter.levels, cutter.grid, _padded(recorder)
    sites, level, width, first = [], cutter.rows.size, 0, True
    for key, place in recorder.order:
        if any(len(p.get(key, ())) != len(recorder.sites[key]) for p in patches):
            raise ValueError(f"{_named(key[0])} takes another way on a patch than on the whole picture")
        whole, parts = recorder.sites[key][place], [p[key][place] for p in patches]
        common = (*key, place, whole.kind, tuple(s.shape for s in parts), whole.dtype)
        if (*key, place) in recorder.outside:
            sites.append(Site(*common))
        elif whole.kind in (*_RESAMPLING, PAD):
            site = _resampling(common, whole, levels, first and sees_latent, padded)
            if type(site) is not Site:
                _check_rows(key, site.before, parts)
                first = False
            if (type(site) not in (Site, Pad) or (*key, place) in padded) and whole.result[-2] in levels:
                level, width = whole.result[-2], whole.result[-1]
            sites.append(site)
        elif whole.kind == NORM:
            sites.append(_norm(common, whole, parts, levels, level))
        else:
            start = None if grid is None else cutter.starts.get(whole.shape[-2])
            rows = levels[level] if start is None else grid.rows
            sites.append(_ring(common, whole, parts, rows, width, None if grid is None else grid.outer, start))
    return tuple(sites)


def with_sums(sites, recorder, patches):
    """Sites in order of execution, with those that sum over rows; `patches`: {(module, call, place): shapes} each."""
    known = {(s.name, s.call, s.place): s for s in sites}
    wholes = {c.site: c for c in recorder.calls if c.site in patches[0]}
    if any(p.keys() != wholes.keys() for p in patches):
        raise ValueError("the denoiser takes another way on one patch than on another")
    known |= {place: _sum(called, [p[place] for p in patches]) for place, called in wholes.items()}
    return tuple(known[place] for place in recorder.met if place in known)


def _sum(called, parts):
    """The site of a call that sums over rows.

    Args:
        called: its `Called` on the whole picture.
        parts: shapes of what is given on the patches.
    Raises: ValueError if the patches' sums do not make the whole one.
    """
    (name, call, place), how = called.site, SUMS[called.func]
    for number, whole in enumerate(called.given):
        shapes = [given[number] for given in parts]
        over = [d for d, n in enumerate(whole) if any(shape[d] != n for shape in shapes)]
        if len(over) > 1 or any(sum(shape[d] for shape in shapes) != whole[d] for d in over):
            raise ValueError(
                f"{_named(name)} sums over tokens of which the patches hold some twice (text beside the "
                "picture, or rows that two patches share)"
            )
    rows = [math.prod(given[0]) for given in parts]
    shares = tuple(n / sum(rows) for n in rows) if how == "mean" else (1.0,) * len(parts)
    return Sum(name, call, place, SUM, (called.made[0],) * len(parts), called.dtype, how, shares)


def _resampling(common, whole, levels, first, padded):
    """The site of a convolution or interpolation, or of the padding before it; `padded`: see `_padded`."""
    if len(whole.shape) < 4 or whole.shape[-2] not in levels or common[:3] in padded:
        return Site(*common)
    if whole.kind == PAD:
        return _pad(common, whole, levels) if common[:3] in padded.values() else Site(*common)
    before, after = levels[whole.shape[-2]], levels[whole.result[-2]]
    if whole.kind == RESIZE:
        return _resize(common, whole, before, after)
    kind = Halo if whole.kind == CONV else Pool
    return _halo(kind, common, whole, before, after, first and whole.kind == CONV)


def _check_rows(key, before, parts):
    held = [stop - start for start, stop in before.held]
    found = [s.shape[-2] for s in parts]
    if held != found:
        raise ValueError(
            f"{_named(key[0])} gets {found} rows on the patches, not {held}: something before it changes the rows"
        )


def _halo(kind, common, whole, before, after, first):
    kernel, stride, padding, dilation = whole.options[len(whole.shape) - 4]
    if padding is None and whole.kind == POOL:
        raise ValueError(f"{_named(common[0])} pools with padding, dilation or ceil_mode, which patches do not know")
    if padding is None:
        raise ValueError(f"{_named(common[0])} pads more rows below than above (padding='same' with an even kernel)")
    windows = tuple(layout.window(before, after, p, kernel, stride, padding, dilation) for p in range(len(before.held)))
    return kind(*common, before, after, windows, layout.halos(before, windows), first and kernel > 1)


def _pad(common, whole, levels):
    (above, below), rows = whole.options[0], levels[whole.shape[-2]]
    needs = [(max(start - above, 0), min(stop + below, rows.size)) for start, stop in rows.held]
    windows = tuple(layout.Window(need, (0, 0)) for need in needs)
    edges = tuple((max(above - start, 0), max(stop + below - rows.size, 0)) for start, stop in rows.held)
    return Pad(*common, rows, rows, windows, layout.halos(rows, windows), False, edges)


def _resize(common, whole, before, after):
    # Where the rows become a whole multiple, both are the same.
    if whole.options[0] != "nearest" and not (whole.options[0] == "nearest-exact" and after.size % before.size == 0):
        raise ValueError(f"{_named(common[0])} interpolates {whole.options[0]}: patches support nearest-neighbour only")
    for (low, high), (start, stop) in zip(before.held, after.held, strict=True):
        first, last = (row * before.size // after.size for row in (start, stop - 1))
        if start < stop and not low <= first <= last < high:
            raise ValueError(
                f"{_named(common[0])} interpolates {before.size} rows to {after.size}, and a patch that holds rows "
                f"{low} to {high} needs rows {first} to {last + 1}: the strides do not divide this size"
            )
    return Resize(*common, before, after, (whole.result[2:-2], whole.result[-1:]))


def _norm(common, whole, parts, levels, level):
    if all(s.shape == whole.shape for s in parts):
        return Site(*common)
    if len(whole.shape) >= 4:
        if whole.shape[-2] not in levels:
            raise ValueError(
                f"{_named(common[0])} normalises {whole.shape[-2]} rows, to which no convolution, pooling or "
                "interpolation that patches know leads"
            )
        return Norm(*common, whole.options[0], levels[whole.shape[-2]])
    rows = levels[level]
    if not rows.aligned:
        raise ValueError(f"{_named(common[0])} normalises a sequence, and patches share rows of it")
    layout.tokens_of(rows, whole.shape[-1], [s.shape[-1] for s in parts])
    return Norm(*common, whole.options[0], rows)


def _ring(common, whole, parts, rows, width, frames, start):
    if all(s.shape[-2] == whole.shape[-2] for s in parts):
        return Site(*common)
    try:
        per_row, extra = layout.tokens_of(rows, whole.shape[-2], [s.shape[-2] for s in parts])
    except ValueError as error:
        raise ValueError(f"{_named(common[0])} attends to tokens that are not rows of the picture: {error}") from error
    (value_shape, causal), shape = parts[0].options, parts[0].shape
    if causal or len(shape) not in (3, 4):
        how = "causally" if causal else f"with keys of {len(shape)} dimensions"
        raise ValueError(f"{_named(common[0])} attends {how}: patches cannot share it")
    # (b, s, d) is one head.
    heads = [s[1] if len(s) == 4 else 1 for s in (shape, value_shape)]
    key, value = (shape[0], heads[0], shape[-1]), (shape[0], heads[1], value_shape[-1])
    if frames is None:
        # A clip's tokens, made of its pixels.
        frames = per_row // width if width and per_row % width == 0 else 1
    elif per_row % frames:
        frames = 1
    # Sequences of one length may have their text at either end.
    before = start if start is not None and 0 < start < extra else None
    return Ring(*common, layout.Tokens(rows, per_row, extra, frames, before), key, value)
