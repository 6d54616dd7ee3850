"""The ways to cut a denoiser's inputs that are tried, and what each puts in place before patches are looked at."""

import torch

from . import inputs, site_rows

# Inputs of which it is tried whether they are to be cut another way.
MOST = 4


def of(recorder, cutter, named, regions):
    """[(`Recorder`, `Cutter` of the first patch)], each a try: first the usual one, then in `regions` alone.

    Args:
        recorder: of a forward on the whole picture with the inputs `named`.
    """
    joining = {name for joins in recorder.joins.values() for join in joins for name, _ in join.of}
    doubtful = inputs.doubtful(cutter, named, joining)[:MOST]
    cutters = [cutter, *map(cutter.other_than, doubtful)]
    usual = [(recorder.settled(cutter, inputs.whole(cutter, named)), cutter) for cutter in cutters]
    return usual + [(usual[0][0].narrowed(region), cutter) for region in regions]


def beforehand(recorder, cutter, naive):
    """(sites, {key: result}, {(key, place): [(argument, tensor)]}) that follow from the whole picture alone."""
    probes = () if naive else site_rows.resampling_sites(recorder, cutter.levels)
    constants = {}
    for key, result in recorder.constants.items():
        cut = cutter.positions(result, {i for *place, i in recorder.beside if tuple(place) == key})
        if cut is not None:
            constants[key] = cut
    joins, known = {}, []
    for key, found in recorder.joins.items():
        for join in found:
            cut = cutter.joined(join)
            if cut is not None:
                joins.setdefault((key, join.place), []).append((join.argument, _once(cut, known)))
    return probes, constants, joins


def _once(x, known):
    """`x`, or a tensor met before that is equal: many layers make the same of a mask."""
    same = (y for y in known if not x.is_meta and (x.shape, x.dtype) == (y.shape, y.dtype) and torch.equal(x, y))
    found = next(same, None)
    if found is None:
        # What it was cut from need not stay.
        known.append(x.clone())
    return known[-1] if found is None else found
