"""The page on steps side by side lists the samplers that are tested, and what each of them does."""

import re
from pathlib import Path

import diffusers
from test_samplers import EXACT, SIDE_BY_SIDE

from asyncdiff_fast.steps.unable import why_not

PAGE = Path(__file__).resolve().parents[2] / "docs" / "steps.md"


def table():
    """What stands between the marks."""
    lines = ["| sampler | class | options | steps |", "| --- | --- | --- | --- |"]
    for name, (kind, options) in (SIDE_BY_SIDE | EXACT).items():
        given = f"`{', '.join(f'{key}={value!r}' for key, value in options.items())}`" if options else ""
        reason = why_not(getattr(diffusers, kind)(**options))
        how = "side by side" if reason is None else f"exact: {reason.removeprefix(f'{kind} ')}"
        lines.append(f"| {name} | `{kind}` | {given} | {how} |")
    return "\n".join(lines)


def test_the_page_lists_the_samplers_that_are_tested():
    found = re.search(r"<!-- samplers -->\n(.*?)\n?<!-- /samplers -->", PAGE.read_text(), re.DOTALL)
    assert found and found[1] == table(), f"put this between the marks of {PAGE.name}:\n{table()}"


def test_what_the_page_calls_exact_is_what_is_tested_to_be():
    text = table().splitlines()[2:]
    assert [line.endswith("side by side |") for line in text] == [True] * len(SIDE_BY_SIDE) + [False] * len(EXACT)
