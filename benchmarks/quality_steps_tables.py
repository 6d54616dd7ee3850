"""The tables that `quality_steps.py` writes, in Markdown: every row, and all modes at equal calls.

`others` is what quality_predict.json holds: its stages, patches and exact rows stand beside steps side by side.
"""

import quality_predict_tables

MORE = 1.25
SOURCES = (
    "PSNR in dB against exact sampling of the same sampler and steps, mean (worst picture), and the calls of the\n"
    "whole denoiser that a picture waits for, one after the other: of steps side by side as the runs counted them,\n"
    "mean (most), of stages and patches by counted work. Of stages and of patches, published or predicted, the\n"
    "closest in the mean of those that take at most a quarter more calls than steps side by side; of exact sampling\n"
    "the fewest steps that take as many calls or more. Stages, patches, and exact sampling beside 50 steps are those\n"
    "of quality_predict.json, drawn in batches of 16; the rest was drawn picture by picture."
)


def as_markdown(result, others):
    """Every configuration beside its exact pictures; then equal calls; then the plot."""
    heads = ["configuration", "against", "PSNR dB, mean", "worst", "SSIM", "obeyed", "calls, mean", "most"]
    lines = [result["title"], "", *_head(heads)]
    for name, row in result["rows"].items():
        psnr, calls = row["psnr_db"], row["calls"]
        cells = [f"`{name.partition(' ')[0]}`", f"`{row['reference']}`"]
        cells += [f"{psnr['mean']:.1f} ({psnr['low']:.1f} to {psnr['high']:.1f})", f"{psnr['worst']:.1f}"]
        cells += [f"{row['ssim']['mean']:.4f}", f"{row['obedience']['all']['mean']:.2f}"]
        cells += [f"{calls['mean']:.1f}", f"{calls['most']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *equal_calls(result, others), "", "![closeness by calls](quality_steps.svg)"]) + "\n"


def equal_calls(result, others):
    """Each number of steps side by side beside the other modes where a picture waits for about as many calls."""
    rows = others["rows"] | result["rows"]
    heads = ["steps, sampler", "side by side, tolerance", "steps side by side", "stages", "patches", "exact"]
    lines = [SOURCES, "", *_head(heads)]
    for name, row in result["rows"].items():
        if not is_steps(name):
            continue
        steps, _, sampler = name.partition("@")[2].partition("/")
        ranks, tolerance = of_steps(name)
        calls = f"{row['calls']['mean']:.1f} ({row['calls']['most']:.0f}) calls"
        rivals = [closest(others["rows"], row, mode) for mode in ("num_stages", "num_patches")]
        exact = quality_predict_tables.exact_as_long(rows, row)
        cells = [f"{steps}, {sampler or 'DDIM'}", f"{ranks}, {tolerance}", f"{_psnr(row)}, {calls}"]
        cells += [cell(others["rows"], rival) for rival in rivals]
        cells.append("" if exact is None else f"{_psnr(rows[exact])}, {rows[exact]['latency_calls']:.0f} calls")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def forms(rows):
    """(head, lines): each model, steps and ranks, with a column for each form, of the latest rows."""
    cells = {}
    for row in rows:
        psnr, calls = row["psnr_db"], row["calls"]["mean"]
        place = f"{row['model']}, {row['prompts']}", row["steps"], f"{row['ranks']}, {row['tolerance']:g}"
        cells.setdefault(place, {})[row["form"]] = f"{psnr['mean']:.1f} ({psnr['worst']:.1f}), {calls:.1f} calls"
    found = list(dict.fromkeys(row["form"] for row in rows))
    head = ["the model predicts a …, prompts", "steps", "side by side, tolerance", *found]
    return head, [[*place, *(of.get(form, "") for form in found)] for place, of in cells.items()]


def is_steps(name):
    """True for a configuration of steps side by side."""
    return name.startswith("parallel_steps=")


def of_steps(name):
    """(ranks, tolerance), as text, of a configuration of steps side by side."""
    ranks, _, tolerance = name.partition("@")[0].removeprefix("parallel_steps=").partition(",tolerance=")
    return ranks, tolerance


def way(name):
    """Options of a configuration of stages or patches, without those that are all alike."""
    options = name.partition("@")[0].split(",")
    return ",".join(option for option in options if option not in ("warmup_steps=3", "stride=1"))


def closest(rows, row, mode):
    """The name of the closest of a mode that takes at most a quarter more calls than `row`; None if none does."""
    fitting = {
        name: other["psnr_db"]["mean"]
        for name, other in rows.items()
        if name.startswith(mode)
        and other["reference"] == row["reference"]
        and other["latency_calls"] <= MORE * row["latency_calls"]
    }
    return max(fitting, key=fitting.get, default=None)


def cell(rows, name, options=True):
    """What a configuration reaches, in how many calls, and with which `options`; nothing for none."""
    if name is None:
        return ""
    text = f"{_psnr(rows[name])}, {rows[name]['latency_calls']:.1f} calls"
    return f"{text}, `{way(name)}`" if options else text


def _head(heads):
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]


def _psnr(row):
    return f"{row['psnr_db']['mean']:.1f} ({row['psnr_db']['worst']:.1f})"
