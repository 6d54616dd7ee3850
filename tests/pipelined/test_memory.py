"""A denoiser that no process could hold, loaded and run by four: what is held at the peak."""

import resource

import diffusers
import pytest
import ranks
import torch
from oracle_models import predictions
from workers import collect

import asyncdiff_fast
from asyncdiff_fast.loading import _without_weights

CONFIG = dict(
    sample_size=16, num_layers=24, attention_head_dim=64, num_attention_heads=20, caption_channels=32,
    cross_attention_dim=1280,
)  # fmt: skip
# What activations, slots and copies of one weight take beside the weights held.
REST_BYTES = 250 << 20


def _status(name):
    """Bytes, by /proc."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _limit(more):
    """Let this process have so many bytes of memory more than now."""
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + more,) * 2)


def _whole(rank, folder, more):
    _limit(more)
    try:
        diffusers.PixArtTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=True, torch_dtype=torch.float32)
    except (MemoryError, RuntimeError, OSError) as error:
        return type(error).__name__
    return "loaded"


@torch.no_grad()
def _shared(rank, folder, more):
    predictions("pixart")(diffusers.PixArtTransformer2DModel(**CONFIG | dict(num_layers=1)).eval())
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    model = _without_weights(folder, "diffusers", "PixArtTransformer2DModel", None, None, torch.device("cpu"))
    runtime = asyncdiff_fast.patch(
        model, num_stages=4, pipeline_patches=2, warmup_steps=1, shard_weights=True, timeout_s=200
    )
    # Threads of the exchange reserve memory that they do not use, so the limit is of what comes now: all weights.
    _limit(more)
    found = predictions("pixart")(model)
    peak = _status("VmHWM") - before
    plan = runtime.plan
    modules = dict(model.named_modules())
    largest = max(sum(p.numel() * 4 for p in modules[u.name].parameters()) for u in plan.whole.units)
    held, weights = plan.held_bytes(rank), plan.weight_bytes
    runtime.close()
    return found, peak, held, weights, largest


@pytest.mark.slow
def test_four_ranks_run_what_one_cannot_load(tmp_path):
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusers.PixArtTransformer2DModel(**CONFIG).eval()
    total = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    with torch.no_grad():
        # The first call is exact.
        expected = predictions("pixart")(model)[0]
    del model
    limit = total // 2 + (512 << 20)
    assert limit < total
    assert collect(ranks.start(1, _whole, tmp_path, limit), 120) != ["loaded"]
    for found, peak, held, weights, largest in collect(ranks.start(4, _shared, tmp_path, limit), 280):
        assert held <= total / 4 + largest + weights[-1]
        assert peak <= held + largest + REST_BYTES
        assert torch.isfinite(found).all()
        assert (found[0] - expected).abs().max() <= 1e-4 * expected.abs().max()
