"""The ranks that share one patched denoiser: what they agree on, through the store of torch.distributed.

Agreement is rare (once at `patch`, once for each new plan, once per generation), so it goes through the key-value store
and not through a process group: it works before any group exists, after one has failed, and it knows who is missing.
"""

import itertools
import os
import pickle
import queue
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


class ExchangeError(RuntimeError):
    """Another rank died, hung, or did something else than this one; the message names it."""


def device():
    """The device of this rank: `cuda:LOCAL_RANK` where there is CUDA, else `cpu`."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


# How long the keeper of the store waits for others to have read an answer.
READ_PATIENCE_S = 5.0
_counters = {}
_users = _starts = 0
_store = None


def start_process_group(timeout_s):
    """Start torch.distributed from torchrun's environment if nobody has; counts one user of a group started here."""
    global _users, _starts
    if dist.is_available() and not dist.is_initialized() and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        _starts += 1
        store = _meet(rank, size, timeout_s)
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        limit = timedelta(seconds=timeout_s)
        _connect(
            rank,
            [r for r in range(size) if r != rank],
            timeout_s,
            lambda: dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit),
        )
        _users = 1
    elif _users:
        _users += 1


def _meet(rank, size, timeout_s):
    """The store for a new group, once all ranks have come. Raises: ExchangeError that names those which have not."""

    def join():
        global _store
        # One store for the life of the process: a second group starts while other ranks still leave the first. It is
        # told of one rank only, so as not to wait for the others: below they are missed by name.
        _store = _store or next(rendezvous("env://?world_size=1", timeout=timedelta(seconds=timeout_s)))[0]
        store = dist.PrefixStore(f"start {_starts}", _store)
        store.set(f"here/{rank}", b"")
        return store, _answers(store, "here", [r for r in range(size) if r != rank], timeout_s)[1]

    try:
        store, missing = _within(timeout_s + 1, join)
    except (RuntimeError, TimeoutError):
        missing = [0]
    if missing:
        raise ExchangeError(
            f"rank {rank} waited {timeout_s:g} s for rank {', '.join(map(str, missing))} to call patch(); it died, "
            "hangs, or does not run the same script; see its log, or raise timeout_s"
        )
    return store


def _connect(rank, others, timeout_s, start):
    """What `start()` returns. Raises: ExchangeError if torch.distributed does not reach the others in time."""
    try:
        return _within(timeout_s + 1, start)
    except (RuntimeError, TimeoutError) as error:
        raise ExchangeError(
            f"rank {rank} waited {timeout_s:g} s for rank {', '.join(map(str, others))} to connect by "
            f"torch.distributed and failed: {str(error).splitlines()[0]}; a rank died or hangs: see its log, or raise "
            "timeout_s"
        ) from error


def _within(seconds, ask):
    """What `ask()` returns or raises, or TimeoutError. In a thread: calls of a store never end if its host stops."""
    results = queue.SimpleQueue()

    def run():
        try:
            results.put((ask(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def _answers(store, prefix, peers, timeout_s):
    """({peer: what it wrote}, peers that did not write in time)."""
    found, missing, deadline = {}, [], time.monotonic() + timeout_s
    for peer in peers:
        try:
            store.wait([f"{prefix}/{peer}"], timedelta(seconds=max(0.05, deadline - time.monotonic())))
            found[peer] = store.get(f"{prefix}/{peer}")
        except RuntimeError:
            missing.append(peer)
    return found, missing


def stop_process_group():
    """One user less; the last one destroys a group that was started here, never somebody else's."""
    global _users
    if _users:
        _users -= 1
        if _users == 0 and dist.is_initialized():
            dist.destroy_process_group()


class World:
    """Ranks of one mesh dimension. `rank` and `size` count within it; `ranks` are torch.distributed's numbers."""

    def __init__(self, ranks, timeout_s):
        self.ranks, self.timeout_s = tuple(ranks), timeout_s
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank()) if self.size > 1 else 0
        self._sequence, self._groups = itertools.count(), itertools.count()
        self._old_keys = []
        # Without a launcher's, the first process keeps the store.
        self._keeps_store = self.ranks[self.rank] == 0 and "TORCHELASTIC_RUN_ID" not in os.environ
        if self.size > 1:
            number = _counters.setdefault(self.ranks, itertools.count())
            self._name = f"asyncdiff_fast/{'-'.join(map(str, self.ranks))}/{next(number)}"
            self._store = dist.PrefixStore(self._name, dist.distributed_c10d._get_default_store())

    def gather(self, value, what):
        """Every rank's `value`, in rank order. Collective.

        Raises: ExchangeError that names the ranks which did not answer in time.
        """
        if self.size == 1:
            return [value]
        step = next(self._sequence)

        peers, ends = [r for r in range(self.size) if r != self.rank], time.monotonic() + self.timeout_s

        def ask():
            self._store.set(f"{step}/{self.rank}", pickle.dumps((what, value)))
            answers = _answers(self._store, step, peers, self.timeout_s)
            if not answers[1]:
                self._store.set(f"read {step}/{self.rank}", b"")
                self._forget(f"{step}/{self.rank}", f"read {step}/{self.rank}")
                if self._keeps_store:
                    # This process may end now, and the store with it.
                    _answers(self._store, f"read {step}", peers, min(READ_PATIENCE_S, ends - time.monotonic()))
            return answers

        try:
            found, missing = _within(self.timeout_s + 1, ask)
        except (RuntimeError, TimeoutError):
            # The store is lost. Without a launcher's, rank 0 keeps it.
            found, missing = {}, [0]
        if missing:
            raise ExchangeError(
                f"rank {self.rank} waited {self.timeout_s:g} s for rank {', '.join(map(str, missing))} to agree on "
                f"{what}; it died, hangs, or does not run the same script; see its log, or raise timeout_s"
            )
        answers = [(what, value) if r == self.rank else pickle.loads(found[r]) for r in range(self.size)]
        others = {w for w, _ in answers} - {what}
        if others:
            raise ExchangeError(
                f"ranks are at different places: rank {self.rank} agrees on {what}, others on {', '.join(others)}"
            )
        return [v for _, v in answers]

    def broadcast(self, value, what):
        """Rank 0's `value` on every rank. Collective."""
        return self.gather(value if self.rank == 0 else None, what)[0]

    def _forget(self, *keys):
        """Delete this rank's keys of two rounds ago: everybody has read them, since everybody has written later."""
        self._old_keys.append(keys)
        if len(self._old_keys) > 2:
            for key in self._old_keys.pop(0):
                self._store.delete_key(key)

    def new_store(self, name):
        """A key-value store of these ranks for one purpose; the same on every rank. Collective in its order."""
        return dist.PrefixStore(f"{name} {next(self._groups)}", self._store)

    def new_group(self):
        """A process group of these ranks for the exchange alone, apart from everybody else's traffic. Collective."""
        # The exchange waits `timeout_s` itself and names the peer; the group's own limit only comes after that.
        limit, c10d = timedelta(seconds=2 * self.timeout_s), dist.distributed_c10d
        backend = c10d._world.pg_map[c10d._get_default_group()][0]
        # Not `new_group`: it may name a group as one destroyed before, whose addresses are still in the store.
        name = f"{self._name}/group {next(self._groups)}"
        group, _ = _connect(
            self.rank,
            [r for r in range(self.size) if r != self.rank],
            self.timeout_s,
            lambda: c10d._new_process_group_helper(
                self.size, self.rank, list(self.ranks), c10d.Backend(backend), self._store, name, timeout=limit
            ),
        )
        c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(self.ranks)}
        return group
