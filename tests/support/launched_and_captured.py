"""Denoisers patched twice, their calls launched and captured: what each gives, and what is told of graphs."""

import torch

import asyncdiff_fast


def both(net, run, **options):
    """(results of `run(net)` launched, the same captured, what is told of graphs)."""
    found = []
    for graphs in (False, True):
        runtime = asyncdiff_fast.patch(net, timeout_s=60, graphs=graphs, **options)
        found.append(run(net))
        told = runtime.stats()["kernels"].get("graphs")
        asyncdiff_fast.unpatch(net)
    return *found, told


def equal(found):
    """What is told of graphs, of results of `both` that are alike bit for bit."""
    launched, captured, told = found
    assert len(launched) == len(captured) and all(map(torch.equal, launched, captured))
    return told
