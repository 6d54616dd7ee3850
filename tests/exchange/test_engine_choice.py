"""Which way slots travel: all ranks choose alike, say so once, and can be told."""

import gc
import logging
import os
import subprocess
import sys
import textwrap
import time
import weakref

import numpy as np
import pytest
import ranks
import torch
from bare import Bare

import asyncdiff_fast
from asyncdiff_fast.environment import EXCHANGE_VARIABLE
from asyncdiff_fast.exchange import connecting, engine
from asyncdiff_fast.exchange.choice import Recv, Send, choose, open_exchange
from asyncdiff_fast.exchange.world import ExchangeError, World, start_process_group, stop_process_group

CPU = {"wanted": "", "device": "cpu", "host": ("a", 1), "missing": ""}
CUDA = CPU | {"device": "cuda"}
ELSEWHERE = {"host": ("b", 1)}
PUTS = {"wanted": "nccl-puts"}


@pytest.mark.parametrize(
    "reports, kind",
    [
        ([CPU, CPU], "shm"),
        ([CUDA, CUDA | ELSEWHERE], "nccl"),
        ([CPU, CPU | ELSEWHERE], "torch"),
        ([CPU, CPU | {"missing": "no compiler"}], "torch"),
        ([CPU, CUDA], "torch"),
        ([CPU | {"wanted": "torch"}] * 2, "torch"),
        ([CUDA | {"wanted": "torch"}] * 2, "torch"),
        ([CPU | {"wanted": "engine"}] * 2, "shm"),
        ([CUDA | PUTS] * 2, "nccl-puts"),
        ([CUDA | PUTS, CUDA | PUTS | ELSEWHERE], "nccl"),
        ([CPU | PUTS] * 2, "shm"),
        ([CUDA | PUTS, CUDA | PUTS | {"missing": "no compiler"}], "torch"),
    ],
)
def test_choice(reports, kind):
    assert choose(reports)[0] == kind


@pytest.mark.parametrize(
    "reports, words",
    [
        ([CPU, CPU | {"wanted": "torch"}], "must be the same on every rank"),
        ([CPU | {"wanted": "gloo"}] * 2, "engine or nccl-puts or torch: got 'gloo', 'gloo'"),
        (
            [CPU | {"wanted": "engine", "missing": "no compiler"}] * 2,
            "cannot be had: rank 0 has no engine: no compiler",
        ),
        ([CPU | {"wanted": "engine"}, CPU | ELSEWHERE | {"wanted": "engine"}], "several hosts"),
    ],
)
def test_refusals(reports, words):
    with pytest.raises(ExchangeError, match=words):
        choose(reports)


def _ways(rank):
    """The kind that each setting leads to, and what is logged."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    logger = logging.getLogger("asyncdiff_fast.exchange.choice")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    kinds = []
    for setting in ("", "", "torch", "engine"):
        os.environ[EXCHANGE_VARIABLE] = setting
        model = Bare()
        kinds.append(asyncdiff_fast.patch(model, num_stages=2, timeout_s=30).exchange_kind)
        asyncdiff_fast.unpatch(model)
    connect, connecting._transport = connecting._transport, _no_memory if rank == 1 else connecting._transport
    start_process_group(30)
    world = World(range(2), 30)
    os.environ[EXCHANGE_VARIABLE] = ""
    exchange = open_exchange(world, "cpu")
    kinds.append(exchange.kind)
    exchange.close()
    connecting._transport = connect
    stop_process_group()
    return kinds, records


def _no_memory(world, token):
    raise ExchangeError("shared memory between ranks: memfd_create: Operation not permitted")


def test_all_ranks_choose_alike_and_say_so_once():
    for kinds, records in ranks.run(2, _ways):
        assert kinds == ["shm", "shm", "torch.distributed", "shm", "torch.distributed"]
        assert [text for _, text in records] == [
            "asyncdiff_fast exchanges by shared memory: CPU tensors on one host",
            f"asyncdiff_fast exchanges by torch.distributed: {EXCHANGE_VARIABLE}=torch",
            "asyncdiff_fast exchanges by torch.distributed: rank 1: shared memory between ranks: "
            "memfd_create: Operation not permitted",
        ]


def _without_puts(rank):
    """(kind of exchange, what is logged) where rank 1 has no puts; shared memory stands in for NCCL's other way."""

    def connect(world, kind, device):
        def begin():
            if kind == "nccl-puts" and rank == 1:
                raise ExchangeError("libnccl.so.2 has no ncclPutSignal")

        connecting._together(world, kind, begin)
        return connecting.open_engine(world, "shm", torch.device("cpu"))

    connecting._connect_nccl = connect
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("asyncdiff_fast.exchange.choice")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    os.environ[EXCHANGE_VARIABLE] = "nccl-puts"
    start_process_group(30)
    for _ in range(2):
        exchange = open_exchange(World(range(2), 30), "cuda")
        exchange.close()
    stop_process_group()
    return exchange.kind, records


def test_without_puts_all_ranks_send_and_receive_and_say_so_once():
    for kind, records in ranks.run(2, _without_puts):
        assert kind == "shm"
        assert records == ["asyncdiff_fast exchanges by NCCL: rank 1: libnccl.so.2 has no ncclPutSignal"]


