"""What `tune` found, drawn: seconds against closeness, and the pictures of the best."""

import itertools
import math

from PIL import Image, ImageDraw, ImageFont

from .. import compare
from ..report import psnr_db

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 980, 470, 70, 56, 330, 50
_PAPER, _INK, _GREY, _GRID = (250, 250, 248), (28, 30, 36), (110, 115, 125), (222, 222, 218)
_COLOURS = ((31, 119, 180), (214, 96, 20), (44, 140, 60), (148, 83, 180), (190, 40, 60), (120, 90, 70), (20, 150, 160))
# At the top is the same picture, and what only rounding tells from it, from so many dB on.
_SAME_DB, _ROUNDING_DB = 6.0, 90.0


def drawn(found, prompts, exact):
    """PIL image of the plot and, below it, the pictures of the best three beside the exact ones.

    Args:
        found: `page.Found`.
        exact: the exact picture of each prompt.
    """
    plot, best = _plot(found), found.best_three
    if not best:
        return plot
    columns = [("exact", "one device"), *((t.name, f"{t.picture_s:.2f} s") for t in best)]
    rows = []
    for i, (prompt, picture) in enumerate(zip(prompts, exact, strict=True)):
        cells = [(picture, f"{found.alone_s:.2f} s")]
        for trial in best:
            mine = found.picture(trial, i)
            db = psnr_db(mine, picture)
            cells.append((mine, "the same" if db is None else f"PSNR\n{db:.1f} dB"))
        rows.append((prompt, cells))
    below = compare.sheet("The best three", [f"take: {found.line}".replace("…", "...")], columns, rows)
    whole = Image.new("RGB", (max(plot.width, below.width), plot.height + below.height), _PAPER)
    whole.paste(plot, (0, 0))
    whole.paste(below, (0, plot.height))
    return whole


def _plot(found):
    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    pen, trials = ImageDraw.Draw(canvas), found.drawn
    finite = [t.worst_db for t in trials if t.worst_db < _ROUNDING_DB] or [40.0]
    low, high = math.floor(min(finite) / 5) * 5, math.ceil(max(finite) / 5) * 5 + _SAME_DB
    most = max(t.picture_s for t in trials) * 1.05 if trials else 1.0

    def at_db(db):
        return _TOP + (high - db) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def at(trial):
        x = _LEFT + trial.picture_s / most * (_WIDTH - _LEFT - _RIGHT)
        return x, at_db(high if trial.worst_db >= _ROUNDING_DB else trial.worst_db)

    title = f"{found.args.nproc} processes, {found.args.steps} steps: seconds of a picture against its worst PSNR"
    pen.text((_LEFT, 14), title, _INK, _font(16))
    _axes(pen, most, low, high, at_db)
    if found.aim.max_seconds is None and low <= found.aim.min_psnr <= high:
        y = at_db(found.aim.min_psnr)
        pen.line((_LEFT, y, _WIDTH - _RIGHT, y), _COLOURS[4], 1)
    alone = sorted((t for t in trials if not t.is_shared and t.is_patched), key=lambda t: t.picture_s)
    for a, b in itertools.pairwise(alone):
        pen.line((*at(a), *at(b)), _GREY, 1)
    front = sorted((t for t in trials if t.name in found.front), key=lambda t: t.picture_s)
    for a, b in itertools.pairwise(front):
        pen.line((*at(a), *at(b)), _INK, 2)
    ways = list(dict.fromkeys(t.way for t in trials))
    for trial in trials:
        x, y = at(trial)
        colour = _GREY if not trial.is_shared else _COLOURS[ways.index(trial.way) % len(_COLOURS)]
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
        if trial.name in found.front:
            pen.ellipse((x - 8, y - 8, x + 8, y + 8), outline=_INK, width=2)
        if trial is found.chosen:
            pen.ellipse((x - 12, y - 12, x + 12, y + 12), outline=_COLOURS[4], width=2)
    for i, way in enumerate(ways):
        colour, y = _GREY if way == "one device" else _COLOURS[i % len(_COLOURS)], _TOP + 18 * i
        pen.ellipse((_WIDTH - _RIGHT + 20, y + 3, _WIDTH - _RIGHT + 30, y + 13), fill=colour)
        pen.text((_WIDTH - _RIGHT + 38, y), way.replace(",", ", "), _INK, _font(12))
    notes = ("black ring: Pareto front", "red ring: to take", "grey line: exact, fewer steps", "red line: wanted")
    for i, note in enumerate(notes):
        pen.text((_WIDTH - _RIGHT + 20, _TOP + 18 * len(ways) + 14 + 16 * i), note, _GREY, _font(12))
    return canvas


def _axes(pen, most, low, high, at_db):
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for db in range(int(low), int(high - _SAME_DB) + 1, 5 if high - low < 60 else 20):
        pen.line((_LEFT, at_db(db), right, at_db(db)), _GRID, 1)
        pen.text((_LEFT - 32, at_db(db) - 7), str(db), _GREY, _font(12))
    pen.text((_LEFT - 42, at_db(high) - 7), "same", _GREY, _font(12))
    unit = 10 ** math.floor(math.log10(most)) / 2
    for k in range(int(most / unit) + 1):
        x = _LEFT + k * unit / most * (right - _LEFT)
        pen.line((x, _TOP, x, bottom), _GRID, 1)
        pen.text((x - 10, bottom + 6), f"{k * unit:g}", _GREY, _font(12))
    pen.text((_LEFT, bottom + 26), "seconds of a picture; up: dB PSNR of the worst picture", _GREY, _font(12))


def _font(size):
    return ImageFont.load_default(size)
