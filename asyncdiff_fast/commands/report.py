"""What the demo measured: as JSON, as a table, and as a sheet of pictures."""

import json
import statistics

from . import compare


def psnr_db(picture, exact):
    """Peak signal-to-noise ratio of two pictures in 0..1; None if they are equal."""
    import torch

    mse = (picture - exact).square().mean()
    return (10 * torch.log10(1 / mse)).item() if mse > 0 else None


def figures(prompts, alone, together, stats, planned_bytes):
    """Dict of what was measured, fit for JSON.

    Args:
        alone, together: `Drawn` of each prompt, unpatched and patched.
        stats: for each rank a list of its denoisers' statistics.
        planned_bytes: what all ranks together send in an asynchronous call, by the plan.
    """
    unpatched, patched = _times(alone), _times(together)
    steps = sum(s["compute_calls"] + s["repeat_calls"] or s["exact_calls"] for s in stats[0])
    sent = sum(s.get("sent_bytes", 0) for rank in stats for s in rank)
    waits = [sum(s.get("wait_s", 0.0) for s in rank) for rank in stats]
    steady = (unpatched["step_s"], patched["step_s"])
    closeness = [psnr_db(b.picture, a.picture) for a, b in zip(alone, together, strict=True)]
    return {
        "unpatched": unpatched,
        "patched": patched,
        "speed_up": unpatched["seconds"] / patched["seconds"],
        "steady_speed_up": steady[0] / steady[1] if None not in steady else None,
        "bytes_per_step": sent / max(steps, 1),
        "planned_bytes_per_call": planned_bytes,
        "core_share": sum(d.core_s for d in alone) / unpatched["seconds"],
        "wait_s": waits,
        "wait_s_per_step": max(waits) / max(steps, 1),
        "psnr_db": statistics.median([c for c in closeness if c is not None] or [0.0]) or None,
        "pictures": [
            {"prompt": prompt, "unpatched_s": a.seconds, "patched_s": b.seconds, "psnr_db": c}
            for prompt, a, b, c in zip(prompts, alone, together, closeness, strict=True)
        ],
    }


def _times(drawn):
    seconds = [d.seconds for d in drawn]
    steps = [d.step_s for d in drawn if d.step_s is not None]
    return {
        "seconds": sum(seconds),
        "first_picture_s": seconds[0],
        "picture_s": statistics.median(seconds),
        "step_s": statistics.median(steps) if steps else None,
    }


def table(report):
    """The report as a table for people."""
    a, b = report["unpatched"], report["patched"]
    names = {
        "all pictures": ("seconds", 1, "s"),
        "first picture, plan included": ("first_picture_s", 1, "s"),
        "a picture, median": ("picture_s", 1, "s"),
        "a step after warm-up": ("step_s", 1e3, "ms"),
    }
    lines = [f"{'':30}{'unpatched':>12}{'patched':>12}{'speed-up':>10}"]
    for name, (key, scale, unit) in names.items():
        if a[key] is not None:
            cells = [f"{x[key] * scale:.2f} {unit}" for x in (a, b)]
            lines.append(f"{name:30}{cells[0]:>12}{cells[1]:>12}{a[key] / b[key]:>9.2f}x")
    share = report["wait_s_per_step"] / b["step_s"] if b["step_s"] else 0.0
    rows = {
        "bytes sent per step": f"{report['bytes_per_step'] / 1e3:.1f} kB",
        "exposed wait per step": f"{report['wait_s_per_step'] * 1e3:.2f} ms ({share:.0%}), on the rank that waits most",
        "difference, median": _decibels(report["psnr_db"]),
    }
    lines += [f"{name:30}  {value}" for name, value in rows.items()]
    if report["device"] == "cpu" and report["core_share"] < 0.9:
        lines.append(f"times say little: the one process got {report['core_share']:.0%} of a core; the machine is busy")
    return "\n".join(lines)


def _decibels(value):
    return "the same picture" if value is None else f"PSNR {value:.1f} dB"


def write(out, report, alone, together):
    """Write `report.json` and `compare.png` into the folder `out`, which is made if need be."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    config = report["options"]
    title = f"asyncdiff_fast: {_shares(config)} on {report['processes']} processes ({report['device']})"
    seconds = [report[way]["picture_s"] for way in ("unpatched", "patched")]
    subtitle = (
        f"{report['steps']} steps, {config['warmup_steps']} of them warm-up: a picture takes {seconds[0]:.2f} s "
        f"unpatched on one process, {seconds[1]:.2f} s patched"
    )
    rows = []
    for figures, a, b in zip(report["pictures"], alone, together, strict=True):
        note = f"unpatched {a.seconds:.2f} s\npatched {b.seconds:.2f} s\n{_decibels(figures['psnr_db'])}"
        rows.append((figures["prompt"], note, a.picture, b.picture))
    compare.sheet(title, subtitle, rows).save(out / "compare.png")


def _shares(options):
    """How a call is shared out, in words."""
    stride = f" with stride {options['stride']}" if options["stride"] > 1 else ""
    ways = {
        "two halves of guidance": options["cfg_parallel"],
        f"{options['num_patches']} patches": options["num_patches"] > 1,
        f"{options['num_stages']} stages{stride}": options["num_stages"] > 1,
    }
    return ", ".join(way for way, used in ways.items() if used) or "one process"
