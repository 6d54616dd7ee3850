"""Displaced calls of one patch with kernels against the same calls without: what one rank of N computes and sends."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from seen_ops import SeenOps

from asyncdiff_fast.calls.schedule import PatchMode
from asyncdiff_fast.calls.signature import CallSignature
from asyncdiff_fast.config import Config
from asyncdiff_fast.exchange.world import World
from asyncdiff_fast.fused import patch_ops, patches
from asyncdiff_fast.fused.choice import KernelChoice
from asyncdiff_fast.fused.fusion import Fusion
from asyncdiff_fast.fused.packed import PackedWeights
from asyncdiff_fast.patches.alone import LonePlanner
from asyncdiff_fast.patches.calls import Patches
from asyncdiff_fast.shared import Shared


class NoExchange:
    """Slots that go nowhere."""

    def __init__(self):
        self.sent, self.received = [], []

    def slot(self, name, sends=(), recvs=(), depth=2):
        if name != "result":
            self.sent += [x.buffers[0] for x in sends]
            self.received += [x.buffers[0] for x in recvs]
        return name

    def nothing(self, *_):
        pass

    freeze = post = wait = acquire = drain = release = nothing


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 32), norm_num_groups=2, cross_attention_dim=16, attention_head_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, sample_size=12,
    ).eval()  # fmt: skip


def dit():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=12, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=12,
    ).eval()  # fmt: skip


def inputs(build):
    random = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 12, 6, generator=random), torch.randn(2, 3, 16, generator=random)
    if build is dit:
        pooled = torch.randn(2, 16, generator=random)
        return dict(hidden_states=x, timestep=torch.tensor([5.0, 5.0]), encoder_hidden_states=text,
                    pooled_projections=pooled, return_dict=False)  # fmt: skip
    # Programs are one after the other here, and the second picture has as many.
    return dict(sample=x[:1], timestep=5, encoder_hidden_states=text[:1], return_dict=False)


def displaced(build, kernels, patch, patches, group_norm, calls=2, watch=None):
    """(results of displaced calls, what the last leaves to be sent), others' parts filled with seeded noise; `watch` is
    entered for one call more.
    """
    denoiser, exchange = build(), NoExchange()
    config = Config(num_patches=patches, group_norm=group_norm, kernels=kernels)
    choice = KernelChoice(kernels, World((0,), 10))
    fusion = Fusion(denoiser, choice, patches=True)
    packed = PackedWeights(denoiser, active=False)
    shared = Shared(denoiser, config, CallSignature(denoiser), packed, choice)
    choice.patches = Patches(shared, None, exchange)
    with torch.no_grad():
        planner = LonePlanner(shared, choice.patches.hooks)
        _, call = planner.emulate(patch, denoiser.forward, (), inputs(build), exchange)
        call(PatchMode.SYNC)
        random, results = torch.Generator().manual_seed(2), []
        for _ in range(calls):
            for x in exchange.received:
                noise = torch.randn(x.shape, generator=random)
                # Statistics: mean and variance.
                x.copy_(noise if x.shape[-1] != 2 else torch.stack((noise[..., 0] / 4, 1 + noise[..., 1].abs()), -1))
            results.append(call(PatchMode.DISPLACED)[0])
        if watch is not None:
            with watch:
                call(PatchMode.DISPLACED)
    choice.patches.forget(released=True)
    fusion.remove()
    return results, [x.clone() for x in exchange.sent]


@pytest.mark.parametrize(
    "build, patch, patches, group_norm",
    [
        (dit, 1, 3, "corrected"),
        (unet, 1, 3, "stale"),
        pytest.param(dit, 0, 2, "stale", marks=pytest.mark.exhaustive),
        pytest.param(unet, 0, 2, "corrected", marks=pytest.mark.exhaustive),
    ],
)
def test_with_and_without_kernels(build, patch, patches, group_norm):
    want, sent = displaced(build, "torch", patch, patches, group_norm)
    got, sent_too = displaced(build, "triton", patch, patches, group_norm)
    for ours, theirs in zip([*got, *sent_too], [*want, *sent], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_residual_block_makes_no_other_passes(monkeypatch):
    watch = SeenOps(of_activations=False, paused=True)
    convolved = patches._convolved

    def counted(*args, **kwargs):
        watch.paused = False
        try:
            return convolved(*args, **kwargs)
        finally:
            watch.paused = True

    monkeypatch.setattr(patches, "_convolved", counted)
    calls = []
    norm = patch_ops.patch_group_norm
    monkeypatch.setattr(patch_ops, "patch_group_norm", lambda *a, **k: calls.append(k) or norm(*a, **k))
    displaced(unet, "triton", 1, 3, "corrected", calls=1, watch=watch)
    fused = [k for k in calls if k.get("halo")]
    assert fused and all(k["silu"] and k["above"] is not None and k["top"] is not None for k in fused)
    unwanted = {name for name in watch.names if any(word in name for word in ("::cat", "pad", "silu", "native_group"))}
    assert watch.names and not unwanted
