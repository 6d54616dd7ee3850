"""The clockwork of the simulation, by hand."""

import pytest

from asyncdiff_fast.simulation.cluster import Cluster, Link, parse
from asyncdiff_fast.simulation.events import Compute, Deadlock, Mark, Post, Wait, run

LINK = Link(latency_s=0.5, gbs=1e-9)


def _cluster(link=LINK, between=LINK, nodes=1, gpus=4, nics=1):
    return Cluster(nodes, gpus, link, between, nics)


def _ends(programs, cluster):
    line = run([[*program, Mark("end")] for program in programs], cluster)
    return [line.marks["end"][rank][0] for rank in range(len(programs))], line


def test_a_message_takes_its_bytes_and_a_latency():
    ends, line = _ends([[Compute(1), Post("a", ((1, 3),))], [Compute(2), Wait("a", 0), Compute(1)]], _cluster())
    assert ends == [1, 5.5] and line.waits == [0, 2.5] and line.sent == [3, 0]


def test_what_came_earlier_is_not_waited_for():
    ends, line = _ends([[Post("a", ((1, 1),)), Compute(9)], [Compute(4), Wait("a", 0)]], _cluster())
    assert ends == [9, 4] and line.waits == [0, 0]


def test_messages_take_turns_at_a_port():
    """Two send to one; one of them posts later, though its program stands first."""
    programs = [[Compute(1), Post("a", ((2, 4),))], [Post("a", ((2, 4),))], [Wait("a", 0), Wait("a", 1)]]
    assert _ends(programs, _cluster())[0][2] == 4 + 4 + 0.5


def test_hosts_share_their_network_card():
    programs = [[Post("a", ((2, 4),))], [Post("a", ((3, 4),))], [Wait("a", 0)], [Wait("a", 1)]]
    assert _ends(programs, _cluster(nodes=2, gpus=2))[0][2:] == [4.5, 8.5]
    assert _ends(programs, _cluster(nodes=2, gpus=2, nics=2))[0][2:] == [2.5, 4.5]


def test_processors_that_copy_lose_time_unless_they_wait_anyway():
    link = Link(0, 1e-9, steals=1.0)
    programs = [[Post("a", ((1, 2),)), Compute(5)], [Wait("a", 0), Compute(5)]]
    assert _ends(programs, _cluster(link))[0] == [7, 7]


def test_who_waits_for_nothing_is_named():
    with pytest.raises(Deadlock, match="rank 0 waits for b of rank 1"):
        run([[Wait("b", 1)], [Compute(1)]], _cluster())


def test_a_cluster_in_words():
    found = parse("nodes=4,gpus=8,link=ib400,inside=nvlink3,call_ms=20")
    assert (found.cluster.size, found.cluster.inside.gbs, found.cluster.between.gbs) == (32, 300, 50)
    assert found.call_s == 0.02 and found.tflops is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nodes=0", "nodes must be an integer of at least 1: got 'nodes=0'"),
        ("gpus=many", "gpus must be an integer of at least 1: got 'gpus=many'"),
        ("link=string", "link must be one of nvlink3, .*: got 'link=string'"),
        ("hosts=2", "is told by nodes, .*: got 'hosts=2'"),
        ("call_ms=-1", "call_ms must be a positive number"),
        ("tflops=inf", "tflops must be a positive number: got 'tflops=inf'"),
        ("call_ms=1,tflops=2", "leave one out"),
    ],
)
def test_a_cluster_that_cannot_be(text, expected):
    with pytest.raises(ValueError, match=expected):
        parse(text)
