"""Committed results to tables: `python benchmarks/report.py` rewrites what stands between their marks.

A table `name` stands between `<!-- name -->` and `<!-- /name -->`, in the README or in one of the pages of docs/.
"""

import pathlib
import re

import aims
import decode_tables
import exchange_tables
import kernel_tables
import measure
import memory
import quality_meshes
import quality_pipelined
import quality_predict_tables
import quality_steps_tables
import single_device_tables
import speed_tables

from asyncdiff_fast.config import LATENT_TOLERANCE, STEPS_WARMUP

WARMUP = re.compile(r"\bwarmup_steps=(\d+)")
PATCHES = re.compile(r"\bnum_patches=(\d+),")
ROOT = pathlib.Path(__file__).parents[1]
MARK = re.compile(r"<!-- (\w[\w ]*) -->\n.*?<!-- /\1 -->", re.DOTALL)
# What no benchmark measures: tests hold those pages to what is tested.
NOT_OURS = {"compatibility", "samplers"}


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def plans():
    """How even and how cheap the divisions of real models are."""
    rows = measure.read_result("plans")
    rows = rows["rows"] if isinstance(rows, dict) else rows
    cells = {}
    for row in rows:
        published = "published" in row["split"]
        label = row["model"] + (", published division" if published else "")
        text = f"{row['balance']:.3f}, {row['cut_mb']:.1f} MB"
        if published and row.get("broadcast_mb"):
            text = f"{row['balance']:.3f}, {row['broadcast_mb']:.0f} MB broadcast"
        cells.setdefault(label, {})[row["num_stages"]] = text
    body = [[label, *(of.get(n, "") for n in (2, 3, 4))] for label, of in cells.items()]
    return table(["largest stage over mean, MB cut per call", "2 stages", "3 stages", "4 stages"], body)


def first_options():
    """The short form of `more_options`."""
    header, rows = aims.cells(aims.FIRST)
    places = [i for i, name in enumerate(header) if name != "MB a call"]
    return table([header[i] for i in places], [[row[i] for i in places] for row in rows])


def more_options():
    """Speed and closeness side by side, by hardware and aim."""
    return table(*aims.cells((*aims.FIRST, *aims.MORE)))


def about_options():
    """How what stands in these tables was measured."""
    predicted, steps = (measure.read_result(name)["title"] for name in ("quality_predict", "quality_steps"))
    rows = speed_tables.as_patched()
    row, days = rows[-1], [row["date"] for row in rows]
    alone = aims.timed(rows, aims.ALONE)["speedup"]
    return (
        f"Speed: a call of `{row['model']}` after the exact ones, against one unpatched process; "
        f"{speed_tables.machine(row | {'date': f'{min(days)} to {max(days)}'})}.\n"
        f"One patched process is {alone:.2f}× as fast as an unpatched one, which is a part of each figure. Steps side\n"
        "by side were timed with full blocks. Closeness: PSNR, mean (worst picture), against exact sampling with 50\n"
        f"steps DDIM; {predicted}\nSteps side by side: {steps}"
    )


def baselines():
    """What exact sampling gives in the same time, beside what is published and what is predicted."""
    return table(*aims.baselines())


def end_to_end():
    """The latest row of each model, number of ranks, set of options and way to exchange."""
    return table(*speed_tables.cells(speed_tables.latest()))


def pipelined():
    """What patches that pass through stages gain, and what they can."""
    rows = speed_tables.as_patched(passing=True)
    if not rows:
        return "Not measured yet."
    return f"{speed_tables.machine(rows[-1])}.\n\n{table(*speed_tables.pipelined())}"


def quality():
    """The short form of the quality table."""
    return quality_tables(measure.read_result("quality"))


