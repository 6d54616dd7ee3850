"""Patches make the keys and values of a text once, and those of another text when it comes."""

import pytest
import ranks
import torch
from test_patch_generations import MODELS
from torch import nn

import asyncdiff_fast

TIMES = (900, 800, 700, 600, 500, 400)
# Another text comes after this many calls.
CHANGED_AT = 3


def _other(text):
    return text.flip(-1).clone()


def _write(text):
    return text.mul_(-1)


def _write_uncounted(text):
    text.data.mul_(-1)
    return text


CHANGES = {
    "the same": lambda text: text,
    "another": _other,
    "written": _write,
    "written uncounted": _write_uncounted,
    "a part": lambda text: text[:, :4],
}


@torch.no_grad()
def _generate(name, model, change, guided, made=None):
    """The latent after a few calls, and how often the text was projected in each."""
    draw = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 4, 16, 8, generator=draw), torch.randn(2, 5, 32, generator=draw)
    counts = []
    for step, t in enumerate(TIMES):
        text = change(text) if step == CHANGED_AT else text
        before = len(made or ())
        # A pipeline without guidance at some steps uses half of the text.
        now = slice(1, None) if not guided and step % 2 else slice(None)
        x = x.clone()
        x[now] -= 0.2 * MODELS[name][1](model, x[now], t, text[now])
        counts.append(len(made or ()) - before)
    return x, counts


def _count(model):
    """A list that grows by one for each projection of text that is really made."""
    made, own = [], nn.Linear.forward
    text_layers = {m for n, m in model.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))}

    def forward(module, input):
        if module in text_layers:
            made.append(module)
        return own(module, input)

    nn.Linear.forward = forward
    return made, len(text_layers), lambda: setattr(nn.Linear, "forward", own)


def _texts(rank, name, options):
    """{change: (largest difference from the unpatched latent, projections in each call, text layers)}"""
    found = {}
    model, plain = MODELS[name][0](), MODELS[name][0]()
    asyncdiff_fast.patch(model, timeout_s=60, **options)
    # In a plan's first generation the whole picture is drawn beside the patches once more.
    _generate(name, model, CHANGES["the same"], True)
    made, layers, undo = _count(model)
    for key, change in CHANGES.items():
        for guided in (True, False):
            x, counts = _generate(name, model, change, guided, made)
            expected, _ = _generate(name, plain, change, guided)
            found[key, guided] = float((x - expected).abs().max() / expected.abs().max()), counts, layers
    undo()
    asyncdiff_fast.unpatch(model)
    return found


@pytest.mark.parametrize("name", ["unet", pytest.param("pixart", marks=pytest.mark.exhaustive)])
def test_no_call_uses_the_text_of_another(name):
    """Synchronous patches give the unpatched result, whatever happens to the text."""
    options = dict(num_patches=2, exchange="sync", warmup_steps=1)
    for found in ranks.run(2, _texts, name, options, timeout=200):
        for (change, guided), (error, counts, layers) in found.items():
            assert error < 1e-5, (change, guided)
            if not guided:
                continue
            assert counts[1:CHANGED_AT] == [layers, 0], change
            # Other shapes are planned first.
            later = [0, 0, 0] if change == "the same" else [layers, layers, 0]
            assert counts[CHANGED_AT + (change == "a part") :] == later[change == "a part" :], change


@pytest.mark.slow
def test_stages_of_patches_keep_the_text_too():
    options = dict(num_patches=2, num_stages=2, warmup_steps=2)
    for found in ranks.run(4, _texts, "unet", options, timeout=280):
        _, counts, layers = found["the same", True]
        assert 0 < counts[2] + counts[1] < 2 * layers + 1 and not any(counts[4:])
