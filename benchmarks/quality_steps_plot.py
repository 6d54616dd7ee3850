"""The plot that `quality_steps.py` writes: how close pictures come by the calls that they wait for, every mode."""

import math

from quality_steps_tables import is_steps, of_steps, way

REFERENCE = "exact@50"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 560, 60, 170, 50, 60
# Width of a letter.
LETTER = 5.4
# Where the axis of calls begins.
FIRST = 5
HALO = 'stroke="white" stroke-width="2" paint-order="stroke"'
# {mode: (colour, what the number beside a point is)}
MODES = {
    "steps side by side": ("forestgreen", "ranks, tolerance"),
    "stages, predicted": ("steelblue", "stages"),
    "stages, as published": ("mediumpurple", "stages"),
    "patches, predicted": ("darkorange", "patches"),
    "patches, as published": ("peru", "patches"),
    "through stages, predicted": ("crimson", "stages × patches"),
    "through stages, as published": ("palevioletred", "stages × patches"),
    "exact with fewer steps": ("black", "steps"),
}


def as_plot(*results):
    """An SVG: mean PSNR against sequential calls, with a thin line down to the worst picture; 50 steps DDIM."""
    rows = {name: row for result in reversed(results) for name, row in result["rows"].items()}
    points = {
        name: (row["latency_calls"], row["psnr_db"]["mean"], row["psnr_db"]["worst"])
        for name, row in rows.items()
        if row["reference"] == REFERENCE and name.partition(" ")[0] != REFERENCE
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="13">Closeness to the exact picture of 50 steps DDIM, by the calls that a '
        "picture waits for</text>",
        f'<text x="{LEFT}" y="36">PSNR in dB: points are means, their thin lines go down to the worst picture</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 14}">calls of the whole denoiser, one after the other</text>',
    ]
    if points:
        lines += _drawn(points)
    return "\n".join([*lines, "</svg>"]) + "\n"


def mode(name):
    """What a configuration is, as `MODES` has it."""
    if is_steps(name):
        return "steps side by side"
    if name.startswith("exact"):
        return "exact with fewer steps"
    what = "stages" if name.startswith("num_stages") else "patches"
    if "pipeline_patches" in name:
        what = "through stages"
    return f"{what}, {'predicted' if 'predict=linear' in name else 'as published'}"


def colour(name):
    """Of a configuration's mode."""
    return MODES[mode(name)][0]


def label(name):
    """What stands beside a point."""
    if is_steps(name):
        ranks, tolerance = of_steps(name)
        return f"{ranks}, {tolerance}"
    if name.startswith("exact"):
        return name.partition("@")[2].partition(" ")[0]
    options = way(name).split(",")
    if mode(name).startswith("through stages"):
        return " × ".join(option.partition("=")[2] for option in options[:2])
    return options[0].partition("=")[2] + (", stride 2" if "stride=2" in options else "")


def _drawn(points):
    most = math.ceil(max(calls for calls, _, _ in points.values()) / 5) * 5
    low = math.floor(min(worst for _, _, worst in points.values()) / 5) * 5
    high = math.ceil(max(mean for _, mean, _ in points.values()) / 5) * 5

    def place(calls, psnr):
        x = LEFT + (calls - FIRST) / (most - FIRST) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - (psnr - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    lines = [f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="gray" fill="none"/>']
    for calls in range(FIRST, most + 1, 5):
        lines.append(
            f'<text x="{place(calls, low)[0]:.0f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{calls}</text>'
        )
    for psnr in range(low, high + 1, 10 if high - low > 40 else 5):
        lines.append(f'<text x="{LEFT - 24}" y="{place(FIRST, psnr)[1] + 3:.0f}">{psnr}</text>')
    exact = sorted(point[:2] for name, point in points.items() if mode(name) == "exact with fewer steps")
    if exact:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in exact))
        lines.append(f'<path d="M{path}" stroke="gray" stroke-dasharray="3 3" fill="none"/>')
    for name, (calls, mean, worst) in points.items():
        x, y = place(calls, mean)
        path = f"M{x:.1f} {y:.1f}V{place(calls, worst)[1]:.1f}"
        lines.append(f'<path d="{path}" stroke="{colour(name)}" stroke-width="0.7"/>')
    dots = {name: place(*point[:2]) for name, point in points.items()}
    for name, (x, y) in placed(dots).items():
        lines.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour(name)}" {HALO}>{label(name)}</text>')
    for name, (x, y) in dots.items():
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour(name)}"/>')
    return lines + _legend()


def placed(dots):
    """Where labels begin: right of their dots, or elsewhere around them if there is something already."""
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in dots.values()]
    found = {}
    for name, (x, y) in dots.items():
        width = LETTER * len(label(name))
        places = [(x + 6, y + 3), (x - 6 - width, y + 3), (x + 4, y - 6), (x + 4, y + 13)]
        boxes = [(left, base - 8, left + width, base + 1) for left, base in places]
        free = [number for number, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken)]
        chosen = free[0] if free else 0
        found[name] = places[chosen]
        taken.append(boxes[chosen])
    return found


def _overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _legend():
    lines = []
    for number, (name, (paint, what)) in enumerate(MODES.items()):
        y = TOP + 10 + 28 * number
        lines.append(f'<circle cx="{WIDTH - RIGHT + 26}" cy="{y - 3}" r="4" fill="{paint}"/>')
        lines.append(f'<text x="{WIDTH - RIGHT + 34}" y="{y}">{name}</text>')
        lines.append(f'<text x="{WIDTH - RIGHT + 34}" y="{y + 11}" fill="gray">number: {what}</text>')
    return lines
