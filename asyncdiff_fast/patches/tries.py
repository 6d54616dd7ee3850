"""The ways to cut a denoiser's inputs that are tried in turn."""

from . import inputs

# Inputs of which it is tried whether they are to be cut another way.
MOST = 4


def of(recorder, cutter, named, regions, keyed):
    """[(`Recorder`, `Cutter` of the first patch)], each a try: first the usual one, then in `regions` alone.

    Args:
        recorder: of a forward on the whole picture with the inputs `named`.
        keyed: whether other values of an input may have a plan of their own.
    """
    joining = {name for joins in recorder.joins.values() for join in joins for name, _ in join.of}
    doubtful = inputs.doubtful(cutter, named, joining)[:MOST]
    cutters = [cutter, *map(cutter.other_than, doubtful)]
    wholes = [inputs.whole(cutter, named) if keyed else frozenset() for cutter in cutters]
    usual = [(recorder.settled(cutter, whole), cutter) for cutter, whole in zip(cutters, wholes, strict=True)]
    return usual + [(usual[0][0].narrowed(region), cutter) for region in regions]
