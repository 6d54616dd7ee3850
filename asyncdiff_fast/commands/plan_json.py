"""Plans as dicts, fit for JSON."""

import dataclasses

from ..patches.plan import MeshPlan, PatchPlan
from ..pipelined.plan import PipelinePlan
from ..steps.plan import EXAMPLES, StepPlan


def as_dict(plan):
    """Dict of a `StepPlan`, a `Plan` of stages, a `PatchPlan`, a `MeshPlan` of both, or a `PipelinePlan`."""
    if isinstance(plan, StepPlan):
        return {
            **_common(plan),
            "output_bytes": plan.output_bytes,
            "bytes_per_block": plan.bytes_per_block,
            "calls": {steps: plan.calls(steps) for steps in EXAMPLES},
            "each_call": None if plan.each is None else as_dict(plan.each),
        }
    if isinstance(plan, PipelinePlan):
        return {
            **_divided(plan, plan.whole),
            "micro_steps_per_call": plan.micro_steps_per_call(),
            "patches": None if plan.patches is None else [list(rows) for rows in plan.patches.rows.held],
            "kept_bytes": [plan.kept_bytes(stage) for stage in range(plan.division.num_stages)],
        }
    if isinstance(plan, MeshPlan):
        return {
            "bytes_per_call": plan.bytes_per_call,
            "patches": _patches(plan.patches),
            "stages": _stages(plan.stages),
        }
    return _patches(plan) if isinstance(plan, PatchPlan) else _stages(plan)


def _common(plan):
    return {
        "options": dataclasses.asdict(plan.config),
        "processes": plan.config.world_size,
        "bytes_per_call": plan.bytes_per_call,
    }


def _patches(plan):
    patches = [
        {
            "rows": list(rows),
            "sent_bytes": plan.sent_bytes(patch),
            "result_bytes": plan.sent_result_bytes(patch),
            "buffer_bytes": plan.memory_bytes(patch),
        }
        for patch, rows in enumerate(plan.rows.held)
    ]
    return {**_common(plan), "rows": plan.rows.size, "patches": patches}


def _stages(plan):
    return {**_divided(plan, plan.graph), "stale_hops": plan.division.hops}


def _divided(plan, graph):
    units = list(zip(graph.units, plan.division.owner, strict=True))
    stages = [
        {"cost": cost, "weight_bytes": nbytes, "units": [unit.name for unit, owner in units if owner == stage]}
        for stage, (cost, nbytes) in enumerate(zip(plan.division.costs, plan.weight_bytes, strict=False))
    ]
    return {
        **_common(plan),
        "balance": plan.division.balance,
        "glue_cost": graph.glue_cost,
        "stages": stages,
        "sends": [
            {"from": s, "to": t, "bytes": n, "tensors_of": name} for (s, t, name), n in plan.sent_bytes().items()
        ],
    }
