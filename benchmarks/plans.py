"""Plans of denoisers of real size: how even the stages are and what crosses between them. Needs no device.

    python benchmarks/plans.py                  every model, 2 to 4 stages: results/plans.json and plans.md
    python benchmarks/plans.py sdxl sd15        some models: printed, nothing written

A plan is `asyncdiff_fast.plan(denoiser, inputs, num_stages=n, predict="none")` on the meta device. For SDXL the
published stages follow, with what they would cost if every listed module's results were broadcast to all other ranks,
as published.
"""

import argparse
import json
import sys
from pathlib import Path

import measure
import real_models
import torch

import asyncdiff_fast
from asyncdiff_fast.stages.plan import ranges

NUM_STAGES = (2, 3, 4)
COLUMNS = {
    "model": "model",
    "num_stages": "stages",
    "split": "split",
    "units": "units",
    "balance": "largest / mean",
    "cut_mb": "cut, MB per call",
    "prediction_mb": "prediction, MB per call",
    "broadcast_mb": "broadcast of all, MB per call",
    "tensors": "tensors crossing",
    "hops": "stale hops",
    "stage_units": "units of each stage",
}


def published_stages(model, num_stages):
    """The published division of a model, from the table beside its test."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))
    from published import published_stages

    return published_stages(model, num_stages)


def measured(plan, name, split):
    """One row: a plan's figures. MB are 10^6 bytes; a tensor counts once for each rank it travels to."""
    cut = plan.cut_bytes
    crossing = {(v, target) for t in plan.transfers if t.unit >= 0 for target, values in t.targets for v in values}
    owner = plan.division.owner
    return {
        "model": real_models.MODELS[name],
        "num_stages": plan.config.num_stages,
        "split": split,
        "units": len(owner),
        "balance": round(plan.division.balance, 4),
        "cut_mb": round(cut / 1e6, 2),
        "prediction_mb": round((plan.bytes_per_call - cut) / 1e6, 2),
        "tensors": len(crossing),
        "hops": list(plan.division.hops),
        "stage_units": [owner.count(s) for s in range(plan.config.num_stages)],
        "ranges": [ranges(plan.graph, plan.division, s) for s in range(plan.config.num_stages)],
    }


def broadcast_mb(plan):
    """MB if every unit's results went to every other rank; what is returned twice travels twice, as published."""
    leaves = [leaf for unit in plan.graph.units for leaf in unit.leaves if leaf is not None and leaf[0] == "value"]
    once = sum(plan.graph.values[value].nbytes for _, value in leaves)
    return round((plan.config.num_stages - 1) * once / 1e6, 2)


def rows(names, num_stages=NUM_STAGES):
    """Rows of all plans of some models."""
    found = []
    for name in names:
        denoiser = real_models.build(name)
        inputs = real_models.inputs(name, denoiser)
        for n in num_stages:
            plan = asyncdiff_fast.plan(denoiser, inputs, num_stages=n, predict="none")
            found.append(measured(plan, name, "searched"))
            if name == "sdxl":
                plan = asyncdiff_fast.plan(denoiser, inputs, stages=published_stages(name, n), predict="none")
                found.append(measured(plan, name, "published") | {"broadcast_mb": broadcast_mb(plan)})
    return found


def table(found):
    """The rows as a Markdown table."""
    shown = [{**row, "hops": "–".join(map(str, sorted(set(row["hops"]))))} for row in found]
    shown = [{**row, "stage_units": " + ".join(map(str, row["stage_units"]))} for row in shown]
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in COLUMNS) + " |" for row in shown]
    return "\n".join(lines)


def document(found, facts):
    """The Markdown file: what the columns mean, and the table."""
    return f"""# Plans of denoisers of real size

Traced on the meta device, stride 1, costs in FLOPs. Made by `python benchmarks/plans.py` on {facts["date"]}, commit
{facts["commit"]}, torch {facts["torch"]}, diffusers {facts["diffusers"]}.

- "largest / mean": cost of the largest stage over the mean of all; glue that every rank repeats is not counted.
- "cut": what stages read of each other; "prediction": the result, sent to every other rank. Both count each copy.
- "stale hops": stage changes from latent to prediction, on the shortest and on the longest way.
- "broadcast of all": the results of every listed module sent to every other rank, as the published program does.

{table(found)}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(real_models.MODELS)}; default: all")
    names = parser.parse_args().models
    unknown = sorted(set(names) - set(real_models.MODELS))
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(real_models.MODELS)}")
    with torch.no_grad():
        found = rows(names or real_models.MODELS)
    print(table(found))
    if names:
        return
    facts = {k: v for k, v in measure.facts().items() if k in ("commit", "date", "python", "torch", "diffusers")}
    measure.RESULTS.mkdir(exist_ok=True)
    text = json.dumps([{**row, **facts} for row in found], indent=1, ensure_ascii=False)
    (measure.RESULTS / "plans.json").write_text(text + "\n")
    (measure.RESULTS / "plans.md").write_text(document(found, facts))


if __name__ == "__main__":
    main()
