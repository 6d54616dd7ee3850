"""One process in front of two workers: calls, exceptions, cancelling, deaths, and nothing left behind."""

import functools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pipelines_to_load
import pytest
import torch

import asyncdiff_fast
from asyncdiff_fast.workers.messages import Done, send
from asyncdiff_fast.workers.process import NEVER, WANTED, Bar
from asyncdiff_fast.workers.team import Team

STEPS, SIZE = 6, dict(height=32, width=32)


@pytest.fixture(scope="module")
def workers():
    # Every block is as long as the tolerance of zero allows, so the picture is the exact one.
    with asyncdiff_fast.Workers(pipelines_to_load.sd15, nproc=2, parallel_steps=2, tolerance=0.0) as pipe:
        yield pipe


def draw(pipe, **kwargs):
    generator = torch.Generator().manual_seed(7)
    made = pipe("a red star", num_inference_steps=STEPS, generator=generator, output_type="np", **SIZE, **kwargs)
    return made.images[0]


@functools.cache
def alone():
    torch.set_num_threads(1)
    return draw(pipelines_to_load.sd15())


def seen_by(pipe, at=None, act=None):
    """[(step, total)] of a call that is shown to a function, which acts at a step."""
    seen = []

    def show(step, total):
        seen.append((step, total))
        if step == at:
            act()

    return seen, functools.partial(draw, pipe, progress=show)


def test_a_call_gives_the_picture_and_shows_its_steps(workers):
    seen, call = seen_by(workers)
    np.testing.assert_allclose(call(), alone(), atol=1e-5)
    assert seen == [(step, STEPS) for step in range(1, STEPS + 1)]
    stats = workers.stats()
    assert repr(workers) == "<Workers: 2 processes, parallel_steps=2>"
    assert len(stats) == 2 and stats[0][0]["steps"]["exact_steps"] > 0


def test_an_exception_of_the_pipeline_comes_back(workers):
    with pytest.raises(ValueError, match="has to be of type `str` or `list`") as caught:
        workers(3, num_inference_steps=STEPS, **SIZE)
    assert "pipeline_stable_diffusion.py" in str(caught.value.__cause__)
    np.testing.assert_allclose(draw(workers), alone(), atol=1e-5)


def test_what_cannot_travel_is_refused_before_anything_is_sent(workers):
    with pytest.raises(TypeError, match=r"callback_on_step_end must be picklable.*<lambda>"):
        workers("a red star", callback_on_step_end=lambda *_: {})
    with pytest.raises(TypeError, match=r"argument 0 must be picklable.*got generator"):
        workers(prompt for prompt in ["a red star"])
    np.testing.assert_allclose(draw(workers), alone(), atol=1e-5)


def test_what_one_worker_alone_raises_ends_the_call_and_not_the_process_in_front(workers):
    pids, began = [worker.pid for worker in workers._team._processes], time.monotonic()
    with pytest.raises(RuntimeError, match="SystemExit: enough"):
        draw(workers, callback_on_step_end=pipelines_to_load.leave)
    # The other one does not wait for it, and so is not ended either.
    assert time.monotonic() - began < 8
    np.testing.assert_allclose(draw(workers), alone(), atol=1e-5)
    assert [worker.pid for worker in workers._team._processes] == pids


class _Cancelling:
    """A worker's end of the team, at which a call is cancelled as soon as it has been sent."""

    def __init__(self, pipe, cancel):
        self._pipe, self._cancel, self.fileno = pipe, cancel, pipe.fileno

    def send_bytes(self, message):
        self._pipe.send_bytes(message)
        self._cancel()

    def recv_bytes(self):
        return self._pipe.recv_bytes()


def test_a_call_can_be_cancelled_once_it_was_sent():
    """However soon: whoever closes the workers would else wait for the whole picture."""
    here, there = multiprocessing.Pipe()
    team = Team.__new__(Team)
    team._stop_at, team._busy, team._processes = types.SimpleNamespace(value=NEVER), False, []
    team._pipes = [_Cancelling(here, team.cancel)]
    send(there, Done("a picture"))
    assert team.ask(b"", None) == ["a picture"]
    assert team._stop_at.value == WANTED and not team._busy