def quality_tables(result):
    """Mean PSNR and the worst picture's, by warm-up, and of exact sampling with fewer steps: two small tables."""
    cells, exact = {}, {}
    for name, row in result["rows"].items():
        options, _, steps = name.rpartition("@")
        cell = f"{row['psnr_db']['mean']:.1f} ({row['psnr_db']['worst']:.1f})"
        found = WARMUP.search(options)
        if options == "exact":
            exact[int(steps)] = cell
        elif found:
            kind = f"`{options.replace(found.group(), '').strip(',')}`, {steps} steps"
            cells.setdefault(kind, {})[int(found.group(1))] = cell
    warmups = sorted({warmup for by_warmup in cells.values() for warmup in by_warmup})
    lines = ["PSNR in dB, mean (worst picture): " + result["title"], ""]
    if cells:
        lines += ["| warm-up steps | " + " | ".join(map(str, warmups)) + " |", "|---" * (len(warmups) + 1) + "|"]
        lines += [f"| {k} | " + " | ".join(c.get(w, "") for w in warmups) + " |" for k, c in cells.items()]
    lines += ["", "| exact, steps | " + " | ".join(map(str, exact)) + " |", "|---" * (len(exact) + 1) + "|"]
    return "\n".join([*lines, "| | " + " | ".join(exact.values()) + " |"])


def quality_of_patches():
    """The short form of the table of patches."""
    return patch_tables(measure.read_result("quality_patches"))


def patch_tables(result):
    """Mean PSNR and the worst picture's of every way of patches, and how much closer the corrected GroupNorm is."""
    closeness, gains = {}, {}
    for name, row in result["rows"].items():
        if PATCHES.search(name):
            place, way = _place_and_way(name)
            closeness.setdefault(way, {})[place] = f"{row['psnr_db']['mean']:.1f} ({row['psnr_db']['worst']:.1f})"
    for pair, gain in result["pairs"].items():
        ours, theirs = pair.split(" − ")
        cell = f"{gain['mean']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f})"
        gains.setdefault(_place_and_way(theirs)[1], {})[_place_and_way(ours)[0]] = cell
    closeness = _by_place("options, and warm-up steps", closeness)
    gains = _by_place('`group_norm="corrected"` minus', gains)
    title = "PSNR in dB, mean (worst picture): " + result["title"]
    return f"{title}\n\n{closeness}\n\nPSNR gained, picture by picture, with 95 % intervals over prompts:\n\n{gains}"


def quality_of_predictions():
    """What prediction gains, and what exact sampling gives in the same time, of the rows that are there."""
    result = measure.read_result("quality_predict")
    parts = (quality_predict_tables.gains(result["rows"]), quality_predict_tables.equal_latency(result["rows"]))
    return "\n\n".join([result["title"], *("\n".join(lines) for lines in parts)])


def quality_of_steps():
    """Steps side by side beside stages, patches and exact sampling where pictures wait for about as many calls."""
    result = measure.read_result("quality_steps")
    lines = quality_steps_tables.equal_calls(result, measure.read_result("quality_predict"))
    return "\n".join([result["title"], "", *lines])


def forms_of_steps():
    """In which form outputs are expected best, by models that predict in different ones."""
    title = "PSNR in dB against exact sampling, mean (worst picture), and calls; each picture drawn alone."
    return f"{title}\n\n{table(*quality_steps_tables.forms(measure.read_rows('steps_forms')))}"


def quality_of_pipelined():
    """Patches through stages beside the other modes where pictures wait for about as many calls."""
    result, *others = (measure.read_result(f"quality_{name}") for name in ("pipelined", "predict", "steps"))
    return "\n".join([result["title"], "", *quality_pipelined.beside(result, *others)])


def quality_of_meshes():
    """Steps side by side whose calls are shared, beside steps side by side alone."""
    result, steps = (measure.read_result(f"quality_{name}") for name in ("meshes", "steps"))
    return "\n".join([result["title"], "", *quality_meshes.beside(result, steps)])


def memory_of_shards():
    """What processes hold of a denoiser that is divided as it is loaded."""
    rows = measure.read_rows("memory")
    return f"{rows[-1]['device']}, torch {rows[-1]['torch']}, {rows[-1]['date']}.\n\n{table(*memory.cells(rows))}"


