"""The published PipeFusion, step by step: predictions and latents of every recorded case, on real ranks."""

import functools

import pytest
import ranks
from test_golden import FOLDER, TOLERANCE, assert_reproduced, load, play

# Whose text patches after the first read, by the published code of each model.
TEXT = {"sd3": "unit", "flux": "stage"}
# Names of the lists of blocks, in order.
BLOCKS = {"flux": ("transformer_blocks", "single_transformer_blocks"), "hunyuandit": ("blocks",)}


def published_stages(case):
    """Blocks as published: as many as the first stage's in all but the last, or as listed; the last has the head."""
    _, config = load.MODELS[case["model"]]
    counts = [config["num_layers"], config.get("num_single_layers", 0)]
    lists = BLOCKS.get(case["model"], ("transformer_blocks",))
    names = [f"{part}.{i}" for part, n in zip(lists, counts, strict=False) for i in range(n)]
    each, given = -(-len(names) // case["num_stages"]), case["attn_layer_num_for_pp"]
    counts = given or [len(names[s * each : (s + 1) * each]) for s in range(case["num_stages"])]
    starts = [sum(counts[:s]) for s in range(len(counts) + 1)]
    stages = [names[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    # What is not named, such as norm_out, runs on every rank.
    stages[-1] += ["proj_out"]
    return stages


def _options(case):
    # FLUX's latent is a sequence of tokens, which its rows are.
    unit = case["latent_hw"][1] // 2 if case["model"] == "flux" else 1
    return dict(
        stages=published_stages(case),
        pipeline_patches=[rows * unit for rows in case["patch_heights"]],
        pipeline_text=TEXT.get(case["model"], "stage"),
        warmup_steps=case["warm_up"],
        cfg_parallel=case["cfg_parallel"],
    )


@functools.cache
def cases():
    """{file name: case}"""
    return {path.name: load.load_case(path)[0] for path in sorted(FOLDER.glob("pipefusion_*.safetensors"))}


def _size(case):
    return case["num_stages"] * (2 if case["cfg_parallel"] else 1)


def _run_cases(rank, names):
    return play(names, _options)


@functools.cache
def results(world_size):
    """Results of all ranks for all cases of one world size."""
    return ranks.run(world_size, _run_cases, [n for n, c in cases().items() if _size(c) == world_size], timeout=280)


@pytest.mark.parametrize("name", cases())
def test_golden(name):
    assert_reproduced(results(_size(cases()[name])), name)


@pytest.mark.parametrize("name", cases())
def test_case_tells_stale_from_exact(name):
    _, _, expected = load.load_case(FOLDER / name)
    plain, ref = expected["plain_latents"], expected["ref_latents"]
    assert (plain - ref).abs().max() / ref.abs().max() > 5 * TOLERANCE
