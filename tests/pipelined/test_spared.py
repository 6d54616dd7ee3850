"""Which modules a call's later micro-steps leave out."""

import functools

import pytest
import torch
from oracle_models import INSIDE_A_BLOCK, MODELS

import asyncdiff_fast
from asyncdiff_fast.calls.signature import CallSignature
from asyncdiff_fast.hooks import Attachment


class _Stop(Exception):
    pass


@functools.cache
def spared(name, text, stages=None):
    """Names of the modules that run in the first micro-step only."""
    make, call, shape, _ = MODELS[name]
    model = make()

    def stop(forward, args, kwargs):
        raise _Stop(CallSignature(model).named(args, kwargs))

    attachment = Attachment(model, stop)
    try:
        call(model, torch.zeros(*shape), 500)
    except _Stop as found:
        inputs = found.args[0]
    finally:
        attachment.remove()
    plan = asyncdiff_fast.plan(model, inputs, num_stages=2, stages=stages, pipeline_patches=2, pipeline_text=text)
    return plan.passing.spared


def _ends(names, end):
    return {n for n in names if n.endswith(end)}


@pytest.mark.parametrize("text", ["unit", "stage", "patch"])
@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "unet"])
def test_what_holds_rows_is_never_left_out(name, text):
    names = spared(name, text)
    rows = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff",
        "ff.net.0",
        "conv1",
        "conv2",
        "proj_out",
        "x_embedder",
        "pos_embed",
    )
    found = {n for end in rows for n in _ends(names, f".{end}")} | set(rows) & names
    assert not [n for n in found if ".attn2." not in n]


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_text_stream_is_left_out_behind_units_only(name):
    for end in (".ff_context", ".attn.to_add_out", ".attn.add_k_proj"):
        assert _ends(spared(name, "unit"), end)
        # In the first block of all, the text is still that of the embedder.
        others = _ends(spared(name, "stage"), end) | _ends(spared(name, "patch"), end)
        assert all(n.startswith("transformer_blocks.0.") and not n.endswith((".ff_context", "out")) for n in others)


@pytest.mark.parametrize("text", ["unit", "patch"])
def test_embeddings_and_projections_of_the_prompt_are_left_out(text):
    assert {"adaln_single", "caption_projection"} <= spared("pixart", text)
    assert len(_ends(spared("pixart", text), ".attn2.to_k")) == 6
    assert {"time_text_embed", "context_embedder"} <= spared("sd3", text)
    assert _ends(spared("unet", text), ".time_emb_proj") and _ends(spared("unet", text), ".attn2.to_v")


def test_units_are_left_out_one_by_one():
    names = spared("sd3", "unit", INSIDE_A_BLOCK)
    assert not [n for n in names for stage in INSIDE_A_BLOCK for unit in stage if unit.startswith(f"{n}.")]
    assert "transformer_blocks.0.ff_context.net.0" in names
