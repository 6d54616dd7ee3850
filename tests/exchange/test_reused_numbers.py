"""The number of a process may go to another one: that is not the rank that had it."""

import os
import pathlib
import signal
import threading
import time

import pytest
import shm_ranks


def _number_again(pid):
    """A new process with the number of one that has ended; None where the system does not let us choose."""
    for _ in range(50):
        try:
            pathlib.Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        except OSError:
            return None
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        if child == pid:
            return child
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return None


def _outlived(rank):
    """Rank 1 dies and its number goes to another process: what rank 0 then says, without pidfds."""
    pids = rank.meet(os.getpid())
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pids[1]}") and time.monotonic() < deadline:
        time.sleep(0.001)
    again = _number_again(pids[1])
    try:
        return again and rank.error(_busy_for_a_while, rank.channel.check)[0]
    finally:
        if again:
            os.kill(again, signal.SIGKILL)
            os.waitpid(again, 0)


def _busy_for_a_while(action):
    for _ in range(200):
        action()
        time.sleep(0.01)


def test_another_process_with_the_number_of_a_dead_rank_does_not_stand_in_for_it():
    started = shm_ranks.Started(2, _outlived, pidfd=False)
    threading.Thread(target=started.processes[1].join, daemon=True).start()
    text, _ = started.results()
    if text is None:
        pytest.skip("this system does not let a test choose the number of a process")
    assert f"its process {started.processes[1].pid} died" in text
