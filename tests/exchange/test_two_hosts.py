"""Ranks on two hosts: the same picture, a slow cable, a cut one; and shared memory beside torch.distributed."""

import json
import sys
import time

import pytest
import torch
import two_hosts
from bare import Bare, noise

REASON = two_hosts.why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=REASON or "")]
TIMEOUT_S = 10


@torch.no_grad()
def _alone():
    model, x = Bare(), torch.cat((noise(0, 16), noise(1, 16)))
    for t in torch.linspace(900, 50, 8):
        x = x - 0.05 * model(x, t)
    return x.double().sum().item()


def _command(options, generations, flag=""):
    return [two_hosts.__file__, json.dumps(options), str(generations), *([flag] if flag else [])]


def _torchrun(hosts, options, generations, flag=""):
    """A rank on each host, each by its own torchrun."""
    place = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", two_hosts.ADDRESSES[0]]
    launcher = [sys.executable, "-m", "torch.distributed.run", *place, "--master-port", str(two_hosts.PORT)]
    return [
        hosts.start(host, [*launcher, "--node-rank", str(host), *_command(options, generations, flag)])
        for host in range(2)
    ]


@pytest.mark.parametrize("delay_ms", [0, 20])
def test_the_same_picture(delay_ms):
    options = dict(num_stages=2, warmup_steps=8, timeout_s=60)
    with two_hosts.Hosts() as hosts:
        if delay_ms and not hosts.delay(delay_ms):
            pytest.skip("this kernel delays no packets")
        results = [r for process in _torchrun(hosts, options, 2) for r in two_hosts.found(process, 120)]
    assert [r["rank"] for r in results] == [0, 1]
    for result in results:
        assert result["kinds"] == ["torch.distributed"]
        assert result["sums"] == pytest.approx([_alone()] * 2, rel=1e-6)


def test_a_cut_cable_ends_both_ranks(tmp_path):
    options = dict(num_stages=2, warmup_steps=2, timeout_s=TIMEOUT_S)
    with two_hosts.Hosts() as hosts:
        started = _torchrun(hosts, options, 1, str(tmp_path / "drawing"))
        ends = time.monotonic() + 100
        while not all((tmp_path / f"drawing-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < ends and all(process.poll() is None for process in started)
            time.sleep(0.05)
        time.sleep(0.5)
        hosts.cut()
        results = [r for process in started for r in two_hosts.found(process, 4 * TIMEOUT_S)]
    assert [r["rank"] for r in results] == [0, 1]
    for result in results:
        # The other one, or rank 0 as the keeper of what they agree by.
        assert f"rank {1 - result['rank']}" in result["error"] or "rank 0" in result["error"]
        assert result["seconds"] < 2 * TIMEOUT_S + 5


def test_ranks_of_one_host_share_memory_beside_torch_distributed():
    options = dict(num_patches=2, cfg_parallel=True, warmup_steps=8, timeout_s=60)
    with two_hosts.Hosts() as hosts:
        started = []
        for host in range(2):
            # Both ranks of a host are in its namespaces: a shell starts them.
            script = 'RANK=$0 LOCAL_RANK=0 "$@" & RANK=$(($0 + 1)) LOCAL_RANK=1 "$@"; status=$?; wait; exit $status'
            place = dict(WORLD_SIZE="4", MASTER_ADDR=two_hosts.ADDRESSES[0], MASTER_PORT=str(two_hosts.PORT))
            command = ["sh", "-c", script, str(2 * host), sys.executable, *_command(options, 1)]
            started.append(hosts.start(host, command, **place))
        results = [r for process in started for r in two_hosts.found(process, 120)]
    assert sorted(r["rank"] for r in results) == [0, 1, 2, 3]
    for result in results:
        assert result["kinds"] == ["shm", "torch.distributed"]
        assert result["sums"] == pytest.approx([_alone()], rel=1e-5)
