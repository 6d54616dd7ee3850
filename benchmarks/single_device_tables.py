"""Rows of single_device.jsonl as tables: a call by each way on one device, and what single things gain."""

import statistics

import measure

NOT_MEASURED = "Not measured yet: `python benchmarks/single_device.py --save`."
WAYS = {"eager": "launched", "graph": "captured by hand", "graphs=True": "`graphs=True`"}
GAINS = {
    "text": "the text's keys and values kept",
    "joined": "queries, keys and values by one product",
    "add_layer_norm": "sums and LayerNorms in one pass",
    "channels_last": "weights in channels_last",
}


def _rows():
    """All rows; [] if nothing was measured."""
    return measure.read_rows("single_device") if (measure.RESULTS / "single_device.jsonl").exists() else []


def _ms(rows, side):
    return 1e3 * statistics.median(row[side]["median_s"] for row in rows)


def _machine(row):
    return f"{row['device']}, torch {row['torch']}, triton {row['triton']}, {row['commit']}"


def calls(table):
    """Unpatched, compiled and patched, device by device; `table` makes Markdown of a header and rows."""
    ways = {}
    for row in _rows():
        if row["attention"] == "default" and "without" not in row:
            what = row["model"], "×".join(map(str, row["latents"])), row["dtype"], _machine(row)
            layout, mode = row["memory_format"].removesuffix("_format"), row["mode"]
            if mode != "graphs=True":
                compiled = "" if row["compiled"] == "no" else f", compile_repeated_blocks, {layout}"
                plain = f"unpatched{compiled or ', ' + layout}, {WAYS[mode]}"
                ways.setdefault((*what, plain), ("unpatched", []))[1].append(row)
            if row["kernels"]["mode"] != "torch" and row["compiled"] == "no":
                own = f'`kernels="{row["kernels"]["mode"]}"`, {layout}, {WAYS[mode]}'
                ways.setdefault((*what, own), ("patched", []))[1].append(row)
    if not ways:
        return NOT_MEASURED
    header = ["model, latents, dtype", "how it is called", "ms", "calls/s", "machine, commit"]
    body = [
        [f"{model}, {latents}, {dtype}", way, f"{_ms(rows, side):.1f}", f"{1e3 / _ms(rows, side):.1f}", machine]
        for (model, latents, dtype, machine, way), (side, rows) in ways.items()
    ]
    return table(header, body)


def gains(table):
    """What a replayed call takes longer if one thing is left out."""
    whole, body = {}, []
    for row in _rows():
        key = row["model"], row["kernels"]["mode"], row["memory_format"], _machine(row)
        if row["mode"] == "graphs=True" and "without" not in row:
            whole[key] = row
        elif "without" in row:
            ms, less = (1e3 * x["patched"]["median_s"] for x in (row, whole[key]))
            body.append([GAINS.get(row["without"], f"`{row['without']}`"), f'"{key[1]}"', f"{less:.2f}", f"{ms:.2f}",
                         f"{ms - less:+.2f}", key[3]])  # fmt: skip
    header = ["left out", "`kernels`", "ms", "ms without", "difference", "machine, commit"]
    return table(header, body) if body else NOT_MEASURED


def in_words():
    """A call of SDXL's UNet on the GPU measured last: as `patch` makes it by default, and unpatched in three ways."""
    kept = [row for row in _rows() if row["attention"] == "default" and row.get("without") is None]
    last = [row for row in kept if row["mode"] == "graphs=True" and row["kernels"]["mode"] == "auto"][-1]
    own = [row for row in kept if _machine(row) == _machine(last)]

    def unpatched(mode, compiled):
        return _ms([row for row in own if (row["mode"], row["compiled"]) == (mode, compiled)], "unpatched")

    patched = 1e3 * last["patched"]["median_s"]
    launched, captured = unpatched("eager", "no"), unpatched("graph", "no")
    compiled = unpatched("graph", "blocks")
    return (
        f"On one {last['device']} a call of SDXL's UNet at 1024² (fp16, both halves of guidance) takes\n"
        f"{patched:.1f} ms patched. Unpatched it takes {launched:.0f} ms as diffusers launches it (the host is slow),\n"
        f"{captured:.1f} ms as a CUDA graph, and {compiled:.1f} ms with `compile_repeated_blocks` as a CUDA graph: "
        f"{captured / patched:.2f}× and {compiled / patched:.2f}× of the patched call (commit {last['commit']})."
    )
