"""One step as a picture: a lane for each rank with what it computes and where it waits, below it what is under way."""

import statistics

from PIL import Image, ImageDraw, ImageFont

from .account import levels, use
from .intervals import common
from .turns import steady, turns
from .words import MICRO, SITE, UNIT

_WIDTH, _LEFT, _RIGHT, _TOP = 1200, 70, 24, 92
_LANE, _CURVE, _GAP = 34, 26, 34
_INK, _GREY, _PAPER = (28, 30, 36), (110, 115, 125), (250, 250, 248)
_COMPUTE, _WAIT, _HOST, _BYTES = (74, 122, 183), (214, 92, 74), (222, 222, 218), (226, 170, 62)
# Of the picture's width: what is shown before and after the step.
_AROUND = 0.02
_LABEL_WIDTH = 46


def step(traces, messages):
    """The picture of a steady step, or block, of middle length. Returns: PIL image, RGB.

    Args:
        traces: [`RankTrace`], with at least one step each.
        messages: [`Message`] of them all.
    """
    chosen = _middle(steady(turns(traces[0])))
    around = _AROUND * (chosen.end - chosen.begin)
    view = _View(chosen.begin - around, chosen.end + around)
    lanes = [_lane_parts(trace, view) for trace in traces]
    most = max((level for m in (levels(messages, t.rank) for t in traces) for _, level in m), default=0)
    canvas = Image.new("RGB", (_WIDTH, _TOP + len(traces) * (_LANE + _CURVE + _GAP) + 22), _PAPER)
    pen = ImageDraw.Draw(canvas)
    kind = f"a block of {chosen.steps} steps" if chosen.steps > 1 else "one step"
    pen.text((_LEFT, 12), f"{kind}, {(chosen.end - chosen.begin) / 1e3:.2f} ms, {len(traces)} ranks", _INK, _font(17))
    _legend(pen, most)
    for i, (trace, parts) in enumerate(zip(traces, lanes, strict=True)):
        top = _TOP + i * (_LANE + _CURVE + _GAP)
        pen.text((12, top + _LANE // 2 - 8), f"rank {trace.rank}", _INK, _font(13))
        _lane(pen, top, parts, view)
        _curve(pen, top + _LANE + 4, levels(messages, trace.rank), most, view)
    _axis(pen, _TOP + len(traces) * (_LANE + _CURVE + _GAP) - 20, chosen, view)
    return canvas


class _View:
    """Which times are seen, and where they lie."""

    def __init__(self, begin, end):
        self.begin, self.end = begin, end

    def x(self, time):
        """Pixels from the left."""
        inside = (min(max(time, self.begin), self.end) - self.begin) / (self.end - self.begin)
        return _LEFT + inside * (_WIDTH - _LEFT - _RIGHT)


def _middle(found):
    """The turn of middle length, of those that have the most steps."""
    most = max(t.steps for t in found)
    whole = [t for t in found if t.steps == most]
    middle = statistics.median_low([t.end - t.begin for t in whole])
    return next(t for t in whole if t.end - t.begin == middle)


def _lane_parts(trace, view):
    """(times of computing, [(begin, end, slot)] of waits, [(begin, end, name)] of what is named and computed)."""
    window, used = [(view.begin, view.end)], use(trace)
    compute = common(used.compute, window)
    waits = [(*common([(b, e)], window)[0], slot) for b, e, slot, _ in used.waits if common([(b, e)], window)]
    # Of ranges within each other the outer ones; waits have names of their own.
    outer = []
    for r in trace.ranges:
        if r.kind in (UNIT, MICRO, SITE) and (not outer or r.begin >= outer[-1].end):
            outer.append(r)
    names = [(r.begin, r.end, r.what if r.kind != MICRO else f"micro-step {r.what}") for r in outer]
    long = [w for w in waits if view.x(w[1]) - view.x(w[0]) > _LABEL_WIDTH]
    return compute, waits, [n for n in names if not common([n[:2]], [w[:2] for w in long])]


def _lane(pen, top, parts, view):
    compute, waits, names = parts
    pen.rectangle((_LEFT, top, _WIDTH - _RIGHT, top + _LANE), _HOST)
    for begin, end in compute:
        pen.rectangle((view.x(begin), top, max(view.x(end), view.x(begin)), top + _LANE), _COMPUTE)
    for begin, end, _ in waits:
        pen.rectangle((view.x(begin), top, view.x(end), top + _LANE), _WAIT)
    for begin, end, name in (*names, *((b, e, f"waits: {slot}") for b, e, slot in waits)):
        left, right = view.x(begin), view.x(end)
        if right - left > _LABEL_WIDTH:
            pen.text((left + 2, top - 15), _fitting(pen, name, right - left - 4), _GREY, _font(11))


def _curve(pen, top, found, most, view):
    pen.line((_LEFT, top + _CURVE, _WIDTH - _RIGHT, top + _CURVE), _GREY)
    for (time, level), (later, _) in zip(found, [*found[1:], (view.end, 0)], strict=False):
        if level and later > view.begin and time < view.end:
            pen.rectangle((view.x(time), top + _CURVE - _CURVE * level / most, view.x(later), top + _CURVE), _BYTES)


def _legend(pen, most):
    x = _LEFT
    shown = ((_COMPUTE, "computes"), (_WAIT, "waits for another rank"), (_HOST, "neither: the host's own work"))
    for colour, words in (*shown, (_BYTES, f"posted and not yet awaited, at most {_size(most)}")):
        pen.rectangle((x, 46, x + 14, 60), colour)
        pen.text((x + 20, 45), words, _GREY, _font(12))
        x += 20 + pen.textlength(words, _font(12)) + 28


def _axis(pen, y, chosen, view):
    whole = (chosen.end - chosen.begin) / 1e3
    for i in range(5):
        time = chosen.begin + (chosen.end - chosen.begin) * i / 4
        words = f"{whole * i / 4:.2f} ms"
        pen.line((view.x(time), y, view.x(time), y + 5), _GREY)
        pen.text((view.x(time) - pen.textlength(words, _font(12)) / 2, y + 8), words, _GREY, _font(12))


def _fitting(pen, words, width):
    while words and pen.textlength(words, _font(11)) > width:
        words = words[:-1]
    return words


def _size(nbytes):
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def _font(size):
    return ImageFont.load_default(size)
