"""The table of docs/compatibility.md: each of its cells is a test. `make tables` writes it anew."""

import itertools
import os
from pathlib import Path

import neighbours
import numpy as np
import pytest
import ranks
from refusals import is_ours

import asyncdiff_fast

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
MODES = {
    "one device": (1, {}, None),
    "steps": (2, dict(parallel_steps=2, warmup_steps=100), None),
    "halves": (2, dict(cfg_parallel=True), None),
    "stages": (2, dict(num_stages=2, warmup_steps=100), dict(num_stages=2, warmup_steps=1)),
    "patches": (2, dict(num_patches=2, exchange="sync"), None),
}
ROWS = [row for group in neighbours.GROUPS.values() for row in group]


def _unpatched(row):
    """The pictures before and after the change."""
    plain = row.build()
    row.before(plain)
    first = row.draw(plain)
    return first, first if row.after is neighbours.nothing else _after(row, plain)


def _outcome(row, options, later, first, right):
    """ "works", "refused", or what is wrong.

    Args:
        options: a way to share that is exact.
        later: the same with asynchronous steps, whose pictures are others.
        first, right: see `_unpatched`.
    """
    pipe = row.build()
    row.before(pipe)
    target = getattr(pipe, "transformer", pipe) if row.name == "guiders" else pipe
    try:
        asyncdiff_fast.patch(target, timeout_s=60, **options)
        before = row.draw(pipe)
        found = before if row.after is neighbours.nothing else _after(row, pipe)
    except Exception as refusal:
        if not is_ours(refusal):
            raise
        return _left_clean(row, target, pipe, first, right) or f"refused: {str(refusal)[:60]}"
    wrong = max(_error(before, first), _error(found, right))
    if wrong > row.tolerance:
        return f"differs by {wrong:.1e}"
    asyncdiff_fast.unpatch(target)
    wrong = _error(row.draw(pipe), right)
    if wrong > row.tolerance:
        return f"differs by {wrong:.1e} once unpatched"
    if later is not None:
        pipe = row.build()
        row.before(pipe)
        target = getattr(pipe, "transformer", pipe) if row.name == "guiders" else pipe
        asyncdiff_fast.patch(target, timeout_s=60, **later)
        row.draw(pipe)
        drawn = _after(row, pipe)
        asyncdiff_fast.unpatch(target)
        if not np.isfinite(drawn).all():
            return "asynchronous steps draw no picture"
    return "works"


def _after(row, pipe):
    row.after(pipe)
    return row.draw(pipe)


def _left_clean(row, target, pipe, first, right):
    """What is wrong after a refusal, or None: the model draws as if it had never been patched."""
    if asyncdiff_fast.patching.is_patched(neighbours.denoiser(pipe)):
        asyncdiff_fast.unpatch(target)
    drawn = row.draw(pipe)
    wrong = min(_error(drawn, first), _error(drawn, right))
    return f"differs by {wrong:.1e} after a refusal" if wrong > row.tolerance else None


def _error(found, right):
    return float(np.abs(found - right).max() / np.abs(right).max())


def _cells(rank, group, names):
    """{(row, mode): outcome} of a group's rows in some modes, one after another where `group` is None."""
    found, one_by_one = {}, itertools.cycle(names)
    for row in ROWS if group is None else neighbours.GROUPS[group]:
        plain = _unpatched(row)
        for name in [next(one_by_one)] if group is None else names:
            _, options, later = MODES[name]
            try:
                found[row.text, name] = _outcome(row, options, later, *plain)
            except Exception as error:
                found[row.text, name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found


def _table(page):
    """{(row, mode): cell} of the page."""
    cells, header = {}, None
    for line in page.splitlines():
        if line.startswith("| "):
            first, *rest = [cell.strip() for cell in line.strip("|").split(" | ")]
            if header is None:
                header = rest
                continue
            cells.update({(first, mode): cell for mode, cell in zip(header, rest, strict=True)})
    return cells


def _write(found):
    """Put new outcomes into the page."""
    cells = _table(PAGE.read_text()) | found
    rows = [row.text for row in ROWS]
    lines = ["| | " + " | ".join(MODES) + " |", "|---|" + "---|" * len(MODES)]
    lines += [f"| {row} | " + " | ".join(cells.get((row, mode), "") for mode in MODES) + " |" for row in rows]
    table = "<!-- compatibility -->\n" + "\n".join(lines) + "\n<!-- /compatibility -->"
    before, _, rest = PAGE.read_text().partition("<!-- compatibility -->")
    PAGE.write_text(before + table + rest.partition("<!-- /compatibility -->")[2])


# Each row in one of the modes that two ranks share, in turn; and all of them.
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "world_size, group",
    [
        *((1, group) for group in neighbours.GROUPS),
        pytest.param(2, None, marks=pytest.mark.slow),
        *(pytest.param(2, group, marks=pytest.mark.exhaustive) for group in neighbours.GROUPS),
    ],
)
def test_compatibility(world_size, group):
    names = [name for name, (size, _, _) in MODES.items() if size == world_size]
    by_rank = ranks.run(world_size, _cells, group, names, timeout=400)
    assert all(found == by_rank[0] for found in by_rank), by_rank
    wrong = {place: cell for place, cell in by_rank[0].items() if cell != "works" and not cell.startswith("refused")}
    found = {place: cell.partition(":")[0] for place, cell in by_rank[0].items()}
    if os.environ.get("ASYNCDIFF_FAST_TABLES"):
        _write({place: "" if place in wrong else cell for place, cell in found.items()})
    assert not wrong, wrong
    written = _table(PAGE.read_text())
    assert found == {place: written.get(place) for place in found}, "run `make tables`"


def test_the_page_has_all_rows():
    assert list(_table(PAGE.read_text())) == [(row.text, mode) for row in ROWS for mode in MODES], "run `make tables`"
