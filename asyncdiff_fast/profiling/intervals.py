"""Sets of times as sorted lists of (begin, end) that do not touch."""

import itertools


def union(pairs):
    """All times that lie in one of some intervals, however these overlap."""
    found = []
    for begin, end in sorted(pairs):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif end > begin:
            found.append((begin, end))
    return found


def common(first, second):
    """The times in both sets."""
    found, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        begin, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if end > begin:
            found.append((begin, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(first, second):
    """The times in the first set that are not in the second."""
    edges = [(float("-inf"), float("-inf")), *second, (float("inf"), float("inf"))]
    gaps = [(a[1], b[0]) for a, b in itertools.pairwise(edges) if b[0] > a[1]]
    return common(first, gaps)


def total(pairs):
    """How long a set is."""
    return sum(end - begin for begin, end in pairs)
