"""Denoisers that steps side by side leave whole: compiled, quantised, with adapters switched, two that take turns."""

import functools
import importlib.util
import itertools
import warnings

import bare
import diffusers
import peft
import pytest
import ranks
import tiny_denoisers
import tiny_pipelines
import torch

import asyncdiff_fast

OPTIONS = {"parallel_steps": 2, "tolerance": 1e8, "timeout_s": 100}
STEPS = 8


@torch.no_grad()
def loop(denoisers, steps=STEPS):
    """A sampling loop; of two denoisers the second takes over in the middle."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    x = bare.noise()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoisers[i * len(denoisers) // steps](x, t), t, x)[0]
    return x


def _close(patched, plain):
    """(relative difference, equal) of latents."""
    return float((patched - plain).norm() / plain.norm())


def _compiled(how):
    model = bare.Bare()
    plain = loop([model])
    model = torch.compile(model) if how == "wrapped" else model
    if how == "in place":
        model.compile()
    whole = loop([model])
    runtime = asyncdiff_fast.patch(model, **OPTIONS)
    patched = [loop([model]) for _ in range(2)]
    stats = runtime.stats()["steps"]
    asyncdiff_fast.unpatch(model)
    return patched, stats["blocks"], _close(patched[0], whole), _close(loop([model]), whole), _close(whole, plain)


def _by_torch(unet):
    with warnings.catch_warnings():
        # torch means to move these to torchao.
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(unet, {torch.nn.Linear}, dtype=torch.qint8)


def _by_torchao(unet):
    from torchao import quantization

    quantization.quantize_(unet, quantization.Int8WeightOnlyConfig())
    assert any(type(p.data) is not torch.Tensor for p in unet.parameters()), "nothing was quantised"
    return unet


def _quantised(how):
    unet = how(tiny_denoisers.sd15_unet())
    text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(0))

    def denoise(x, t):
        return unet(x, t, text).sample

    plain = loop([denoise])
    runtime = asyncdiff_fast.patch(unet, **OPTIONS)
    patched = [loop([denoise]) for _ in range(2)]
    blocks = runtime.stats()["steps"]["blocks"]
    asyncdiff_fast.unpatch(unet)
    return patched, blocks, _close(patched[0], plain), _close(loop([denoise]), plain), 0.0


def _adapters():
    pipe = tiny_pipelines.build("sd15")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.unet.add_adapter(config, adapter_name="one")

    def draw():
        return torch.as_tensor(tiny_pipelines.generate(pipe, "sd15", steps=STEPS))

    plain = [draw(), (pipe.unet.disable_adapters(), draw())[1]]
    pipe.unet.enable_adapters()
    runtime = asyncdiff_fast.patch(pipe, **OPTIONS)
    with_adapter = draw()
    pipe.unet.disable_adapters()
    patched = [with_adapter, draw()]
    blocks = runtime.stats()["steps"]["blocks"]
    asyncdiff_fast.unpatch(pipe)
    errors = [_close(a, b) for a, b in zip(patched, plain, strict=True)]
    return patched, blocks, max(errors), errors[0], _close(plain[0], plain[1])


class Two:
    """A pipeline of two denoisers, as those that hand over at some noise level."""

    def __init__(self):
        first, second = bare.Bare(), bare.Bare()
        with torch.no_grad():
            second.last.weight.mul_(0.5)
        self.components = {"transformer": first, "transformer_2": second}


def _two():
    pipe = Two()
    both = list(pipe.components.values())
    plain = loop(both)
    runtimes = asyncdiff_fast.patch(pipe, **OPTIONS)
    patched = [loop(both) for _ in range(2)]
    stats = [runtime.stats() for runtime in runtimes]
    asyncdiff_fast.unpatch(pipe)
    sent = [s.get("sent_bytes", 0) for s in stats]
    assert sent[1] == 0 < sent[0], "the exchange of steps is counted once"
    return patched, stats[0]["steps"]["blocks"], _close(patched[0], plain), _close(loop(both), plain), 0.0


KINDS = {
    "compiled": functools.partial(_compiled, "wrapped"),
    "compiled in place": functools.partial(_compiled, "in place"),
    "quantised": functools.partial(_quantised, _by_torch),
    "adapters": _adapters,
    "two denoisers": _two,
}
# No part of the tests' environment: diffusers imports it wherever it is, which every rank would wait for.
if importlib.util.find_spec("torchao"):
    KINDS["quantised by torchao"] = functools.partial(_quantised, _by_torchao)


def _all(rank):
    return {kind: run() for kind, run in KINDS.items()}


@functools.cache
def everyone():
    return ranks.run(2, _all, timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_whole(kind):
    results = [found[kind] for found in everyone()]
    for patched, blocks, error, after, _ in results:
        assert blocks >= 3 and error < 0.2
        assert after <= 1e-4 or kind == "adapters"
        assert all(torch.equal(a, b) for a, b in zip(patched, results[0][0], strict=True))
    if kind == "adapters":
        first, second = results[0][0]
        assert not torch.equal(first, second), "an adapter that was switched off is seen"
    else:
        assert all(torch.equal(a, b) for a, b in itertools.pairwise(results[0][0]))
