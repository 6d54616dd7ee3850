"""When things are posted and awaited, from a recorded trace, and what a late peer delays."""

import functools
import statistics
import time

import ranks
import torch
import user_parts
from torch import nn

import asyncdiff_fast

WARMUP_STEPS, STEPS = 2, 6
DELAY_S = 0.3
LATE = "blocks.3"
# Which of stage 0's results each block of stage 1 reads.
READS = {4: [], 5: [0], 6: [1, 2], 7: [3]}


class Net(nn.Module):
    """Blocks 0 to 3 are stage 0; block 4 reads the latent, the others read stage 0's results, the last one last."""

    def __init__(self):
        super().__init__()
        self.conv_in = user_parts.conv(4)
        self.blocks = nn.ModuleList(user_parts.Block() for _ in range(8))
        self.conv_out = user_parts.conv(user_parts.WIDTH, 4)

    def forward(self, x, t):
        h = start = self.conv_in(x) + user_parts.embed(t, x)
        made = []
        for i in range(4):
            h = self.blocks[i](h)
            made.append(h)
        h = start
        for i, reads in READS.items():
            h = self.blocks[i](sum([h, *(made[j] for j in reads)]))
        return self.conv_out(h)


STAGES = [[f"blocks.{i}" for i in range(4)], [*(f"blocks.{i}" for i in range(4, 8)), "conv_out"]]


def _trace(delay_s):
    """Events (what, name, seconds since the call began) of each asynchronous call on this rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().eval().requires_grad_(False)
    runtime = asyncdiff_fast.patch(net, stages=STAGES, warmup_steps=WARMUP_STEPS, timeout_s=30)
    calls, exchange = [], runtime._parts.stages.exchange

    def note(what, name):
        calls[-1].append((what, name, time.perf_counter() - began[0]))

    began = [0.0]
    post, wait = exchange.post, exchange.wait

    def noted_post(slot):
        if slot.name == LATE and slot.sends and delay_s:
            time.sleep(delay_s)
        post(slot)
        note("send" if slot.sends else "receive", slot.name)

    def noted_wait(slot, lag=0):
        note("wait", slot.name)
        wait(slot, lag)
        note("waited", slot.name)

    exchange.post, exchange.wait = noted_post, noted_wait
    # A replayed block does not reach its convolution.
    for i, block in enumerate(net.blocks):
        block.conv.register_forward_pre_hook(lambda *_, i=i: note("start", f"blocks.{i}"))
        block.conv.register_forward_hook(lambda *_, i=i: note("end", f"blocks.{i}"))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in range(STEPS, 0, -1):
            calls.append([])
            began[0] = time.perf_counter()
            x = x - 0.1 * net(x, torch.tensor(float(t)))
    asyncdiff_fast.unpatch(net)
    return calls[WARMUP_STEPS:]


def _traces(rank):
    return {"prompt": _trace(0), "late": _trace(DELAY_S)}


@functools.cache
def traces():
    return ranks.run(2, _traces, timeout=120)


def test_each_result_is_posted_before_the_next_unit_starts():
    for call in traces()[0]["prompt"]:
        names = [(what, name) for what, name, _ in call if what in ("start", "end", "send")]
        assert names == [(what, f"blocks.{i}") for i in range(4) for what in ("start", "end", "send")]
    for call in traces()[1]["prompt"]:
        sends = [(what, name) for what, name, _ in call if what == "send"]
        assert sends == [("send", "prediction")]


def test_each_wait_comes_directly_before_its_first_reader():
    for call in traces()[1]["prompt"]:
        names = [(what, name) for what, name, _ in call if what in ("start", "end", "wait")]
        expected = []
        for i, reads in READS.items():
            expected += [("wait", f"blocks.{j}") for j in reads]
            expected += [("start", f"blocks.{i}"), ("end", f"blocks.{i}")]
        assert names == expected
    for call in traces()[0]["prompt"]:
        waits = [(what, name) for what, name, _ in call if what == "wait"]
        assert waits == [("wait", "prediction")], "stage 0 reads nothing of stage 1"


def test_receives_are_posted_at_once():
    """A rank that only receives posts everything before its first unit, so that no peer's message finds no buffer."""
    for call in traces()[1]["prompt"]:
        names = [what for what, _, _ in call]
        assert names.index("start") > max(i for i, what in enumerate(names) if what == "receive")


def test_a_late_tensor_delays_only_its_reader():
    before, waited = [], []
    for call in traces()[1]["late"][1:]:
        at = {(what, name): seconds for what, name, seconds in call}
        assert at["start", "blocks.7"] >= at["waited", LATE]
        before.append(at["start", "blocks.6"])
        waited.append(at["waited", LATE] - at["wait", LATE])
    # Medians: another process may have the core for a moment.
    assert statistics.median(before) < DELAY_S / 2, "earlier units must not be delayed"
    assert statistics.median(waited) > DELAY_S / 3, "its reader waits"
