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
}
# Waits left out in turn, of those that are needed and of those that another one covers.
SAMPLES = 6


def _record(rank, cases):
    """The programs of one rank, by case: two generations each."""
    programs = {}
    for case in cases:
        _, name, options = CASES[case]
        pipe, recorder = tiny_pipelines.build(name), Recorder()
        runtime = asyncdiff_fast.patch(pipe, warmup_steps=WARMUP_STEPS, timeout_s=60, **options)
        recorder.attach(runtime._stages.exchange)
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
    assert any(kind == "acquire" for _, events in programs for kind, *_ in events)
    assert all(unordered(program) == [] for program in programs)
    for delay_us, seed in ((0, 0), (50, 1)):
        assert replay(*building.load(), programs, None, delay_us, seed) == ([], [], [])


@pytest.mark.parametrize("case", CASES)
def test_without_a_wait_it_races(case):
    """For a sample of all waits: the detector's verdict is that of counting posts."""
    programs = _programs(case)
    needed, covered = [], []
    for rank, program in enumerate(programs):
        for i, (kind, *_) in enumerate(program[1]):
            if kind in ("wait", "acquire"):
                (needed if unordered(program, without=i) else covered).append((rank, i))
    assert {rank for rank, _ in needed} == set(range(len(programs))), "every rank rests on waits of its own"
    chance = random.Random(case)
    for without in chance.sample(needed, min(SAMPLES, len(needed))):
        stuck, races, errors = replay(*building.load(), programs, without)
        assert stuck == [] and errors == []
        expected = {name for _, name in unordered(programs[without[0]], without[1])}
        reported = {word for race in races for word in (race.first.split()[2], race.second.split()[2])}
        assert expected <= reported, f"left out: {without}"
    for without in chance.sample(covered, min(2, len(covered))):
        assert replay(*building.load(), programs, without) == ([], [], [])
