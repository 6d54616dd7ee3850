"""Which processes of the other ranks live, as far as this host tells: what a wait for them looks at."""

import functools
import os
import pathlib


@functools.cache
def host():
    """The same for processes that see each other's memory and numbers, different for all others."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return "no /proc", str(os.getpid())


def has_launcher():
    """True if whoever started these ranks, torchrun say, keeps their store and looks after them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _stat(pid):
    """(state, parent, start time) of a process; None if it is gone."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])


def _command(pid):
    """A process's command line; empty if it is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def identity():
    """What other ranks need to look after this process: its host, number and start time."""
    try:
        return [*host(), os.getpid(), _stat(os.getpid())[2]]
    except (OSError, TypeError):
        return [*host(), os.getpid(), 0]


def has_ended(process):
    """True if a process, as its `identity` tells, ran on this host and has ended."""
    *where, pid, started = process
    if tuple(where) != host() or not started:
        return False
    try:
        found = _stat(pid)
    except OSError:
        # Out of descriptors, say: nothing is known.
        return False
    return found is None or found[0] in "ZX" or found[2] != started


class Siblings:
    """Processes that this one's parent has started with the same command line: very likely the other ranks.

    One of them that ends before its rank has made itself known leaves no other trace.
    """

    def __init__(self):
        self._known, self._one_ended = self._alive() or {}, False

    @staticmethod
    def _alive():
        """{pid: start time} of those alive now; None where this cannot be told."""
        try:
            mine = pathlib.Path("/proc/self/cmdline").read_bytes()
            tasks = pathlib.Path(f"/proc/{os.getppid()}/task").glob("*/children")
            children = [int(pid) for task in tasks for pid in task.read_text().split()]
            found = {pid: _stat(pid) for pid in children if pid != os.getpid()}
            living = {pid: stat[2] for pid, stat in found.items() if stat and stat[0] not in "ZX"}
            return {pid: started for pid, started in living.items() if _command(pid) == mine}
        except (OSError, ValueError):
            return None

    def too_few(self, come, num_missing):
        """True if one has ended that was none of those `come` (pids), and fewer are left than ranks are missing."""
        now = self._alive()
        if now is None:
            return False
        gone = [pid for pid, started in self._known.items() if now.get(pid) != started and pid not in come]
        self._known = {pid: s for pid, s in self._known.items() if pid not in gone} | now
        self._one_ended |= bool(gone)
        return self._one_ended and sum(pid not in come for pid in now) < num_missing
