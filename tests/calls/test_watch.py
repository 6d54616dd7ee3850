"""Watching of schedulers' classes: from several threads at once."""

import sys
import threading

import diffusers
import pytest
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from asyncdiff_fast.calls import watch


@pytest.fixture
def often():
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_that_begin_at_once_all_see_every_class(often):
    """None goes on while another is still about to watch the classes."""
    for name in ("DDIM", "DDPM", "DEISMultistep", "EulerDiscrete", "HeunDiscrete", "PNDM", "UniPCMultistep"):
        getattr(diffusers, f"{name}Scheduler")
    steps = {cls: cls.__dict__["step"] for cls in watch.subclasses(SchedulerMixin) if "step" in cls.__dict__}
    gate, missed = threading.Barrier(4, timeout=60), []

    def one():
        for _ in range(200):
            gate.wait()
            watch.watch_schedulers()
            missed.extend(cls.__name__ for cls, step in steps.items() if cls.__dict__["step"] is step)
            gate.wait()
            watch.unwatch_schedulers()

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not missed
    assert all(cls.__dict__["step"] is step for cls, step in steps.items())
