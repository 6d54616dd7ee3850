"""Tokens made in any order, and inputs with a value for each of them: found by evidence, never guessed."""

import patch_nets
import pytest
import ranks
import token_nets
import torch
from patch_runs import assert_refused, difference, outcome, twice
from token_nets import MORE, SIZE, build, steps

import asyncdiff_fast
from asyncdiff_fast.calls.signature import CallSignature
from asyncdiff_fast.patches import recorder, tokens

RIGHT = [kind for kind in MORE if kind not in (token_nets.HiddenMean, token_nets.Experts)]


def _order(kind, dim=-2):
    net = build(kind)
    clip = (token_nets.FRAMES,) if kind is token_nets.EachFrame else ()
    x = torch.randn(1, 4, *clip, token_nets.HEIGHT, 8)
    t = torch.ones(1, SIZE) if kind is token_nets.TimeOfTokens else 5.0
    kwargs, signature = MORE[kind](0), CallSignature(net)
    _, seen = recorder.record(net, net.forward, signature, (x, t), kwargs)

    def run(args, kwargs):
        return net(*args, **kwargs)

    def with_latent(latent):
        return signature.with_latent((x, t), kwargs, latent)

    return tokens.find(run, seen, x, with_latent, x.dim() + dim, net)


def test_the_order_of_tokens_is_found():
    found = {kind.__name__: _order(kind) for kind in RIGHT if kind not in (token_nets.Pops, token_nets.InLists)}
    shapes = {name: (order.outer, order.rows, order.inner) for name, order in found.items()}
    columns = shapes.pop("ColumnsFirst")
    frames = shapes.pop("EachFrame")
    assert columns == (4, 6, 1) and frames == (token_nets.FRAMES, 6, 4)
    assert set(shapes.values()) == {(1, 6, 4)}, shapes
    assert found["TextFirst"].starts == {SIZE + token_nets.TEXT: token_nets.TEXT, SIZE: 0}
    assert found["TextLast"].starts == {SIZE + token_nets.TEXT: 0, SIZE: 0}


class Spreads(token_nets.TokenNet):
    """A convolution before the tokens, so that no token is of one row alone."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

    def tokens(self, x):
        return super().tokens(self.conv(x))


def test_no_order_where_rows_spread(monkeypatch):
    monkeypatch.setitem(MORE, Spreads, lambda seed: {})
    assert _order(Spreads) is None


@torch.no_grad()
def _all(rank):
    found = {}
    for kind in RIGHT:
        net = build(kind)
        for mode in ("sync", "displaced"):
            found[kind.__name__, mode], _ = twice(net, steps, exchange=mode, warmup_steps=1)
    masked = build(token_nets.TextFirst)
    more = token_nets.MORE[token_nets.TextFirst](0)
    more["attention_mask"][:, -3] = 0
    x = torch.randn(1, 4, token_nets.HEIGHT, 8)
    found["masked"] = outcome(masked, lambda: [masked(x, 5.0, **more)], exchange="sync")
    late = build(token_nets.HiddenMean)
    found["late"] = outcome(late, lambda: steps(late), exchange="sync")
    half = build(token_nets.HiddenMean).bfloat16()
    found["half"] = outcome(half, lambda: [half(x.bfloat16(), 900.0)], exchange="sync")
    given = build(token_nets.OddName)
    call = dict(x=x, t=5.0, **MORE[token_nets.OddName](0))
    plain = [given(**call)]
    options = dict(exchange="sync", cut={"text_weights": 1})
    found["given"] = difference(outcome(given, lambda: [given(**call)], **options), plain)
    found["given wrongly"] = outcome(given, lambda: [given(**call)], exchange="sync", cut={"text_weights": 2})
    return found


def test_every_order_is_right_and_what_is_not_is_refused():
    by_rank, problems = ranks.run(2, _all), []
    for kind in RIGHT:
        for mode, limit in (("sync", 1e-5), ("displaced", 0.5)):
            errors = [rank[kind.__name__, mode] for rank in by_rank]
            if not all(isinstance(e, float) and e <= limit for e in errors):
                problems.append(f"{kind.__name__}, {mode}: {errors[0]}")
    assert not problems, "\n".join(problems)
    assert_refused([rank["masked"] for rank in by_rank], "attention_mask masks some of the picture's tokens")
    assert_refused([rank["late"] for rank in by_rank], "times what rounding explains")
    assert_refused([rank["half"] for rank in by_rank], "times what rounding explains")
    assert_refused([rank["given wrongly"] for rank in by_rank], "cut={'text_weights': (2,)}", "rows or tokens")
    assert max(rank["given"] for rank in by_rank) <= 1e-5


def test_the_plan_tells_what_is_cut():
    net = build(token_nets.TextFirst)
    inputs = dict(x=torch.randn(1, 4, token_nets.HEIGHT, 8), t=5.0, **MORE[token_nets.TextFirst](0))
    told = str(asyncdiff_fast.plan(net, inputs, num_patches=2))
    assert "cut: x in dimension 2, attention_mask in dimension 1; all else whole" in told


def test_a_plan_ends_in_a_clear_error_too():
    inputs = dict(x=torch.randn(1, 4, patch_nets.HEIGHT, 8), t=5.0)
    with pytest.raises(ValueError, match=r"(?s)does not run on patch 0 of 2, rows 0 to 8 of 16.*use num_stages"):
        asyncdiff_fast.plan(patch_nets.AcrossRows(), inputs, num_patches=2)
    with pytest.raises(ValueError, match="works along rows of the picture"):
        asyncdiff_fast.plan(patch_nets.Cumulative(), inputs, num_patches=2)
    # Only what patches give together shows that this one is wrong.
    for num_patches in (2, 3):
        with pytest.raises(ValueError, match="times what rounding explains"):
            asyncdiff_fast.plan(patch_nets.RowNumbers(), inputs, num_patches=num_patches)
