"""Rows of end_to_end.jsonl as the cells of tables."""

import json

import measure


def latest():
    """The latest row of each model, number of ranks, set of options and way to exchange."""
    found = {}
    for row in measure.read_rows("end_to_end"):
        row.setdefault("exchange", "torch.distributed")
        found[row["model"], row["nproc"], json.dumps(row["options"]), row["exchange"]] = row
    return list(found.values())


def as_patched(passing=False):
    """Those of `latest` that travel as `patch` chooses by itself; `passing`: with patches that pass through stages."""
    own = [row for row in latest() if row["exchange"] != "torch.distributed"]
    return [row for row in own if ("pipeline_patches" in row["options"]) == passing]


def machine(row):
    """Where and when a row was measured."""
    return ", ".join(x for x in (row["device"], f"torch {row['torch']}", row["exchange"], row["date"]) if x)


def whole(row):
    """Speed-up of a whole picture, and that over one device which is patched too, where it was timed."""
    over = row.get("whole_speedup_over_patched")
    return f"{row['whole_speedup']:.2f}×" + ("" if over is None else f"; over one patched device {over:.2f}×")


def pipelined():
    """(header, rows) of patches that pass through stages, beside what their micro-steps allow."""
    header = [
        "denoiser",
        "stages × patches",
        "s per call alone",
        "s per call",
        "speed-up (rounds)",
        "by micro-steps",
    ]
    header += ["share of it", "exposed wait", "MB per call, planned and sent"]
    body = []
    for row in as_patched(passing=True):
        body.append(
            [
                row["model"],
                f"{row['options']['num_stages']} × {row['options']['pipeline_patches']}"
                + (", `run_ahead`" if row["options"].get("run_ahead") else ""),
                f"{row['call_s_alone']:.2f}",
                f"{row['call_s']:.2f}",
                f"{row['speedup']:.2f}× (" + ", ".join(f"{x:.2f}" for x in row["speedups"]) + ")",
                f"{row['ideal_speedup']:.2f}×",
                f"{row['share_of_ideal']:.0%}",
                f"{row['exposed_wait_share']:.1%}",
                f"{row['bytes_per_call'] / 1e6:.2f}",
            ]
        )
    return header, body


def cells(rows):
    """(header, rows) of everything that is reported of each row."""
    header = ["denoiser", "ranks: options", "s per call alone", "s per call", "speed-up of a call", "exposed wait"]
    header += ["MB per call", f"whole picture of {rows[0]['whole_steps']} steps", "peak memory, MB", "machine"]
    body = []
    for row in rows:
        body.append(
            [
                row["model"],
                f"{row['nproc']}: " + ", ".join(f"{k}={v}" for k, v in row["options"].items()),
                f"{row['call_s_alone']:.3f}",
                f"{row['call_s']:.3f}",
                f"{row['speedup']:.2f}×",
                f"{row['exposed_wait_share']:.1%}",
                f"{row['bytes_per_call'] / 1e6:.2f}",
                whole(row),
                " / ".join(f"{m:.0f}" for m in row["peak_rss_mb"]),
                machine(row),
            ]
        )
    return header, body
