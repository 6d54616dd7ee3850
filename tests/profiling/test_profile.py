"""`profile` on real ranks, in every mode: one trace of all, whose lanes hold no two things at once."""

import json
from collections import defaultdict

import pytest
import ranks
import tiny_pipelines
import torch
from PIL import Image

import asyncdiff_fast
from asyncdiff_fast.exchange.engine import Engine
from asyncdiff_fast.profiling import words
from asyncdiff_fast.runtime import Runtime

STEPS = 6
# Kinds of ranges that each mode has on every rank, beside calls and steps of the sampler.
MODES = {
    "stages": (dict(num_stages=2, warmup_steps=2), {"unit", "post", "wait"}),
    "patches": (dict(num_patches=2, warmup_steps=2), {"site", "post", "wait"}),
    "pipelined": (dict(num_stages=2, pipeline_patches=2, warmup_steps=2), {"unit", "micro-step", "post", "wait"}),
    "steps": (dict(parallel_steps=2, warmup_steps=2, tolerance=1e8), {"replay", "post", "wait", "block"}),
    "halves": (dict(cfg_parallel=True), {"post", "wait"}),
}
# Times in a trace are rounded to ns.
CLOSE_US = 0.005


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pipe("a red star", num_inference_steps=STEPS, generator=generator, output_type="latent", height=32, width=32)


def _in_all_modes(rank, out):
    pipe = tiny_pipelines.build("sd15")
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for mode, (options, _) in MODES.items():
        asyncdiff_fast.patch(pipe, timeout_s=60, **options)
        draw(pipe)
        with asyncdiff_fast.profile(f"{out}/{mode}", timeout_s=60) as report:
            draw(pipe)
        # Exchanges and agreements are as before.
        draw(pipe)
        asyncdiff_fast.unpatch(pipe)
        found[mode] = report.summary
    return found


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    out = tmp_path_factory.mktemp("profiles")
    return out, ranks.run(2, _in_all_modes, str(out))


def lanes(trace):
    """{(process, thread): [(begin, end, name)]}, in order, the outer of two that begin together first."""
    found = defaultdict(list)
    for e in trace["traceEvents"]:
        if e["ph"] == "X":
            found[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"], e["name"]))
    return {lane: sorted(events, key=lambda e: (e[0], -e[1])) for lane, events in found.items()}


def overlapping(events):
    """Pairs of which neither lies within the other."""
    found, open_ones = [], []
    for event in events:
        while open_ones and open_ones[-1][1] <= event[0] + CLOSE_US:
            open_ones.pop()
        if open_ones and event[1] > open_ones[-1][1] + CLOSE_US:
            found.append((open_ones[-1], event))
        open_ones.append(event)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_the_trace_has_every_rank_and_no_lane_two_things_at_once(profiles, mode):
    trace = json.loads((profiles[0] / mode / "trace.json").read_text())
    names = {e["args"]["name"]: e["pid"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert set(names) == {"rank 0, host", "rank 1, host"}
    for lane, found in lanes(trace).items():
        assert not overlapping(found), lane
    for pid in names.values():
        own = [e for e in trace["traceEvents"] if e["pid"] == pid]
        kinds = {e["args"].get("kind") for e in own if e["ph"] == "X" and "args" in e}
        assert kinds >= {"call", "sampler", *MODES[mode][1]}
        assert any(e.get("cat") == "cpu_op" for e in own)
        assert sum(e["ph"] == "X" and e["args"].get("kind") == "sampler" for e in own if "args" in e) == STEPS
        assert any(e.get("cat") == "block" for e in own) == (mode == "steps")
    # Ranks of one host share a clock, and here began together.
    assert max(min(e[0] for e in found) for found in lanes(trace).values()) < 60e6


@pytest.mark.parametrize("mode", MODES)
def test_what_is_sent_arrives_and_a_step_is_accounted_for(profiles, mode):
    out, (first, second) = profiles
    trace = json.loads((out / mode / "trace.json").read_text())
    arrows = [(e["id"], e["ph"], e["pid"]) for e in trace["traceEvents"] if e.get("cat") == "message"]
    sent = {i: pid for i, ph, pid in arrows if ph == "s"}
    assert sent and all(sent[i] != pid for i, ph, pid in arrows if ph == "f")
    summary = first[mode]
    assert second[mode] is None and summary == json.loads((out / mode / "profile.json").read_text())
    assert [r["rank"] for r in summary["ranks"]] == [0, 1]
    for r in summary["ranks"]:
        assert r["compute_ms"] > 0 and r["wait_ms"] > 0 and r["host_ms"] > 0
        assert r["compute_ms"] + r["wait_ms"] + r["host_ms"] == pytest.approx(r["step_ms"])
    assert (summary["steps"] == "exact") == (mode == "halves")
    assert {w["peers"] for w in summary["largest_waits"]} <= {"0", "1", ""}
    assert "largest waits" in (out / mode / "profile.txt").read_text()
    assert Image.open(out / mode / "step.png").size[0] == 1200


def test_one_process_and_what_is_left_behind(tmp_path):
    before = Engine.post, Runtime._call
    pipe = tiny_pipelines.build("sd15")
    pipe.set_progress_bar_config(disable=True)
    asyncdiff_fast.patch(pipe, num_stages=1)
    with asyncdiff_fast.profile(tmp_path) as report:
        draw(pipe)
        with pytest.raises(ValueError, match="one at a time"), asyncdiff_fast.profile(tmp_path):
            pass
    asyncdiff_fast.unpatch(pipe)
    assert report.summary["ranks"][0]["wait_ms"] == 0 and report.summary["ranks"][0]["steps"] == STEPS - 1
    assert "rank" in report.text and (Engine.post, Runtime._call) == before
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="can be written"), asyncdiff_fast.profile(tmp_path / "file"):
        pass
    with pytest.raises(KeyError), asyncdiff_fast.profile(tmp_path):
        raise KeyError
    assert (Engine.post, Runtime._call) == before


def test_a_profile_without_a_patched_denoiser_says_so(tmp_path):
    with asyncdiff_fast.profile(tmp_path) as report:
        torch.ones(2) + 1
    assert report.summary is None and "patch(pipe)" in report.text
    assert not (tmp_path / "step.png").exists() and words.PREFIX not in (tmp_path / "trace.json").read_text()
