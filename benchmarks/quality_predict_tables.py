"""What `quality_predict.py` writes: JSON, tables in Markdown, and a plot of error against speed-up."""

import json
import math

WIDTH, HEIGHT, MARGIN = 760, 460, 60
COLOURS = {"exact": "black", "none": "firebrick", "linear": "steelblue"}


def as_json(result):
    """JSON with one line per configuration."""
    head = json.dumps({k: v for k, v in result.items() if k != "rows"}, ensure_ascii=False)[:-1]
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in result["rows"].items())
    return f'{head},\n "rows": {{\n{lines}\n }}}}\n'


def kind(name):
    """exact, or the `predict` of a configuration."""
    return "exact" if name.startswith("exact") else name.partition("predict=")[2].partition("@")[0]


def as_markdown(result):
    """Every configuration beside its exact pictures; then what predictions bring; then equal latency."""
    heads = ["configuration", "PSNR dB, mean", "worst", "SSIM", "obeyed", "calls", "s per step"]
    lines = [result["title"], ""]
    lines += ["PSNR and SSIM against exact sampling of the same sampler and steps; exact ones against 50 steps DDIM."]
    lines += ["`calls`: those of the whole denoiser that a picture waits for, by counted work.", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in result["rows"].items():
        psnr = row["psnr_db"]
        cells = [f"`{name}`", f"{psnr['mean']:.1f} ({psnr['low']:.1f} to {psnr['high']:.1f})", f"{psnr['worst']:.1f}"]
        cells += [f"{row['ssim']['mean']:.4f}", f"{row['obedience']['all']['mean']:.2f}"]
        cells += [f"{row['latency_calls']:.1f}", f"{row['s_per_step']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *gains(result["rows"]), "", *equal_latency(result["rows"])]) + "\n"


def gains(rows):
    """How close reused inputs come and how close predicted ones, for every way, number of steps and sampler."""
    cells, runs = {}, []
    for name, row in rows.items():
        other = rows.get(name.replace("predict=linear", "predict=none"))
        if kind(name) != "linear" or other is None:
            continue
        way, _, run = name.replace(",predict=linear", "").partition("@")
        reused, ours = other["psnr_db"], row["psnr_db"]
        pairs = [f"{reused[key]:.1f} → {ours[key]:.1f}" for key in ("mean", "worst")]
        cells.setdefault(way, {})[run] = f"{pairs[0]} ({pairs[1]})"
        runs += [] if run in runs else [run]
    heads = [f"{run.replace('/', ' steps, ')}{'' if '/' in run else ' steps, DDIM'}" for run in runs]
    lines = [f"| PSNR dB, `none` → `linear`, mean (worst) | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    lines += [f"| `{way}` | {' | '.join(of.get(run, '') for run in runs)} |" for way, of in cells.items()]
    return lines


def exact_as_long(rows, row):
    """The name of exact sampling of the fewest steps that takes as many calls as `row` or more; None if none does."""
    exact = {name: other for name, other in rows.items() if kind(name) == "exact" and other.get("latency_calls")}
    longer = {
        other["latency_calls"]: name
        for name, other in exact.items()
        if other["reference"] == row.get("reference") and other["latency_calls"] >= row.get("latency_calls", math.inf)
    }
    return longer[min(longer)] if longer else None


def equal_latency(rows):
    """Each way of 50 steps beside exact sampling of the fewest steps that take as long or longer."""
    lines = [
        "| 50 steps DDIM | calls | PSNR dB | exact with as many calls or more | PSNR dB |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        fewest = exact_as_long(rows, row)
        if kind(name) == "exact" or not name.endswith("@50") or fewest is None:
            continue
        cells = [f"{row['latency_calls']:.1f}", f"{row['psnr_db']['mean']:.1f}", f"`{fewest}`"]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {rows[fewest]['psnr_db']['mean']:.1f} |")
    return lines


def as_plot(result):
    """An SVG: error of the pictures (dB below the signal, so lower is better) against speed-up over 50 exact steps.

    Only what is compared with 50 steps DDIM; a line joins what nothing else beats in both.
    """
    rows = {n: r for n, r in result["rows"].items() if r["reference"] == "exact@50" and n != "exact@50"}
    points = {n: (50 / r["latency_calls"], -r["psnr_db"]["mean"]) for n, r in rows.items()}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="20" font-size="12">Error of pictures (−PSNR, dB) against speed-up by counted work, '
        "50 steps DDIM</text>",
    ]
    if points:
        lines += _drawn(points)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _drawn(points):
    low, high = (f(error for _, error in points.values()) for f in (min, max))
    fastest = math.ceil(max(speed for speed, _ in points.values()))

    def place(point):
        x = MARGIN + (point[0] - 1) / max(fastest - 1, 1) * (WIDTH - 5 * MARGIN)
        return x, HEIGHT - MARGIN - (point[1] - low) / max(high - low, 1) * (HEIGHT - 2 * MARGIN)

    lines = [f'<path d="M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" stroke="gray" fill="none"/>']
    for speed in range(1, fastest + 1):
        lines.append(f'<text x="{place((speed, low))[0]:.0f}" y="{HEIGHT - MARGIN + 16}">{speed}×</text>')
    for error in range(math.ceil(low / 5) * 5, math.floor(high / 5) * 5 + 1, 5):
        lines.append(f'<text x="{MARGIN - 30}" y="{place((1, error))[1]:.0f}">{error}</text>')
    front = [p for p in sorted(points.values()) if not any(q[0] >= p[0] and q[1] < p[1] for q in points.values())]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, front))
    lines.append(f'<path d="M{path}" stroke="lightgray" fill="none"/>')
    for name, point in points.items():
        x, y = place(point)
        label = name.replace("num_", "").replace(",warmup_steps=3", "").replace("predict=", "").removesuffix("@50")
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[kind(name)]}"/>')
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 3:.1f}">{label}</text>')
    return lines
