"""Each ordering edge of the exchange, left out, is reported: every time, with the accesses that it kept apart."""

import ctypes
import os
import re
import subprocess
import sys

import building
import pytest
from channels import connect, kinds, ring, verdict
from double import Double

STEPS = 4
TIMINGS = [(0, 0), *((300, seed) for seed in range(1, building.repeats(6, 2)))]


# Each case runs a schedule and returns the (kind, earlier access, later access) that keep apart what the edge orders.


def send_after_producer(gpu, ranks):
    _one_way(gpu, ranks)
    return {("RAW", "produce", "send")}


def read_after_recv(gpu, ranks):
    _one_way(gpu, ranks)
    return {("RAW", "recv", "consume")}


def write_after_send(gpu, ranks):
    _one_way(gpu, ranks)
    return {("WAR", "send", "produce")}


def recv_after_readers(gpu, ranks):
    _one_way(gpu, ranks)
    return {("WAR", "consume", "recv")}


def done_recorded(gpu, ranks):
    _one_way(gpu, ranks)
    return {("WAR", "send", "produce"), ("RAW", "recv", "consume")}


def host_after_done(gpu, ranks):
    """The host reads what has come, and uses the buffers for something else."""
    slots = ring(ranks)
    for r, slot in zip(ranks, slots, strict=True):
        r.send_once(slot)
    for r, slot in zip(ranks, slots, strict=True):
        r.channel.drain([slot.number])
        gpu.host(r.rank, "look", reads=r.expected(slot))
    for r, slot in zip(ranks, slots, strict=True):
        r.send_once(slot)
    for r, slot in zip(ranks, slots, strict=True):
        r.channel.drain([slot.number])
        gpu.host(r.rank, "reuse", writes=[m.part() for m in (*slot.send, *slot.recv[1 - r.rank])])
    return {
        ("RAW", "recv", "look"),
        ("WAR", "send", "reuse"),
        ("WAW", "recv", "reuse"),
        # Only the send stood between the producer and the host.
        ("WAW", "produce", "reuse"),
    }


def put_after_copy_out(gpu, ranks):
    _one_way(gpu, ranks)
    return {("WAR", "copy", "put")}


def copy_after_put(gpu, ranks):
    _one_way(gpu, ranks)
    return {("RAW", "put", "copy")}


def _one_way(gpu, ranks):
    """Rank 0 sends and rank 1 receives, so that no edge of the other direction stands in for a missing one."""
    source, target = ranks[0].slot("x", sends=[1]), ranks[1].slot("x", recvs=[0])
    ranks[0].freeze(source)
    ranks[1].freeze(target)
    for _ in range(STEPS):
        ranks[0].send_once(source)
        ranks[1].post(target)
        ranks[1].wait(target)
        ranks[1].consume(target)


def _edges():
    return building.load()[1].edges()


def _run(number, timing, puts):
    """(expected, stuck, races) of an edge's case, with the edge left out."""
    path, extension = building.load()
    case = getattr(sys.modules[__name__], _case(number))
    with Double(path, *timing) as gpu:
        ranks = connect(gpu, extension, 2, puts=puts)
        extension.drop_edge(number)
        try:
            expected = case(gpu, ranks)
            stuck, races, _ = verdict(gpu, ranks)
        finally:
            extension.drop_edge(-1)
            for r in ranks:
                r.channel.abort("over")
                r.channel.close()
    return expected, stuck, races


def _case(number):
    function = ctypes.CDLL(str(building.build()[0])).fake_mutant
    function.restype = ctypes.c_char_p
    name = function(number)
    return name and name.decode()


def _names():
    """Names of the edges, as the source lists them: the tests are collected without a build."""
    text = (building.ROOT / "csrc" / "edges.hpp").read_text()
    body = re.search(r"enum class Edge \{(.*?)\};", text, re.S)[1]
    names = re.findall(r"\w+", re.sub(r"//.*", "", body))
    assert names.pop() == "Count"
    return names


def _ways():
    """(edge, whether one-sided) of every way in which NCCL carries a message."""
    text = (building.ROOT / "csrc" / "edges.hpp").read_text()
    rows = re.findall(r'\{Edge::(\w+), "\w+", "[^"]*",\s*"([^"]*)"\}', text)
    assert [name for name, _ in rows] == _names()
    return [(name, puts) for name, ways in rows for puts in (False, True) if puts or "nccl" in ways.split(",")]


def test_every_edge_is_drawn_in_one_place():
    sources = "".join(path.read_text() for path in (building.ROOT / "csrc").glob("*.cpp"))
    drawn = re.findall(r"ADF_EDGE\(Edge::(\w+)", sources)
    assert sorted(drawn) == sorted(_names())


def test_every_edge_has_a_case():
    assert [edge["name"] for edge in _edges()] == _names()
    cases = [_case(edge["number"]) for edge in _edges()]
    assert all(callable(getattr(sys.modules[__name__], case)) for case in cases)
    assert len(set(cases)) == len(cases) and _case(len(cases)) is None


@pytest.mark.parametrize("added", [False, True])
def test_an_edge_without_a_case_does_not_compile(tmp_path, added):
    for name in ("csrc/edges.hpp", "tests/fake_gpu/mutants.cpp", "tests/fake_gpu/exports.hpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = (building.ROOT / name).read_text()
        if added:
            text = text.replace("  Count,\n", "  Another,\n  Count,\n")
            text = text.replace(
                '"nccl-puts"},\n}};', '"nccl-puts"},\n    {Edge::Another, "Another", "none", "nccl"},\n}};'
            )
        (tmp_path / name).write_text(text)
    command = ["c++", "-std=c++17", "-fsyntax-only", str(tmp_path / "tests/fake_gpu/mutants.cpp")]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode != 0) == ("kMutants must name a test case for every Edge" in done.stderr) == added


@pytest.mark.parametrize(("name", "puts"), _ways())
def test_an_edge_left_out_is_reported_every_time(name, puts):
    number = _names().index(name)
    reports = []
    for timing in TIMINGS:
        expected, stuck, races = _run(number, timing, puts)
        assert stuck == []
        assert kinds(races) == expected, f"delay and seed: {timing}"
        reports.append(races)
    assert all(races == reports[0] for races in reports), "the report does not depend on the timing"


@pytest.mark.parametrize(("name", "puts"), _ways())
def test_with_the_edge_there_is_nothing_to_report(name, puts):
    path, extension = building.load()
    case = getattr(sys.modules[__name__], _case(_names().index(name)))
    for timing in TIMINGS[:3]:
        with Double(path, *timing) as gpu:
            ranks = connect(gpu, extension, 2, puts=puts)
            case(gpu, ranks)
            assert verdict(gpu, ranks) == ([], [], [])
