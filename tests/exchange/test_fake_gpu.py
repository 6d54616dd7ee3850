"""The double itself: streams, events and the detector of races."""

import ctypes

import building
import pytest
from double import Double, DoubleError

_handle = ctypes.c_void_p
DELAYS = [(0, 0), (300, 1), (300, 2)]


@pytest.fixture(params=DELAYS, ids=["at once", "late", "late otherwise"])
def gpu(request):
    delay_us, seed = request.param
    with Double(building.build()[0], delay_us, seed) as double:
        yield double


def _kinds(gpu):
    assert gpu.drain() == []
    return [race.kind for race in gpu.races()]


def test_one_stream_runs_in_order(gpu):
    stream, x = gpu.stream(0), gpu.memory(64, "x")
    for value in range(1, 9):
        gpu.kernel(stream, "write", writes=[x.filled(value)])
        gpu.kernel(stream, "read", reads=[x.filled(value)])
    assert _kinds(gpu) == []
    assert gpu.wrong_reads() == []
    assert x.tobytes() == bytes([8]) * 64


@pytest.mark.parametrize(
    ("first", "second", "kind"), [("write", "read", "RAW"), ("read", "write", "WAR"), ("write", "write", "WAW")]
)
def test_two_streams_race_unless_an_event_orders_them(gpu, first, second, kind):
    x = gpu.memory(64, "x")
    for ordered in (False, True):
        early, late = gpu.stream(0), gpu.stream(0)
        gpu.kernel(early, "early", **{f"{first}s": [x.part(0, 32)]})
        if ordered:
            gpu.join(late, early, 0)
        gpu.kernel(late, "late", **{f"{second}s": [x.part(16, 32)]})
        if ordered:
            assert _kinds(gpu) == [], "an event orders them"
        else:
            assert _kinds(gpu) == [kind]
            (race,) = gpu.races()
            assert race.first == f"{first} by early on rank 0 stream 1, operation 1"
            assert race.second == f"{second} by late on rank 0 stream 2, operation 1"
            assert race.memory == "x+16"
            gpu.library.fake_reset()
            x = gpu.memory(64, "x")


def test_reads_and_neighbours_do_not_race(gpu):
    x = gpu.memory(64, "x")
    for part in (x.part(0, 32), x.part(32, 32)):
        gpu.kernel(gpu.stream(0), "write", writes=[part])
    for _ in range(2):
        gpu.kernel(gpu.stream(1), "read elsewhere", reads=[gpu.memory(64, "y").part()])
    assert _kinds(gpu) == []


def test_every_pair_is_reported_once(gpu):
    x = gpu.memory(64, "x")
    for name in ("a", "b", "c"):
        gpu.kernel(gpu.stream(0), name, writes=[x.part(0, 20), x.part(10, 30)])
    gpu.drain()
    pairs = [(race.first.split()[2], race.second.split()[2]) for race in gpu.races()]
    assert sorted(set(pairs)) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert len({(race.first, race.second, race.memory) for race in gpu.races()}) == len(pairs)


def test_a_wait_binds_to_the_record_before_it(gpu):
    early, late, event = gpu.stream(0), gpu.stream(0), gpu.event(0)
    x, y = gpu.memory(8, "x"), gpu.memory(8, "y")
    gpu.kernel(early, "write x", writes=[x.part()])
    gpu.record(event, early)
    gpu.wait(late, event)
    gpu.kernel(early, "write y", writes=[y.part()])
    gpu.record(event, early)
    gpu.kernel(late, "read x", reads=[x.part()])
    assert _kinds(gpu) == []
    gpu.kernel(late, "read y", reads=[y.part()])
    assert _kinds(gpu) == ["RAW"], "the second record came after the wait"
    third = gpu.stream(0)
    gpu.wait(third, event)
    gpu.kernel(third, "read y too", reads=[y.part()])
    assert _kinds(gpu) == ["RAW"], "a later wait binds to the second record"


def test_an_event_that_was_never_recorded_is_over(gpu):
    early, late, event = gpu.stream(0), gpu.stream(0), gpu.event(0)
    x = gpu.memory(8, "x")
    gpu.kernel(early, "write", writes=[x.part()])
    gpu.wait(late, event)
    gpu.call("cuEventQuery", event)
    gpu.kernel(late, "read", reads=[x.part()])
    assert _kinds(gpu) == ["RAW"]


def test_the_host_is_ordered_by_synchronising(gpu):
    stream, x = gpu.stream(0), gpu.memory(8, "x")
    gpu.host(0, "fill", writes=[x.filled(1)])
    gpu.kernel(stream, "read", reads=[x.filled(1)], writes=[])
    gpu.kernel(stream, "write", writes=[x.filled(2)])
    assert gpu.drain() == []
    with gpu.rank(0):
        gpu.call("cuStreamQuery", _handle(stream))
    gpu.host(0, "look", reads=[x.filled(2)])
    assert _kinds(gpu) == [] and gpu.wrong_reads() == []
    gpu.kernel(stream, "write again", writes=[x.filled(3)])
    gpu.host(0, "look too early", reads=[x.part()])
    assert _kinds(gpu) == ["RAW"]
    gpu.host(1, "another rank", reads=[x.part()])
    assert "rank 1 host" in gpu.races()[-1].second, "what one rank's host knows, the other's does not"


def test_memory_shows_what_the_detector_says():
    """Without an edge and with delays, a reader sees old bytes now and then."""
    wrong = 0
    for seed in range(20):
        with Double(building.build()[0], 300, seed) as gpu:
            writer, reader, x = gpu.stream(0), gpu.stream(0), gpu.memory(8, "x")
            gpu.kernel(writer, "write", writes=[x.filled(1)])
            gpu.kernel(reader, "read", reads=[x.filled(1)])
            assert _kinds(gpu) == ["RAW"]
            wrong += bool(gpu.wrong_reads())
    assert wrong > 0


def test_handles_and_contexts_are_checked():
    with Double(building.build()[0]) as gpu:
        with pytest.raises(DoubleError) as no_context:
            gpu.made("cuStreamCreateWithPriority", 1, 0)
        assert no_context.value.code == 201
        stream, foreign, event = gpu.stream(0), gpu.event(1), gpu.event(0)
        with pytest.raises(DoubleError) as other_context:
            gpu.record(foreign, stream)
        assert other_context.value.code == 400
        gpu.call("cuEventDestroy_v2", event)
        with pytest.raises(DoubleError):
            gpu.wait(stream, event)
        x = gpu.memory(8, "x")
        gpu.kernel(stream, "write", writes=[x.filled(5)])
        gpu.call("cuStreamDestroy_v2", _handle(stream))
        with pytest.raises(DoubleError):
            gpu.kernel(stream, "late", writes=[x.filled(6)])
        assert gpu.drain() == [] and x.tobytes() == bytes([5]) * 8, "what was queued is carried out"


def test_null_mode_does_nothing():
    with Double(building.build()[0]) as gpu:
        gpu.library.fake_null(1)
        stream, event, x = gpu.stream(0), gpu.event(0), gpu.memory(8, "x")
        gpu.kernel(stream, "write", writes=[x.filled(1)])
        gpu.record(event, stream)
        gpu.call("cuEventQuery", event)
        assert gpu.drain() == [] and x.tobytes() == bytes(8)
