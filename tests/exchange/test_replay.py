"""What patched models do with their slots, recorded on the CPU, is free of races on the double; and needs its waits."""

import functools
import random

import building
import pytest
import ranks
import tiny_pipelines
from recorder import Recorder
from replay import replay, unordered

import asyncdiff_fast

STEPS, WARMUP_STEPS = 5, 2
# name: (ranks, pipeline, options)
CASES = {
    "sdxl on two": (2, "sdxl", {"num_stages": 2}),
    "sd15 with stride 2": (3, "sd15", {"num_stages": 2, "stride": 2}),
    "flux on three": (3, "flux", {"num_stages": 3}),
    "two calls a step": (2, "wan", {"num_stages": 2}),
    "patches of sdxl": (2, "sdxl", {"num_patches": 2}),
    "patches of sd15, synchronous norms": (3, "sd15", {"num_patches": 3, "group_norm": "sync"}),
    "patches of flux": (3, "flux", {"num_patches": 3}),
    "halves of guidance": (2, "sdxl", {"cfg_parallel": True}),
}
# Waits of each rank left out in turn that are needed, beside those met on the way that another one covers.
SAMPLES = 2


def _record(rank, cases):
    """The programs of one rank, by case: two generations each."""
    programs = {}
    for case in cases:
        _, name, options = CASES[case]
        pipe, recorder = tiny_pipelines.build(name), Recorder()
        runtime = asyncdiff_fast.patch(pipe, warmup_steps=WARMUP_STEPS, timeout_s=60, **options)
        (part,) = runtime._parts
        recorder.attach(part.exchange)
        with recorder:
            for seed in (0, 1):
                tiny_pipelines.generate(pipe, name, seed=seed, steps=STEPS)
        programs[case] = recorder.record()
        asyncdiff_fast.unpatch(pipe)
    return programs


@functools.cache
def _recorded(size):
    return ranks.run(size, _record, [case for case, (n, *_) in CASES.items() if n == size])


def _programs(case):
    return [programs[case] for programs in _recorded(CASES[case][0])]


@pytest.mark.parametrize("case", CASES)
def test_a_patched_model_is_free_of_races(case):
    programs = _programs(case)
    for _, events in programs:
        kinds = {kind for kind, *_ in events}
        assert {"slot", "freeze", "post", "wait", "kernel"} <= kinds
    if "num_stages" in CASES[case][2]:
        # Patches write what they send only after they have waited for the receive beside it.
        assert any(kind == "acquire" for _, events in programs for kind, *_ in events)
    assert all(unordered(program) == [] for program in programs)
    for delay_us, seed, puts in ((0, 0, False), (50, 1, False), (0, 0, True), (50, 1, True)):
        assert replay(*building.load(), programs, None, delay_us, seed, puts) == ([], [], [])


@pytest.mark.parametrize("case", CASES)
def test_without_a_wait_it_races(case):
    """For a sample of all waits: the detector's verdict is that of counting posts, or the channel refuses to go on."""
    programs, chance = _programs(case), random.Random(case)
    for rank, program in enumerate(programs):
        waits = [i for i, (kind, *_) in enumerate(program[1]) if kind in ("wait", "acquire")]
        needed = 0
        for i in chance.sample(waits, len(waits)):
            expected = {name for _, name in unordered(program, without=i)}
            needed += bool(expected)
            stuck, races, errors = replay(*building.load(), programs, (rank, i))
            assert stuck == []
            if errors:
                # With one buffer the channel itself refuses the next post, and stops what is under way.
                assert "has depth 1: wait for it" in errors[0]
            else:
                reported = {word for race in races for word in (race.first.split()[2], race.second.split()[2])}
                assert expected <= reported and bool(races) == bool(expected), f"left out: {rank}, {i}"
            if needed == SAMPLES:
                break
        assert needed, f"rank {rank} rests on waits of its own"
