"""Projections of constant inputs are made once, and never stale."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from asyncdiff_fast.fused import packed
from asyncdiff_fast.fused.projections import KeptBytes, Projections


class Net(nn.Module):
    """Keys of the text as it is, and values of a caption projection; the sample goes through a layer of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.keys, self.project, self.act = nn.Linear(6, 4), nn.Linear(6, 5), nn.GELU()
        self.values, self.own = nn.Linear(5, 4, bias=False), nn.Linear(4, 4)
        self.after = lambda keys, values: None

    def forward(self, sample, text):
        keys = self.keys(text)
        values = self.values(self.act(self.project(text)).view(text.shape[0], -1, 5))
        made = F.scaled_dot_product_attention(self.own(sample), keys, values)
        self.after(keys, values)
        return made


@pytest.fixture
def made(monkeypatch):
    """Names of what was really computed, in a list, in each `nn.Linear` and `nn.GELU`."""
    calls = []
    for kind in (nn.Linear, nn.GELU):
        own = kind.forward

        def counted(module, input, own=own):
            calls.append(tuple(input.shape))
            return own(module, input)

        monkeypatch.setattr(kind, "forward", counted)
    with torch.no_grad():
        yield calls


def _latent(args, kwargs):
    return args[0]


def _generation():
    net = Net().eval()
    projections = Projections(net, active=True)
    return net, projections, projections.during(net.forward, _latent)


def _fresh(net, sample, text):
    """The result with nothing kept."""
    return net.forward(sample, text)


def _inputs():
    return torch.randn(2, 7, 4), torch.randn(2, 3, 6)


def test_text_is_projected_once_from_the_second_call_on(made):
    net, projections, run = _generation()
    _, text = _inputs()
    counts = []
    for _ in range(4):
        sample = torch.randn(2, 7, 4)
        made.clear()
        result = run(sample, text)
        counts.append(len(made))
        assert torch.equal(result, _fresh(net, sample, text))
    assert counts == [5, 5, 1, 1]
    # Keys, the projection, its activation, values: of 2 * 3 tokens.
    assert projections.nbytes == 4 * 6 * (4 + 5 + 5 + 4)
    projections.begin()
    assert projections.nbytes == 0
    made.clear()
    run(sample, text)
    assert len(made) == 5
    projections.remove()
    assert not any("forward" in vars(module) for module in net.modules())


def _slice(net, text):
    return text[:1].expand(2, -1, -1)


def _write(net, text):
    return text.mul_(2)


def _write_uncounted(net, text):
    text.data.mul_(2)
    return text


def _write_by_numpy(net, text):
    text.numpy()[:] *= 2
    return text


def _replace_weight(net, text):
    net.keys.weight = nn.Parameter(net.keys.weight * 2)
    return text


def _write_weight(net, text):
    net.project.weight.mul_(2)
    return text


def _write_weight_uncounted(net, text):
    net.values.weight.data.add_(1)
    return text


def _write_bias(net, text):
    net.keys.bias.data.add_(1)
    return text


def _drop_bias(net, text):
    net.keys.bias = None
    return text


