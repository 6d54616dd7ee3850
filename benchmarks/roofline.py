"""Rows of an op's benchmark as a table and a picture: how near to the device's ceiling, how far from the baselines."""

import json
import statistics

import measure

ROW_HEIGHT, LABEL_WIDTH, BAR_WIDTH = 14, 330, 420
# What a share is of.
CEILINGS = {"share_of_copy": "copy bandwidth", "share_of_matmul": "matmul rate"}


def latest(name):
    """The newest row of each key on the device measured last, in the order of measuring; [] if there is no file."""
    path = measure.RESULTS / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if "error" not in row]
    return list({json.dumps(row["key"]): row for row in rows if row["device"] == rows[-1]["device"]}.values())


def by_setting(rows):
    """Setting (the key without op and shape, as a tuple of its items) → shape → op → row."""
    settings = {}
    for row in rows:
        key = dict(row["key"])
        op, shape = key.pop("op"), tuple(key.pop("shape"))
        settings.setdefault(tuple(key.items()), {}).setdefault(shape, {})[op] = row
    return settings


def table_cells(rows, own, baselines, share="share_of_copy"):
    """Header and lines: per setting, over its shapes, the time, the share of a ceiling and the speed-ups."""
    names = [name for name, _ in next(iter(by_setting(rows)))]
    header = [*names, "shapes", "µs", f"share of {CEILINGS[share]}", *(f"× {baseline}" for baseline in baselines)]
    lines = []
    for setting, shapes in by_setting(rows).items():
        own_rows = [ops[own] for ops in shapes.values() if own in ops]
        if not own_rows:
            continue
        line = [*(value for _, value in setting), len(own_rows)]
        line.append(_range([row["median_s"] * 1e6 for row in own_rows], ".1f"))
        line.append(_range([row[share] for row in own_rows], ".0%"))
        for baseline in baselines:
            pairs = [ops for ops in shapes.values() if own in ops and baseline in ops]
            line.append(_range([ops[baseline]["median_s"] / ops[own]["median_s"] for ops in pairs], ".1f"))
        lines.append(line)
    return header, lines


def picture(rows, own, title, ceiling="share_of_copy"):
    """An SVG: one bar a shape, the share of a ceiling that `own` reaches, 20th to 80th percentile as a line."""
    rows = [row for row in rows if row["key"]["op"] == own]
    height = (len(rows) + 3) * ROW_HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABEL_WIDTH + BAR_WIDTH + 60}" height="{height}" '
        'font-family="sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="4" y="{ROW_HEIGHT}" font-size="12">{title}</text>',
    ]
    for idx, row in enumerate(rows, 2):
        y, x = idx * ROW_HEIGHT, LABEL_WIDTH
        label = ", ".join(str(value) for name, value in row["key"].items() if name != "op")
        share = row[ceiling]
        spread = [x + BAR_WIDTH * share * row["median_s"] / row[end] for end in ("p80_s", "p20_s")]
        lines += [
            f'<text x="4" y="{y}">{label}</text>',
            f'<rect x="{x}" y="{y - 9}" width="{BAR_WIDTH * share:.1f}" height="10" fill="steelblue"/>',
            f'<path d="M{spread[0]:.1f} {y - 4}H{spread[1]:.1f}" stroke="black"/>',
            f'<text x="{x + BAR_WIDTH * share + 6:.1f}" y="{y}">{share:.0%}</text>',
        ]
    x = LABEL_WIDTH + BAR_WIDTH
    lines += [f'<path d="M{x} {ROW_HEIGHT}V{height}" stroke="gray" stroke-dasharray="3"/>', "</svg>"]
    return "\n".join(lines) + "\n"


def _range(values, form):
    """Smallest, median and largest, or nothing."""
    if not values:
        return ""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})" if len(values) > 1 else f"{middle:{form}}"
