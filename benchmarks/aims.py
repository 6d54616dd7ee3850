"""Which options for which hardware and aim: data, and the committed results that each row reads."""

from typing import NamedTuple

import measure
import quality_predict_tables
import speed_tables

EXACT = "exact to rounding (tests)"
UNMEASURED = "not measured"


class Aim(NamedTuple):
    """One row of the table.

    `time` and `traffic` are (ranks, options but for warmup_steps) of a row of end_to_end.jsonl: where the speed-up and
    the MB of a call come from. `closeness` is (NAME of results/NAME.json, its row), or words.
    """

    aim: str
    options: str
    costs: str
    time: tuple[int, dict] | None = None
    traffic: tuple[int, dict] | None = None
    closeness: tuple[str, str] | str = UNMEASURED


ALONE = (1, {"kernels": "auto", "num_stages": 1})
HALVES = (2, {"cfg_parallel": True})
STAGES = (2, {"num_stages": 2, "predict": "linear"})
PATCHES = (2, {"num_patches": 2})
STEPS = (2, {"tolerance": 1e8, "parallel_steps": 2})

# Ways to share a call, each of which was drawn with reused inputs and with predicted ones.
BOTH = ("num_stages=2,stride=1", "num_stages=3,stride=1", "num_stages=4,stride=1", "num_patches=2", "num_patches=4")

SIDE_BY_SIDE = Aim(
    "two devices", "parallel_steps=2", "predicted latents: more calls where predictions fail", STEPS, STEPS,
    ("quality_steps", "parallel_steps=2,tolerance=0.014@50"),
)  # fmt: skip
SLOW_LINK = "slow link between two"

# The closeness of the default `tolerance`, and of `predict="auto"`: "linear" for stages and two patches, "none" for
# more patches.
FIRST = (
    Aim(
        "one device", "none",
        "on a GPU calls are captured; on CPU, weights of layers with few pixels are kept twice", ALONE, ALONE, EXACT,
    ),
    Aim("two devices, guidance", "cfg_parallel=True", "needs guidance", HALVES, HALVES, EXACT),
    SIDE_BY_SIDE,
    Aim(
        "two devices", "num_stages=2", "stale inputs, predicted: one buffer more for each", STAGES, STAGES,
        ("quality_predict", "num_stages=2,stride=1,warmup_steps=3,predict=linear@50"),
    ),
    Aim(
        "two devices", "num_patches=2", "as for stages; sends more; timed with reused inputs", PATCHES, PATCHES,
        ("quality_predict", "num_patches=2,warmup_steps=3,predict=linear@50"),
    ),
    Aim(
        "four devices", "parallel_steps=4", "predicted latents: more calls where predictions fail",
        closeness=("quality_steps", "parallel_steps=4,tolerance=0.014@50"),
    ),
    Aim(
        "memory too small", "num_stages=2, pipeline_patches=4, shard_weights=True",
        "devices wait while a call fills and drains the stages",
        closeness=("quality_pipelined", "num_stages=2,pipeline_patches=4,warmup_steps=3,predict=none@50"),
    ),
)  # fmt: skip
MORE = (
    Aim(
        "two devices, the exact picture", 'num_patches=2, exchange="sync"', "layers wait for the other rank",
        closeness=("quality_patches", "num_patches=2,exchange=sync,warmup_steps=1@50"),
    ),
    Aim("four devices, guidance", "cfg_parallel=True, num_stages=2", "needs guidance; stale inputs, predicted"),
    Aim(
        "four devices", "num_stages=4", "stale inputs pass through more devices",
        closeness=("quality_predict", "num_stages=4,stride=1,warmup_steps=3,predict=linear@50"),
    ),
    Aim(
        "four devices, fewest calls", "num_stages=3, stride=2", "each call serves two steps",
        closeness=("quality_predict", "num_stages=3,stride=2,warmup_steps=3,predict=linear@50"),
    ),
    Aim(
        "four devices", "num_patches=4", "stale inputs, reused",
        closeness=("quality_predict", "num_patches=4,warmup_steps=3,predict=none@50"),
    ),
    Aim("slow link between two, guidance", "cfg_parallel=True", "needs guidance", None, HALVES, EXACT),
    SIDE_BY_SIDE._replace(aim=SLOW_LINK, time=None),
    Aim(
        SLOW_LINK, "num_stages=2", "stale inputs, predicted", None, STAGES,
        ("quality_predict", "num_stages=2,stride=1,warmup_steps=3,predict=linear@50"),
    ),
    Aim("very large pictures", "num_patches=2", "the first call of a size takes as long and as much as on one device"),
)  # fmt: skip


def cells(aims):
    """(header, rows) of the table."""
    header = ["hardware and aim", "options", "speed-up of a call", "MB a call", "PSNR dB", "calls in sequence, of 50"]
    header += ["exact sampling at equal cost", "what it costs"]
    times, rows = speed_tables.as_patched(), []
    for aim in aims:
        time, traffic = timed(times, aim.time), timed(times, aim.traffic)
        speed = f"{time['speedup']:.2f}×" if time else UNMEASURED
        travels = f"{traffic['bytes_per_call'] / 1e6:.2f}" if traffic else UNMEASURED
        options = f"`{aim.options}`" if "=" in aim.options else aim.options
        rows.append([aim.aim, options, speed, travels, *_closeness(aim.closeness), aim.costs])
    return header, rows


def baselines():
    """(header, rows): reused and predicted inputs beside exact sampling in as many calls."""
    rows = measure.read_result("quality_predict")["rows"]
    header = [
        "PSNR dB, mean (worst)",
        '`predict="none"`, as published',
        '`predict="linear"`',
        "exact sampling at equal cost",
    ]
    body = []
    for way in BOTH:
        reused, predicted = (rows[f"{way},warmup_steps=3,predict={kind}@50"] for kind in ("none", "linear"))
        exact = quality_predict_tables.exact_as_long(rows, predicted)
        exact = f"{_psnr(rows[exact])}, {exact.removeprefix('exact@')} steps"
        body.append([f"`{way.removesuffix(',stride=1')}`", _psnr(reused), _psnr(predicted), exact])
    return header, body


def timed(times, wanted):
    """The latest of the rows with these ranks and options; None if none is asked for."""
    if wanted is None:
        return None
    return [row for row in times if (row["nproc"], _but_for_warmup(row["options"])) == wanted][-1]


def _but_for_warmup(options):
    return {name: value for name, value in options.items() if name != "warmup_steps"}


def _closeness(closeness):
    """PSNR, calls that a picture of 50 steps waits for, and what exact sampling gives in as many."""
    if isinstance(closeness, str):
        return (closeness, "", "") if closeness == EXACT else (closeness, UNMEASURED, UNMEASURED)
    name, key = closeness
    row = measure.read_result(name)["rows"][key]
    if row["psnr_db"]["worst"] >= 100:
        return EXACT.replace("tests", "measured"), "", ""
    rows = measure.read_result("quality_predict")["rows"]
    exact = quality_predict_tables.exact_as_long(rows, row)
    if exact is None:
        return _psnr(row), UNMEASURED, UNMEASURED
    return _psnr(row), f"{row['latency_calls']:.1f}", f"{_psnr(rows[exact])}, {exact.removeprefix('exact@')} steps"


def _psnr(row):
    return f"{row['psnr_db']['mean']:.1f} ({row['psnr_db']['worst']:.1f})"