CHANGES = [
    _slice, _write, _write_uncounted, _write_by_numpy, _replace_weight, _write_weight,
    _write_weight_uncounted, _write_bias, _drop_bias,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_is_made_anew(change):
    net, _, run = _generation()
    sample, text = _inputs()
    with torch.no_grad():
        for _ in range(3):
            before = run(sample, text)
        text = change(net, text)
        for _ in range(3):
            result = run(sample, text)
            assert torch.equal(result, _fresh(net, sample, text))
            assert not torch.equal(result, before)


def test_another_prompt_that_comes_to_lie_in_freed_memory(made):
    net, _, run = _generation()
    for i in range(20):
        sample, text = torch.randn(2, 7, 4), torch.full((2, 3, 6), float(i))
        assert torch.equal(run(sample, text), _fresh(net, sample, text))
        del text
        gc.collect()


def test_two_prompts_by_turns_are_both_kept(made):
    net, _, run = _generation()
    prompts = _inputs()[1], _inputs()[1]
    for _ in range(2):
        for text in prompts:
            run(torch.randn(2, 7, 4), text)
    made.clear()
    for text in prompts:
        sample = torch.randn(2, 7, 4)
        result = run(sample, text)
        assert len(made) == 1
        assert torch.equal(result, _fresh(net, sample, text))
        made.clear()


def test_a_halved_batch_is_kept_by_its_place(made):
    net, _, run = _generation()
    sample, text = _inputs()
    for _ in range(2):
        run(sample[1:], text[1:])
    made.clear()
    assert torch.equal(run(sample[1:], text[1:]), _fresh(net, sample[1:], text[1:]))
    assert made.count((1, 3, 6)) == 2, "only the fresh one makes keys and the caption's projection"
    assert torch.equal(run(sample[:1], text[:1]), _fresh(net, sample[:1], text[:1]))


@pytest.mark.parametrize("which", [0, 1])
def test_results_that_somebody_writes_into_are_made_anew(made, which):
    net, _, run = _generation()
    sample, text = _inputs()
    net.after = lambda *results: results[which].add_(1)
    for _ in range(4):
        assert torch.equal(run(sample, text), _fresh(net, sample, text))


def test_only_the_denoisers_own_calls_use_what_is_kept(made):
    net, _, run = _generation()
    sample, text = _inputs()
    for _ in range(3):
        run(sample, text)
    made.clear()
    net(sample, text)
    assert len(made) == 5


def test_autocast_and_inference_mode_make_everything(made):
    _, projections, run = _generation()
    sample, text = _inputs()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            run(sample, text)
    assert projections.nbytes == 0
    projections.begin()
    with torch.inference_mode():
        for _ in range(3):
            run(sample.clone(), text.clone())
    assert projections.nbytes == 0


def test_gradients_reach_the_weights():
    net, projections, run = _generation()
    sample, text = _inputs()
    for _ in range(3):
        run(sample, text).sum().backward()
    assert projections.nbytes == 0 and net.keys.weight.grad is not None


def test_other_arguments_push_no_prompt_out(made):
    net, projections, _ = _generation()
    run = projections.during(lambda sample, text, extra: net.keys(extra).sum() + net.forward(sample, text), _latent)
    _, text = _inputs()
    for _ in range(30):
        made.clear()
        run(torch.randn(2, 7, 4), text, torch.randn(2, 3, 6))
    assert len(made) == 2


def test_the_latent_is_never_constant(made):
    _, _, run = _generation()
    sample, text = _inputs()
    for _ in range(3):
        made.clear()
        run(sample, text)
    assert made == [(2, 7, 4)]


def test_bytes_are_known_beforehand(made):
    net, projections, run = _generation()
    sample, text = _inputs()
    with KeptBytes([sample, text], sample) as counted:
        net(sample, text)
    for _ in range(3):
        run(sample, text)
    assert counted.nbytes == projections.nbytes
    with KeptBytes([sample, text], sample) as counted:
        F.linear(input=text, weight=net.keys.weight)
    assert counted.nbytes == text[..., :4].numel() * 4


def test_nothing_is_touched_where_it_is_not_active():
    net = Net()
    Projections(net, active=False)
    assert not any("forward" in vars(module) for module in net.modules())
    Projections(net, active=True, taken={id(net.act)})
    assert {name for name, m in net.named_modules() if "forward" in vars(m)} == {"keys", "project", "values", "own"}


def test_packed_weights_lie_beneath(monkeypatch):
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 1)
    net = Net().eval()
    sample, text = _inputs()
    with torch.no_grad():
        expected = net.forward(sample, text)
        weights = packed.PackedWeights(net, active=True)
        beneath = dict(weights.forwards)
        projections = Projections(net, active=True, beneath=beneath)
        run = projections.during(net.forward, _latent)
        for _ in range(4):
            torch.testing.assert_close(run(sample, text), expected)
        assert projections.nbytes
        projections.remove()
        assert {m: vars(m).get("forward") for m in beneath} == beneath
        weights.remove()
        assert not any("forward" in vars(module) for module in net.modules())
        assert torch.equal(net.forward(sample, text), expected)
