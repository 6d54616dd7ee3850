"""What else sits on a denoiser: adapters, fused projections, other hooks. All go on working with `patch`."""

import numpy as np
import oracle
import ranks
import tiny_pipelines
import torch
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig

import asyncdiff_fast


def _add_adapter(unet, targets, name="default"):
    torch.manual_seed(7)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False), name)


def _rule(pipe, runtime, plan=None):
    """The picture by the simulation of the rule, with the division of a plan, by default of the runtime's latest."""
    plan = plan or runtime.plan
    asyncdiff_fast.unpatch(pipe)
    owner = {u.key: s for u, s in zip(plan.graph.units, plan.division.owner, strict=True)}
    with oracle.Simulation(pipe.unet, owner, plan.config.num_stages, plan.config.warmup_steps):
        return tiny_pipelines.generate(pipe, "sd15")


def _same(a, b):
    return float(np.abs(a - b).max()) <= 1e-5


def _adapter_before(pipe):
    _add_adapter(pipe.unet, ["to_q", "to_v"])
    runtime = asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=1, predict="none")
    picture = tiny_pipelines.generate(pipe, "sd15")
    return _same(picture, _rule(pipe, runtime))


def _adapter_after(pipe):
    """Also on the first and last convolution, which PEFT wraps: the wrapper is the unit from then on."""
    runtime = asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=1, predict="none")
    without = tiny_pipelines.generate(pipe, "sd15")
    _add_adapter(pipe.unet, ["to_q", "conv_in", "conv_out"])
    with_it = tiny_pipelines.generate(pipe, "sd15")
    pipe.unet.delete_adapters("default")
    again = tiny_pipelines.generate(pipe, "sd15")
    _add_adapter(pipe.unet, ["to_q", "conv_in", "conv_out"])
    picture = tiny_pipelines.generate(pipe, "sd15")
    rule = _rule(pipe, runtime)
    return _same(without, again) and not _same(without, with_it) and _same(with_it, picture) and _same(picture, rule)


def _fused_projections(pipe):
    pipe.unet.fuse_qkv_projections()
    runtime = asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=1, predict="none")
    picture = tiny_pipelines.generate(pipe, "sd15")
    return _same(picture, _rule(pipe, runtime))


class _Doubling(ModelHook):
    def post_forward(self, module, output):
        return output * 2


def _hook_removed_under_ours(pipe):
    """diffusers removes hooks rightly in reverse order only: ours is lost with it, which the next call must notice."""
    registry = HookRegistry.check_if_exists_or_initialize(pipe.unet.conv_out)
    registry.register_hook(_Doubling(), "doubling")
    runtime = asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=1, predict="none")
    doubled = tiny_pipelines.generate(pipe, "sd15")
    registry.remove_hook("doubling")
    picture = tiny_pipelines.generate(pipe, "sd15")
    calls = runtime.stats()["compute_calls"]
    again = tiny_pipelines.generate(pipe, "sd15")
    asynchronous = runtime.stats()["compute_calls"] - calls
    rule = _rule(pipe, runtime)
    return not _same(doubled, picture) and asynchronous == 3 and _same(again, rule)


def _hook_put_on_ours(pipe):
    plain = tiny_pipelines.generate(pipe, "sd15")
    asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=1, predict="none")
    tiny_pipelines.generate(pipe, "sd15")
    registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
    registry.register_hook(_Doubling.__base__(), "idle")
    tiny_pipelines.generate(pipe, "sd15")
    asyncdiff_fast.unpatch(pipe)
    after = tiny_pipelines.generate(pipe, "sd15")
    registry.remove_hook("idle")
    return np.array_equal(plain, after) and np.array_equal(plain, tiny_pipelines.generate(pipe, "sd15"))


def _inference_mode(pipe):
    """Pictures drawn in inference mode, without it, and under autocast, in turn."""
    runtime = asyncdiff_fast.patch(pipe, num_stages=2, warmup_steps=1, predict="none")
    with torch.inference_mode():
        first = tiny_pipelines.generate(pipe, "sd15")
    # Under autocast costs, and so the division, are others.
    plan = runtime.plan
    second = tiny_pipelines.generate(pipe, "sd15")
    with torch.autocast("cpu", torch.bfloat16):
        low = tiny_pipelines.generate(pipe, "sd15")
    third = tiny_pipelines.generate(pipe, "sd15")
    rule = _rule(pipe, runtime, plan)
    return _same(first, rule) and _same(second, rule) and _same(third, rule) and 0 < np.abs(low - rule).max() < 0.2


CASES = (
    _inference_mode,
    _adapter_before,
    _adapter_after,
    _fused_projections,
    _hook_removed_under_ours,
    _hook_put_on_ours,
)


def _run(rank):
    return {case.__name__: case(tiny_pipelines.build("sd15")) for case in CASES}


def test_neighbours():
    for rank, results in enumerate(ranks.run(2, _run, timeout=200)):
        assert all(results.values()), f"rank {rank}: {results}"
