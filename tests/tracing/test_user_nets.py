"""Denoisers as users write them, on two and three ranks: exact in warm-up, the rule after it, or refused."""

import functools
import itertools

import oracle
import pytest
import ranks
import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from user_runs import NETS, STEPS, build, generations, sample

import asyncdiff_fast

# Half precision rounds the same sums in another order after a copy.
TOLERANCES = {"fp16": 2e-2, "bf16": 1e-1}
# What cannot be shared out at all, and what the error must say.
REFUSED = {
    "averages activations": "keeps what follows from activations for the next call",
    "skips blocks": "took another way than in warm-up",
    "swaps blocks": "was called in another order than in the traced forward",
}
# Nets whose blocks have side effects: the search leaves the blocks whole to every rank; naming them is refused.
SIDE_EFFECTS = {"unknown class", "reads a kept tensor", "reads a kept result", "fills a list", "fills a dict"}
SIDE_EFFECTS |= {"fills a list with results", "counts calls", "counts in python", "lazy tables", "returns a number"}


class Simulation(oracle.Simulation):
    """As `oracle.Simulation`, for units that change arguments in place or hand them through, and modules that count."""

    def __enter__(self):
        super().__enter__()
        forward = self.forward

        def once(*args, **kwargs):
            # Every stage's run of a call starts from the same counts.
            counting = [m for m in self.denoiser.modules() if hasattr(m, "calls")]
            if not self.stage:
                self.counts = [torch.as_tensor(m.calls).clone() for m in counting]
            for module, count in zip(counting, self.counts, strict=True):
                module.calls = count.clone() if isinstance(module.calls, torch.Tensor) else int(count)
            return forward(*args, **kwargs)

        self.forward = once
        return self

    def _unit(self, name, forward):
        def run(*args, **kwargs):
            key = (name, self.ordinals.get(name, 0))
            self.ordinals[name] = key[1] + 1
            arguments = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            if self.stage is not None and self.owner[key] != self.stage:
                result, written, handed = self.cache[self.place, key]
                for i, x in written.items():
                    arguments[i].copy_(x)
                fresh = iter([arguments[i] if i is not None else None for i in handed])

                def replayed(x):
                    return x.clone() if (argument := next(fresh)) is None else argument

                return tree_map_only(torch.Tensor, replayed, result)
            before = [x.clone() for x in arguments]
            result = forward(*args, **kwargs)
            written = {
                i: x.clone()
                for i, (x, old) in enumerate(zip(arguments, before, strict=True))
                if not torch.equal(x, old)
            }
            handed = [
                next((i for i, a in enumerate(arguments) if a is x or _same(a, x)), None)
                for x in tree_leaves(result)
                if isinstance(x, torch.Tensor)
            ]
            self.fresh[self.place, key] = (tree_map_only(torch.Tensor, torch.clone, result), written, handed)
            return result

        return run


def _same(a, b):
    return a.numel() and (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def patched(name, **options):
    """(predictions, plan, calls that computed) of a patched net, or the refusal, and if the net was left usable."""
    net = build(name)
    runtime = asyncdiff_fast.patch(net, timeout_s=20, predict="none", **options)
    try:
        found = generations(net, name)
        return found, runtime.plan, runtime.stats()["compute_calls"]
    finally:
        if hasattr(net, "_asyncdiff_fast"):
            asyncdiff_fast.unpatch(net)


def alternating(plan, num_stages):
    """`stages=` that give neighbouring units to different stages: as much as can be crosses."""
    names = list(dict.fromkeys(u.name for u in plan.graph.units))
    return [names[s::num_stages] for s in range(num_stages)]


def splits(name, plan, num_stages):
    """{name of a split: options} beside the search: neighbours apart, blocks apart, and contiguous blocks."""
    found = {"searched": {}, "alternating": {"stages": alternating(plan, num_stages)}}
    if any(u.name.startswith("blocks.") for u in plan.graph.units):
        names = [*(f"blocks.{i}" for i in range(len(build(name).blocks))), "conv_out"]
        bounds = [len(names) * s // num_stages for s in range(num_stages + 1)]
        found["blocks"] = {"stages": [names[s::num_stages] for s in range(num_stages)]}
        found["contiguous"] = {"stages": [names[a:b] for a, b in itertools.pairwise(bounds)]}
    return found


def follow(rank, name, num_stages, options):
    """What one split predicts, beside the rule on rank 0; the error, if it was refused."""
    try:
        stale, plan, calls = patched(name, num_stages=num_stages, warmup_steps=2, **options)
    except (ValueError, RuntimeError) as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    found = {"stale": stale.float(), "calls": calls}
    if rank == 0:
        owner = {u.key: s for u, s in zip(plan.graph.units, plan.division.owner, strict=True)}
        net = build(name)
        with Simulation(net, owner, num_stages, 2) as simulation:
            rule = [sample(net, name, 1)]
            simulation.restart()
            found["rule"] = torch.cat([*rule, sample(net, name, 0)]).float()
    return found


def study(rank, name, num_stages):
    """What one net gives: its difference from the unpatched net, and what each split predicts."""
    plain = generations(build(name), name).float()
    scale = plain.abs().max()
    try:
        exact, plan, _ = patched(name, num_stages=num_stages, warmup_steps=100)
    except ValueError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    found = {"exact": float((exact.float() - plain).abs().max() / scale), "plain": plain}
    found["splits"] = {
        split: follow(rank, name, num_stages, options) for split, options in splits(name, plan, num_stages).items()
    }
    return found


def _studies(rank, num_stages):
    return {name: study(rank, name, num_stages) for name in NETS}


def difference(a, b, plain):
    """The largest one, relative to the unpatched net's largest prediction; not a number if one of them is not."""
    return float((a - b).abs().max() / plain.abs().max())


@functools.cache
def studies(num_stages):
    return ranks.run(num_stages, _studies, num_stages, timeout=280)


@pytest.mark.parametrize("num_stages", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", NETS)
def test_net(name, num_stages):
    tolerance = TOLERANCES.get(name, 1e-4)
    by_rank = [rank[name] for rank in studies(num_stages)]
    for found in by_rank:
        if "refused" in found:
            assert REFUSED.get(name, "no refusal expected") in found["refused"]
            continue
        assert found["exact"] <= tolerance, "all steps warm-up must give the unpatched result"
        for split, result in found["splits"].items():
            if name in REFUSED and "refused" in result:
                assert REFUSED[name] in result["refused"], split
            elif name in SIDE_EFFECTS and split in ("blocks", "contiguous"):
                assert "do more than return tensors" in result.get("refused", "no refusal"), split
            else:
                assert "refused" not in result, result["refused"]
                assert result["calls"] == 2 * (STEPS - 2)
                off = difference(result["stale"], by_rank[0]["splits"][split]["rule"], found["plain"])
                assert off <= tolerance, f"{split}: asynchronous steps must follow the rule"
        if name in REFUSED:
            assert any("refused" in result for result in found["splits"].values())
        else:
            stale = difference(found["splits"]["alternating"]["stale"], found["plain"], found["plain"])
            assert stale > 2 * tolerance, "the test must be able to tell stale from exact"
