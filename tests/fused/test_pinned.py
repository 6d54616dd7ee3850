"""What stays the same beneath replayed calls: made once a generation, and whenever an argument or a weight changes.

A replay of the stand-in runs the modules again, so that what is left out shows.
"""

import fused_checks
import pytest
import tiny_parts
import torch
from stand_in_graphs import Replays
from torch import nn

import asyncdiff_fast
from asyncdiff_fast.fused import capture


@pytest.fixture
def unet(monkeypatch):
    """A denoiser that is patched, and whose text projections count their runs in `runs`."""
    monkeypatch.setattr(capture, "CudaGraphs", Replays)
    net = fused_checks.unet()
    net.runs = 0
    own = nn.Linear.forward

    def counted(module, input):
        net.runs += input.shape[1:] == (3, tiny_parts.WIDTH)
        return own(module, input)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    with torch.no_grad():
        yield net
    asyncdiff_fast.unpatch(net)


def _text(seed):
    return torch.randn(2, 3, tiny_parts.WIDTH, generator=torch.Generator().manual_seed(seed))


def _inputs(count, seed=7):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, 4, 8, 8, generator=random), 900 - 100 * step) for step in range(count)]


def _counts(net, calls, text, change=lambda step: None):
    """Runs of text projections in each call, whose results must be those of an unpatched copy."""
    counts = []
    for step, (x, t) in enumerate(calls):
        text = change(step) if change(step) is not None else text
        net.runs = 0
        result = net(x, t, text).sample
        counts.append(net.runs)
        assert torch.equal(result, _plain(net, x, t, text)), f"call {step}"
    return counts


def _plain(net, x, t, text):
    """What the network gives with nothing kept."""
    layers = net._asyncdiff_fast._layers
    with layers.choice.paused():
        inside, layers.projections._inside = layers.projections._inside, False
        try:
            return type(net).forward(net, x, t, text).sample
        finally:
            layers.projections._inside = inside


def _patched(net):
    runtime = asyncdiff_fast.patch(net, graphs=True)
    # Keys and values of each of the UNet's transformers.
    return runtime, 2 * sum(name.endswith("attn2") for name, _ in net.named_modules())


def test_the_text_is_projected_once_a_generation(unet):
    runtime, projections = _patched(unet)
    text = _text(0)
    # The first call is launched; the stand-in runs what it captures, and once more as it replays.
    first = _counts(unet, _inputs(5), text)
    assert first[0] == projections and first[2:] == [0, 0, 0], first
    # Another prompt: the next generation begins, and each has its projections once.
    assert _counts(unet, _inputs(4), _text(1)) == [projections, 0, 0, 0]
    assert _counts(unet, _inputs(3), text) == [projections, 0, 0]
    told = runtime.stats()["kernels"]["graphs"]
    assert told["captured"] == 1 and told["refused"] == []


def test_a_text_that_changes_within_a_generation(unet):
    _, projections = _patched(unet)
    _counts(unet, _inputs(3), _text(0))
    texts = [_text(1), _text(2)]
    by_turns = _counts(unet, _inputs(6), texts[0], lambda step: texts[step // 3])
    assert by_turns == [projections, 0, 0, projections, 0, 0]

    def write(step):
        if step == 2:
            texts[0].mul_(2)
        elif step == 4:
            texts[0].data.add_(1)

    assert _counts(unet, _inputs(6), texts[0], write) == [projections, 0, projections, 0, projections, 0]
    whole = torch.cat([_text(3), _text(4)])
    halves = _counts(unet, _inputs(4), None, lambda step: whole[2 * (step // 2) :][:2])
    assert halves == [projections, 0, projections, 0], "another part of the same memory"


def test_a_replayed_call_searches_no_layer_for_its_weights(unet, monkeypatch):
    _patched(unet)
    text, searched, own = _text(0), [], nn.Module.named_modules
    _counts(unet, _inputs(3), text)

    def named_modules(module, *args, **kwargs):
        if isinstance(module, nn.Linear):
            searched.append(module)
        return own(module, *args, **kwargs)

    (x, t), (next_x, next_t) = _inputs(2)
    unet(x, t, text)
    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    unet(next_x, next_t, text)
    assert not searched


@pytest.mark.parametrize("counted", [True, False])
def test_weights_that_are_written_within_a_generation(unet, counted):
    _, projections = _patched(unet)
    keys = next(module for name, module in unet.named_modules() if name.endswith("attn2.to_k"))
    _counts(unet, _inputs(3), _text(0))

    def write(step):
        if step == 2:
            (keys.weight if counted else keys.weight.data).mul_(2)

    text = _text(0)
    assert _counts(unet, _inputs(4), text, write) == [projections, 0, projections, 0]


def test_in_inference_mode_every_call_makes_them(unet):
    """Writes into its tensors are not counted."""
    _, projections = _patched(unet)
    with torch.inference_mode():
        text = _text(0).clone()
        counts = _counts(unet, _inputs(4), text)
    assert counts[0] == counts[2] == counts[3] == projections


def test_results_that_somebody_writes_into_are_not_kept(unet):
    class Scaled(type(unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor)):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            if encoder_hidden_states is not None:
                attn.to_k(encoder_hidden_states).mul_(1.5)
            return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)

    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Scaled())
    _, projections = _patched(unet)
    counts = _counts(unet, _inputs(4), _text(0))
    assert min(counts) >= projections