def test_a_call_is_cancelled_and_the_next_one_is_right(workers):
    seen, call = seen_by(workers, at=1, act=workers.cancel)
    with pytest.raises(asyncdiff_fast.Cancelled, match=f"of {STEPS} steps"):
        call()
    # A block of two steps, and two more.
    assert len(seen) <= 1 + 2 + 2
    np.testing.assert_allclose(draw(workers), alone(), atol=1e-5)


def test_ctrl_c_stops_a_call_and_leaves_the_workers(workers):
    # A worker of pytest-xdist ignores it otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    pids = [worker.pid for worker in workers._team._processes]
    _, call = seen_by(workers, at=2, act=lambda: signal.raise_signal(signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        signal.signal(signal.SIGINT, before)
    np.testing.assert_allclose(draw(workers), alone(), atol=1e-5)
    assert [worker.pid for worker in workers._team._processes] == pids


def test_a_worker_that_dies_ends_the_call_and_the_next_starts_new_ones(workers):
    old = [worker.pid for worker in workers._team._processes]
    _, call = seen_by(workers, at=2, act=lambda: os.kill(old[1], signal.SIGKILL))
    began = time.monotonic()
    with pytest.raises(asyncdiff_fast.ExchangeError, match=r"died|exit code -9"):
        call()
    # Not after the 120 s that ranks wait for one that hangs.
    assert time.monotonic() - began < 60
    np.testing.assert_allclose(draw(workers), alone(), atol=1e-5)
    assert not {worker.pid for worker in workers._team._processes} & set(old)


def test_threads_take_turns(workers):
    results = []
    threads = [threading.Thread(target=lambda: results.append(draw(workers, progress=False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 3
    for result in results:
        np.testing.assert_allclose(result, alone(), atol=1e-5)


def test_fifty_calls_leave_nothing_behind(workers):
    for _ in range(50):
        workers("a red star", num_inference_steps=2, output_type="latent", progress=False, **SIZE)
    assert len(os.listdir(f"/proc/{workers._team._processes[0].pid}/fd")) < 100
    assert threading.active_count() < 10


def test_what_load_raises_comes_back():
    with pytest.raises(OSError, match="damaged weights"):
        asyncdiff_fast.Workers(pipelines_to_load.broken, nproc=1)


@pytest.mark.parametrize(
    ("load", "options", "error", "said"),
    [
        ("no/such/folder", {}, ValueError, "no such folder"),
        (3, {}, TypeError, "got int"),
        (lambda: None, {}, TypeError, "load must be picklable.*<lambda>.*by its name in a module"),
        (functools.partial(lambda x: x, 3), {}, TypeError, "load must be picklable.*<lambda>"),
        (pipelines_to_load.sd15, {"nproc": 3, "num_stages": 2}, ValueError, "pass nproc=2"),
        (pipelines_to_load.sd15, {"steps": 2}, TypeError, "steps"),
        (pathlib.Path(__file__).parent, {}, ValueError, "without a model_index.json"),
        *((pipelines_to_load.sd15, {"nproc": n}, ValueError, "a whole number of processes") for n in (0, "2", 1.5)),
    ],
)
def test_what_cannot_be_started_is_refused(load, options, error, said):
    with pytest.raises(error, match=said):
        asyncdiff_fast.Workers(load, **options)


NOTEBOOK = """
import signal, sys, asyncdiff_fast, pipelines_to_load
if __name__ == "__main__":
    pipe = asyncdiff_fast.Workers(pipelines_to_load.sd15, nproc=2)
    print(*[worker.pid for worker in pipe._team._processes], flush=True)
    signal.pause()
"""


def test_workers_end_with_the_process_in_front(tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text(NOTEBOOK)
    support = pathlib.Path(pipelines_to_load.__file__).parent
    front = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(support)}
    )
    pids = [int(pid) for pid in front.stdout.readline().split()]
    assert len(pids) == 2
    front.kill()
    front.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_all_ranks_stop_at_the_step_that_the_first_one_names():
    class StopAt:
        value = WANTED

    stop_at, said = StopAt(), []
    ahead, first = Bar(stop_at, None, 2, total=9), Bar(stop_at, said.append, 2, total=9)
    ahead.update(3)
    first.update()
    assert stop_at.value == 1 + 2 + 1
    for bar, steps in ((ahead, 1), (first, 3)):
        with pytest.raises(asyncdiff_fast.Cancelled, match="after 4 of 9 steps"):
            for _ in range(steps):
                bar.update()
    stop_at.value = NEVER
    assert len([item for item in Bar(stop_at, None, 1, range(20))]) == 20
