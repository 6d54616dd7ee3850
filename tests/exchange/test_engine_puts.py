"""One-sided puts as the package opens them: on the double, with a thread for each rank and tensors of the host."""

import threading

import building
import pytest
import torch
from channels import connect
from double import Double

from asyncdiff_fast.exchange.connecting import try_puts
from asyncdiff_fast.exchange.engine import Engine


class _World:
    """One of several ranks in a process; `meeting` is shared."""

    def __init__(self, rank, size, meeting):
        self.rank, self.size, self.ranks, self.timeout_s = rank, size, tuple(range(size)), 20
        self.name = rank
        self._barrier, self._values = meeting

    def gather(self, value, _):
        self._values[self.rank] = value
        self._barrier.wait(20)
        found = list(self._values)
        self._barrier.wait(20)
        return found


class _HostEngine(Engine):
    """An engine whose device is the double."""

    def __init__(self, world, rank):
        super().__init__(world, "nccl-puts", torch.device("cpu"), rank.channel)
        self.compute = rank.compute

    def _stream(self):
        return self.compute


def _try(gpu, size, timeout_s=20):
    """What the first put gives on each rank: None or the text of an error."""
    ranks = connect(gpu, building.load()[1], size, timeout_s, puts=True)
    meeting, errors = (threading.Barrier(size), [None] * size), [None] * size

    def play(rank):
        with gpu.rank(rank.rank):
            engine = _HostEngine(_World(rank.rank, size, meeting), rank)
            try:
                # Twice: what the first leaves behind, signals of a phase that is gone, is not taken for the second's.
                for _ in range(2):
                    try_puts(engine, "cpu")
            except RuntimeError as error:
                errors[rank.rank] = str(error)
                engine.abort("over")
            engine.close(0)

    threads = [threading.Thread(target=play, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("size", [2, 4])
def test_a_first_put_arrives_everywhere(size):
    with Double(building.build()[0], 200, 1) as gpu:
        assert _try(gpu, size) == [None] * size
        assert gpu.drain() == [] and gpu.misuses() == []


def test_a_window_that_one_rank_is_refused_fails_on_all():
    with Double(building.build()[0]) as gpu:
        gpu.library.fake_refuse_windows(1)
        first, second = _try(gpu, 2, timeout_s=0.5)
        assert "rank 1, slot 'one number' (exchange 0): ncclCommWindowRegister: unhandled" in second
        assert "rank 0, slot 'one number'" in first and "(exchange 0): found no connection" in first
