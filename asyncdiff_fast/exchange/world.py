"""The ranks that share one patched denoiser, and what they agree on, through the store of torch.distributed.

Agreement is rare (a few times at `patch`, once for each new plan, once or twice a generation), so it goes through the
key-value store and not through a process group: it works before any group exists, after one has failed, and it knows
who is missing.
"""

import itertools
import os
import re
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import ExchangeError
from .meeting import connect, meet
from .passing import Passing
from .presence import Missing
from .processes import has_launcher
from .rounds import Rounds


def device():
    """The device of this rank: `cuda:LOCAL_RANK` where there is CUDA, else `cpu`."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


# In messages that name the cause.
_KNOWN = re.compile(r"has left|its process (\d+ died|has ended)")
# How long a rank that fails waits for what others say of it.
EXPLAINED_S = 1.0
# {ranks: (store, `Rounds`)}: worlds of the same ranks have the same epochs.
_rounds = {}
_users = 0


def start_process_group(timeout_s):
    """Start torch.distributed from torchrun's environment if nobody has; counts one user of a group started here."""
    global _users
    if dist.is_available() and not dist.is_initialized() and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = meet(rank, size, timeout_s)
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        limit = timedelta(seconds=timeout_s)
        connect(
            rank,
            [r for r in range(size) if r != rank],
            timeout_s,
            lambda: dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit),
        )
        _users = 1
    elif _users:
        _users += 1


def stop_process_group():
    """One user less; the last one destroys a group that was started here, never somebody else's."""
    global _users
    if _users:
        _users -= 1
        if _users == 0 and dist.is_initialized():
            dist.destroy_process_group()


