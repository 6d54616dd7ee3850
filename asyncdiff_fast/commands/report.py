"""What the demo measured: as JSON, as a table, and as a sheet of pictures."""

import contextlib
import json
import statistics
from dataclasses import asdict

from ..config import Config
from . import compare
from .launch import as_text

# What ranks say to each other and do in Python takes milliseconds a step.
SHORT_STEP_S = 0.1


def psnr_db(picture, exact):
    """Peak signal-to-noise ratio of two pictures in 0..1; None if they are equal."""
    import torch

    mse = (picture - exact).square().mean()
    return (10 * torch.log10(1 / mse)).item() if mse > 0 else None


def ssim(picture, exact):
    """Structural similarity of two pictures (3, h, w) in 0..1: mean over 7x7 windows and channels.

    Source: Wang et al., 2004, with uniform windows and unbiased variances.
    """
    from torch.nn.functional import avg_pool2d

    side, c1, c2 = min(7, *picture.shape[-2:]), 0.01**2, 0.03**2
    unbiased = side * side / max(side * side - 1, 1)

    def mean(x):
        return avg_pool2d(x, side, 1)

    a, b = picture.double(), exact.double()
    ma, mb = mean(a), mean(b)
    va, vb, vab = (
        unbiased * (mean(x * y) - mx * my) for x, y, mx, my in ((a, a, ma, ma), (b, b, mb, mb), (a, b, ma, mb))
    )
    found = (2 * ma * mb + c1) * (2 * vab + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return found.mean().item()


def name(options):
    """How a picture is shared out, in words."""
    stride = f" with stride {options['stride']}" if options["stride"] > 1 else ""
    ways = {
        f"{options['parallel_steps']} steps side by side": options["parallel_steps"] > 1,
        "two halves of guidance": options["cfg_parallel"],
        f"{options['num_patches']} patches": options["num_patches"] > 1,
        f"{options['num_stages']} stages{stride}": options["num_stages"] > 1,
        "patches that pass through them": options["pipeline_patches"] is not None,
    }
    return ", ".join(way for way, used in ways.items() if used) or "one process"


def figures(prompts, steps, alone, modes):
    """Dict of what was measured, fit for JSON.

    Args:
        steps: of each picture.
        alone: `Drawn` of each prompt, unpatched.
        modes: `Mode`s: the same prompts, patched.
    """
    unpatched = _times(alone)
    closeness = [[psnr_db(b.picture, a.picture) for a, b in zip(alone, m.drawn, strict=True)] for m in modes]
    pictures = [
        {
            "prompt": prompt,
            "unpatched_s": alone[i].seconds,
            "modes": [
                {"seconds": mode.drawn[i].seconds, "psnr_db": close[i]}
                for mode, close in zip(modes, closeness, strict=True)
            ],
        }
        for i, prompt in enumerate(prompts)
    ]
    return {
        "unpatched": unpatched,
        "core_share": sum(d.core_s for d in alone) / sum(d.seconds for d in alone),
        "modes": [_mode(unpatched, mode, close, steps) for mode, close in zip(modes, closeness, strict=True)],
        "pictures": pictures,
    }


def _mode(unpatched, mode, closeness, steps):
    """What one mode took, sent and missed. What is said of a step is the mean of all, warm-up included."""
    times, options = _times(mode.drawn), asdict(mode.config)
    found = [stats for rank in mode.stats for stats in rank]
    steps *= len(mode.drawn)
    waits = [sum(s.get("wait_s", 0.0) for s in rank) for rank in mode.stats]
    return {
        "name": name(options),
        "options": options,
        **times,
        "speed_up": _ratio(unpatched, times, "picture_s"),
        "steady_speed_up": _ratio(unpatched, times, "step_s"),
        "bytes_per_step": sum(s.get("sent_bytes", 0) for s in found) / steps,
        "planned_bytes_per_call": mode.planned_bytes,
        "wait_s": waits,
        "wait_s_per_step": max(waits) / steps,
        "wait_share": max(waits) / sum(d.seconds for d in mode.drawn),
        "psnr_db": statistics.median([c for c in closeness if c is not None] or [0.0]) or None,
        "side_by_side": mode.stats[0][0].get("steps"),
    }


def _times(drawn):
    steps = [d.step_s for d in drawn if d.step_s is not None]
    return {
        "picture_s": statistics.median(d.seconds for d in drawn),
        "first_picture_s": drawn[0].seconds,
        "step_s": statistics.median(steps) if steps else None,
    }


def _ratio(unpatched, times, key):
    return None if None in (unpatched[key], times[key]) else unpatched[key] / times[key]


def table(report):
    """The report as a table for people."""
    first, modes = report["unpatched"], report["modes"]
    rows = [("", "unpatched", *(m["name"] for m in modes))]
    for text, key in (("a picture, median", "picture_s"), ("first picture, plan included", "first_picture_s")):
        rows.append((text, *(f"{x[key]:.2f} s" for x in (first, *modes))))
    rows.append(("a step after warm-up", *(_milliseconds(x["step_s"]) for x in (first, *modes))))
    for text, key in (("speed-up of a picture", "speed_up"), ("speed-up of a step", "steady_speed_up")):
        rows.append((text, "", *("" if m[key] is None else f"{m[key]:.2f}x" for m in modes)))
    rows.append(("bytes sent per step", "", *(f"{m['bytes_per_step'] / 1e3:.1f} kB" for m in modes)))
    rows.append(("exposed wait per step", "", *(_wait(m) for m in modes)))
    rows.append(("difference, median", "", *(_decibels(m["psnr_db"]) for m in modes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{row[0]:{widths[0]}}" + "".join(f"  {x:>{w}}" for x, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    if report["device"] == "cpu" and report["core_share"] < 0.9:
        lines.append(f"times say little: the one process got {report['core_share']:.0%} of a core; the machine is busy")
    if report["device"] == "cpu" and first["step_s"] is not None and first["step_s"] < SHORT_STEP_S:
        lines.append(
            f"a step takes {_milliseconds(first['step_s'])} alone; where it takes longer more is gained: "
            "benchmarks/end_to_end.py measures a denoiser that is large"
        )
    return "\n".join(lines)


def _milliseconds(seconds):
    return "" if seconds is None else f"{seconds * 1e3:.2f} ms"


def _wait(mode):
    return f"{_milliseconds(mode['wait_s_per_step'])} ({mode['wait_share']:.0%})"


def _decibels(value):
    return "the same picture" if value is None else f"PSNR {value:.1f} dB"


def write(out, report, alone, modes):
    """Write `report.json` and `compare.png` into the folder `out`, which is made if need be."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    _sheet(report, alone, modes).save(out / "compare.png")


def _sheet(report, alone, modes):
    title = f"asyncdiff_fast: the same pictures by one process and shared by {report['processes']} ({report['device']})"
    medians = [
        f"{m['name']} {m['picture_s']:.2f} s, {m['speed_up']:.2f}x, {_decibels(m['psnr_db'])}" for m in report["modes"]
    ]
    first = f"medians of a picture of {report['steps']} steps: unpatched {report['unpatched']['picture_s']:.2f} s"
    small = f"below each picture its difference from the unpatched one x {compare.DIFFERENCE_GAIN}"
    columns = [("unpatched", "one process"), *((name(asdict(m.config)), changed(m.config)) for m in modes)]
    rows = []
    for i, figures in enumerate(report["pictures"]):
        cells = [(alone[i].picture, f"{alone[i].seconds:.2f} s")]
        for mode, one in zip(modes, figures["modes"], strict=True):
            # One word below the other: there is room for few.
            text = f"{one['seconds']:.2f} s\n{_decibels(one['psnr_db']).replace(' ', chr(10), 1)}"
            cells.append((mode.drawn[i].picture, text))
        rows.append((figures["prompt"], cells))
    return compare.sheet(title, [first, *medians, small], columns, rows)


def changed(config):
    """The options that one would write for this `Config`, as text."""
    options = asdict(config)
    for name in list(options):
        rest = {key: value for key, value in options.items() if key != name}
        with contextlib.suppress(ValueError):
            if Config.from_options(rest) == config:
                options = rest
    return as_text(options).replace(",", ", ")
