"""Which rows pass through the stages in which micro-step, and in which order messages travel. Pure.

A call is one micro-step for each patch, in order, on every stage: stage s computes patch p while stage s + 1 computes
patch p - 1, so that the last of M patches leaves the last of N stages in micro-step M + N - 1. At a site that reads
more than its own rows, a patch meets those before it as this call has made them, and those after it as the call before
has. Hidden states are never stale.

Source: PipeFusion (Fang et al., 2024), section 4.
"""

from itertools import accumulate, pairwise

from ..patches.layout import Rows, split
from ..stages.cutset import Transfer


def rows_of(wanted, size, factor):
    """`Rows` of the latent, `size` of them in all.

    Args:
        wanted: how many patches, as even as whole coarsest rows allow; or the rows of each.
        factor: rows of the latent in one row of the coarsest resolution, of which no two patches share one.
    Raises: ValueError if they do not fit.
    """
    of = f" (multiples of {factor})" if factor > 1 else ""
    if isinstance(wanted, int):
        most = -(-size // factor)
        if wanted > most:
            raise ValueError(
                f"pipeline_patches must not exceed the rows of the latent{f' / {factor}' if factor > 1 else ''}: got "
                f"pipeline_patches={wanted}, {size} rows; pass at most {most}, or a taller picture"
            )
        return split(size, wanted, factor, aligned=True)
    if sum(wanted) != size or any(n % factor for n in wanted[:-1]):
        raise ValueError(
            f"pipeline_patches as rows must sum to those of the latent{of}: got {list(wanted)} for {size} rows; pass a "
            "number of patches to have them divided"
        )
    return Rows(size, tuple(pairwise(accumulate(wanted, initial=0))))


def without_rows(whole, part):
    """Values whose shape is the same for the whole picture as for a part of it: they hold no rows, as text does."""
    pairs = enumerate(zip(whole.values, part.values, strict=True))
    return frozenset(v for v, (a, b) in pairs if a.ref.shape == b.ref.shape and a.argument is None)


def later_transfers(transfers, rowless, text):
    """Transfers of micro-steps after the first, which read the first one's text unless `text` is "patch"."""
    if text == "patch":
        return transfers
    found = []
    for t in transfers:
        left = [(rank, tuple(v for v in values if v not in rowless)) for rank, values in t.targets]
        targets = t.targets if t.unit < 0 else tuple((rank, values) for rank, values in left if values)
        if targets:
            found.append(Transfer(t.name, t.unit, t.source, targets))
    return tuple(found)


def in_order(transfers):
    """[(micro-step, place of the transfer among its own)], as all ranks post them.

    By when they are made, counted in micro-steps from the beginning of the call; then by source, so that a rank is
    ready to receive the next micro-step's before it sends what it makes of this one's.

    Args:
        transfers: those of each micro-step.
    """
    places = [(p, n) for p, found in enumerate(transfers) for n in range(len(found))]
    return sorted(places, key=lambda x: (x[0] + transfers[x[0]][x[1]].source, transfers[x[0]][x[1]].source, x[1]))