def batch_steps():
    """What a block would take on one device as one batch, against its steps one after the other."""
    steps = measure.read_result("quality_steps")["rows"]
    latest = {row["model"]: row for row in measure.read_rows("batch_steps")}
    body = []
    for model, row in latest.items():
        for length in (2, 4):
            calls = steps[f"parallel_steps={length},tolerance={LATENT_TOLERANCE:g}@50"]["calls"]["mean"]
            cost = row["cost_in_calls"][str(length)]
            # All calls but the exact ones are of a whole block, at most.
            whole = STEPS_WARMUP + (calls - STEPS_WARMUP) * cost
            body.append([f"`{model}`", length, f"{cost:.2f}", f"{calls:.1f}", f"{50 / whole:.2f}×"])
    header = ["model", "steps in a batch", "cost, in calls of one", "calls for 50 steps", "speed-up at best"]
    first = next(iter(latest.values()))
    return f"{first['device']}, one thread, {first['date']}.\n\n{table(header, body)}"


def tuned():
    """What `tune` recommends against the best of a full grid: the latest row."""
    if not (measure.RESULTS / "tuned.jsonl").exists():
        return "Not measured yet: `python benchmarks/tuned.py --save`."
    row = measure.read_rows("tuned")[-1]
    header = ["recommended", "s by the grid", "best of the grid", "s", "drawn", "minutes", "grid, minutes"]
    cells = [
        f"`{row['recommended']}`", f"{row['recommended_s']:.2f}", f"`{row['best']}`", f"{row['best_s']:.2f}",
        f"{row['drawn']} of {row['sets']}", f"{row['minutes']:.1f}", f"{row['grid_minutes']:.1f}",
    ]  # fmt: skip
    title = (
        f"{row['processes']} processes, {row['steps']} steps, {row['prompts']} prompts; {row['device']}, {row['date']}."
    )
    return f"{title}\n\n{table(header, [cells])}"


def _place_and_way(name):
    """((patches, warm-up steps), the other options) of a configuration of patches."""
    options = name.rpartition("@")[0]
    patches, warmup = PATCHES.search(options), WARMUP.search(options)
    way = options.replace(patches.group(), "").replace(warmup.group(), "").strip(",")
    return (int(patches.group(1)), int(warmup.group(1))), way


def _by_place(head, cells):
    """A table of {way: {(patches, warm-up steps): cell}}."""
    places = sorted({place for by_place in cells.values() for place in by_place})
    heads = [f"{patches} patches, {warmup}" for patches, warmup in places]
    return table([head, *heads], [[f"`{way}`", *(of.get(p, "") for p in places)] for way, of in cells.items()])


MAKERS = {
    "options": first_options,
    "all options": more_options,
    "about options": about_options,
    "one gpu": single_device_tables.in_words,
    "baselines": baselines,
    "end_to_end": end_to_end,
    "pipelined": pipelined,
    "plans": plans,
    "quality": quality,
    "quality patches": quality_of_patches,
    "quality predict": quality_of_predictions,
    "quality steps": quality_of_steps,
    "steps forms": forms_of_steps,
    "quality pipelined": quality_of_pipelined,
    "quality meshes": quality_of_meshes,
    "batch steps": batch_steps,
    "memory": memory_of_shards,
    "kernels": lambda: kernel_tables.kernels(table),
    "exchange": lambda: exchange_tables.exchange(table),
    "single device": lambda: single_device_tables.calls(table),
    "single device gains": lambda: single_device_tables.gains(table),
    "decoder": lambda: decode_tables.decoder(table),
    "text encoder": lambda: decode_tables.text_encoder(table),
    "tuned": tuned,
}


def pages():
    """The files that tables may stand in."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text):
    """A page with every table as the committed results have it. Raises: KeyError for a table that nobody makes."""

    def table_of(found):
        name = found[1]
        return found[0] if name in NOT_OURS else f"<!-- {name} -->\n{MAKERS[name]()}\n<!-- /{name} -->"

    return MARK.sub(table_of, text)


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text()))
    kernel_tables.save_pictures()