class World:
    """Ranks that share something. `rank` and `size` count among them; `ranks` are torch.distributed's numbers.

    `calls` is the number of this rank's calls in the generation under way, which the others are told at its end.
    """

    def __init__(self, ranks, timeout_s, parent=None):
        self.ranks, self.timeout_s = tuple(ranks), timeout_s
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank()) if self.size > 1 else 0
        self._whole, self._children, self._number = parent or self, itertools.count(), ""
        self._epoch, self.calls = 0, 0
        self._place, self._old = (0, itertools.count()), []
        if parent is not None:
            self._number = f"{next(parent._children)}/"
        elif self.size > 1:
            self._rounds = _rounds_of(self.ranks)

    def along(self, ranks):
        """Some of these ranks, this one among them, which agree in the same epochs. Collective in its order."""
        return World(ranks, self.timeout_s, self._whole)

    @property
    def name(self):
        """This rank's number in torch.distributed: what messages call it."""
        return self.ranks[self.rank]

    def begin(self, value, what):
        """Every rank's `value`, in rank order, at the beginning of something, whatever became of what came before.

        Collective. Raises: ExchangeError that names the ranks which did not answer in time, or have died or left.
        """
        if self.size == 1:
            return [value]
        self.calls = 0
        began = time.monotonic()
        try:
            self._epoch, found = self._rounds.begin(value, what, self.timeout_s)
        except Missing as missing:
            raise self._lost(missing, what, began) from missing.__cause__
        self._forget(f"{self._epoch}/begin")
        return found

    def may_begin(self):
        """True on the first of these ranks; on the others once that one has begun an epoch which this rank has not."""
        if self.rank == 0:
            return True
        try:
            return self._whole._rounds.presence.at(self.ranks[0]) > self._whole._rounds.epoch
        except RuntimeError:
            # The store is lost, which `begin` will tell.
            return True

    def gather(self, value, what):
        """Every rank's `value`, in rank order. Collective; the first is a `begin`. Raises as `begin`."""
        if self.size == 1:
            return [value]
        whole = self._whole
        if whole is self and not self._epoch:
            return self.begin(value, what)
        key, began = f"{whole._epoch}/{self._number}{self._next()}", time.monotonic()
        try:
            found = whole._rounds.gather(key, value, what, self.ranks, self.timeout_s)
        except Missing as missing:
            raise self._lost(missing, what, began) from missing.__cause__
        self._forget(key)
        return found

    def broadcast(self, value, what):
        """Rank 0's `value` on every rank. Collective."""
        return self.gather(value if self.rank == 0 else None, what)[0]

    def look(self):
        """Raises ExchangeError if another rank has died, left or ended what is under way. For those who wait."""
        whole = self._whole
        if whole.size > 1 and whole._epoch:
            whole._rounds.presence.look(whole._epoch, whole.calls, whole.ranks)

    def passing(self):
        """What these ranks tell each other in passing, in the epoch that has begun: a `Passing`."""
        return Passing(self._rounds.store, self.name, self.ranks, self._epoch)

    def leave(self, why=None, after_calls=False):
        """Tell the others that this rank makes no more calls in this epoch; `why` if that is a failure. Never waits.

        Args:
            after_calls: the failure is none to those who make no more calls than this rank has made.
        """
        whole = self._whole
        if whole.size > 1 and whole._epoch:
            told = [whole.calls, why] if after_calls else whole.calls if why is None else why
            whole._rounds.presence.leave(whole._epoch, told)

    def explained(self, error):
        """An ExchangeError with what others say of it, who have failed at the same time and may know the cause."""
        whole = self._whole
        if whole.size < 2 or not whole._epoch or _KNOWN.search(str(error)):
            return error
        others = whole._rounds.presence.reasons(whole._epoch, whole.ranks, EXPLAINED_S)
        return ExchangeError("; ".join([str(error), *others]), ended=error.ended) if others else error

    def _lost(self, missing, what, began):
        seconds = time.monotonic() - began
        return ExchangeError(
            f"rank {self.name} waited {seconds:.3g} s for {missing} to agree on {what}; {missing.fate}"
        )

    def _next(self):
        """Number of the next round in this epoch."""
        if self._place[0] != self._whole._epoch:
            self._place = self._whole._epoch, itertools.count()
        return next(self._place[1])

    def _forget(self, key):
        """Delete this rank's words of two rounds ago: everybody has read them, since everybody has spoken later."""
        self._old.append(key)
        if len(self._old) > 2:
            self._whole._rounds.forget(self._old.pop(0))

    def new_store(self, name):
        """A key-value store of these ranks for one purpose; the same on every rank. Collective in its order."""
        return dist.PrefixStore(f"{name} {self._new_place()}", self._whole._rounds.store)

    def _new_place(self):
        """A name that these ranks use once, all of them alike."""
        if not self._whole._epoch:
            self._whole.begin(None, "an exchange")
        return f"{'-'.join(map(str, self.ranks))}/{self._whole._epoch}/{self._number}{self._next()}"

    def new_group(self):
        """A process group of these ranks for the exchange alone, apart from everybody else's traffic. Collective."""
        # The exchange waits `timeout_s` itself and names the peer; the group's own limit only comes after that.
        limit, c10d = timedelta(seconds=2 * self.timeout_s), dist.distributed_c10d
        backend = c10d._world.pg_map[c10d._get_default_group()][0]
        # Not `new_group`: it may name a group as one destroyed before, whose addresses are still in the store.
        name, store = f"asyncdiff_fast {self._new_place()}", self._whole._rounds.store
        group, _ = connect(
            self.name,
            [r for r in self.ranks if r != self.name],
            self.timeout_s,
            lambda: c10d._new_process_group_helper(
                self.size, self.rank, list(self.ranks), c10d.Backend(backend), store, name, timeout=limit
            ),
        )
        c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(self.ranks)}
        return group


def _rounds_of(ranks):
    """The `Rounds` of some ranks in today's default group."""
    store = dist.distributed_c10d._get_default_store()
    if ranks not in _rounds or _rounds[ranks][0] is not store:
        # Without a launcher's, the first process keeps the store.
        keeps = dist.get_rank() == 0 and not has_launcher()
        place = dist.PrefixStore(f"asyncdiff_fast/{'-'.join(map(str, ranks))}", store)
        known = _rounds.get(ranks)
        _rounds[ranks] = store, Rounds(place, dist.get_rank(), ranks, keeps)
        # A user's second group may have the same store underneath.
        _rounds[ranks][1].epoch = known[1].epoch if known else 0
    return _rounds[ranks][1]