def _without_engine(rank):
    """As in an installation without a compiler."""
    engine._C, engine._why = None, "asyncdiff_fast._C is not built"
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    logging.getLogger("asyncdiff_fast").addHandler(handler)
    results = []
    for _ in range(2):
        model = Bare()
        runtime = asyncdiff_fast.patch(model, num_stages=2, warmup_steps=1, timeout_s=30)
        with torch.no_grad():
            x = torch.ones(1, 4, 8, 8)
            for t in (900, 700, 500):
                x = model(x, t)
        results.append((runtime.exchange_kind, x))
        asyncdiff_fast.unpatch(model)
    return results, [record for record in records if record[0] == "WARNING"]


def test_without_the_engine_torch_distributed_takes_its_place_and_says_so_once():
    (first, warnings), (second, others) = ranks.run(2, _without_engine)
    assert {kind for kind, _ in first + second} == {"torch.distributed"}
    assert all(torch.equal(x, first[0][1]) for _, x in first + second)
    assert len(warnings) == 1 and "torch.distributed: rank 0 has no engine" in warnings[0][1]
    assert not others, "one rank speaks for all"


def _wrong_slots(rank):
    start_process_group(30)
    exchange = open_exchange(World(range(2), 30), "cpu")
    uneven, meta = (torch.zeros(2), torch.zeros(3)), (torch.zeros(2, device="meta"),) * 2
    found = []
    for buffers in (uneven, meta):
        with pytest.raises(ValueError) as refusal:
            exchange.slot("odd", [Send(1 - rank, buffers)], [Recv(1 - rank, buffers)])
        found.append(str(refusal.value))
    exchange.close()
    stop_process_group()
    return found


def test_buffers_must_fit_the_exchange():
    for uneven, meta in ranks.run(2, _wrong_slots):
        assert "buffers of one size" in uneven and "[8, 12] bytes" in uneven
        assert "is on meta; this exchange moves tensors on cpu" in meta


def _dropped(rank):
    """Forgets an exchange under way, alone or in a ring of references; what was left of the channel as buffers went."""
    found = []
    for ring in (False, True):
        start_process_group(30)
        exchange = open_exchange(World(range(2), 30), "cpu")
        # Memory whose end can be seen; the one of weak references to tensors in a ring comes before.
        blocks = [np.zeros(1 << 20, np.float32) for _ in range(4)]
        buffers = tuple(map(torch.from_numpy, blocks))
        slot = exchange.slot("big", [Send(1 - rank, buffers[:2])], [Recv(1 - rank, buffers[2:])])
        exchange.freeze("phase")
        exchange.post(slot)
        # A rank that has left takes no more posts.
        exchange.world.gather(None, "posts")
        channel = exchange._channel
        for block in blocks:
            weakref.finalize(block, lambda c=channel: found.append(c.broken()))
        del block, blocks, buffers, channel
        if ring:
            exchange.world.ring = slot.ring = exchange
        del exchange, slot
        gc.collect()
        stop_process_group()
    return found


def test_buffers_outlive_a_forgotten_exchange():
    for found in ranks.run(2, _dropped):
        assert len(found) == 8
        assert all("has left the exchange" in reason for reason in found)


def _raises(rank):
    """One rank alone raises in a step; (type and text of what each sees, seconds)."""
    model = Bare()
    asyncdiff_fast.patch(model, num_stages=2, warmup_steps=1, timeout_s=60)
    if rank == 1:
        model.last.register_forward_pre_hook(lambda *_: 1 / 0 if calls[0] == 3 else None)
    calls, began, seen = [0], time.monotonic(), None
    try:
        with torch.no_grad():
            x = torch.ones(1, 4, 8, 8)
            for t in range(900, 0, -100):
                calls[0] += 1
                x = model(x, t)
    except Exception as error:
        seen = type(error).__name__, str(error)
    took = time.monotonic() - began
    asyncdiff_fast.unpatch(model)
    return seen, took


def test_an_error_on_one_rank_reaches_the_others_at_once():
    (other, seconds), (own, _) = ranks.run(2, _raises)
    assert own == ("ZeroDivisionError", "division by zero")
    assert other[0] == "ExchangeError" and "rank 1" in other[1] and "ZeroDivisionError" in other[1]
    assert seconds < 20


def test_a_process_that_never_unpatches_ends_quietly():
    script = """
        import torch, asyncdiff_fast
        from bare import Bare
        model = Bare()
        asyncdiff_fast.patch(model, num_stages=2, warmup_steps=1, timeout_s=30)
        x = torch.ones(1, 4, 8, 8)
        with torch.no_grad():
            for t in (900, 700, 500, 300):
                x = model(x, t)
        print("sum", float(x.sum()))
    """
    runner = "import sys; from asyncdiff_fast.commands.launch import launch; sys.exit(launch(2, sys.argv[1:]))"
    path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"asyncdiff_fast_exit_{os.getpid()}.py")
    with open(path, "w") as file:
        file.write(textwrap.dedent(script))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    try:
        done = subprocess.run(
            [sys.executable, "-c", runner, "--", path], capture_output=True, text=True, timeout=120, env=environment
        )
    finally:
        os.remove(path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum") == 2 and "Traceback" not in done.stderr and "rror" not in done.stderr


def test_host_is_the_same_for_processes_of_one_machine():
    there = subprocess.run(
        [sys.executable, "-c", "from asyncdiff_fast.exchange.connecting import host; print(repr(host()))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert there.stdout.strip() == repr(connecting.host())
