"""Convolutions and linear layers with packed weights: equal to torch's, and never with weights of before."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, linear
from torch.overrides import TorchFunctionMode

import asyncdiff_fast
from asyncdiff_fast.fused import packed, weights
from asyncdiff_fast.hooks import Watch


@pytest.fixture(autouse=True)
def small_weights(monkeypatch):
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 1)
    with torch.no_grad():
        yield


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, padding=(1, 0))

    def forward(self, sample, timestep):
        return self.last(torch.relu(self.first(sample)))


def _counted(monkeypatch):
    calls = []
    pack = torch._C._nn.mkldnn_reorder_conv2d_weight
    monkeypatch.setattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", lambda *args: calls.append(args) or pack(*args))
    return calls


def _counted_copies(monkeypatch):
    calls, pack = [], packed._Copy.pack
    monkeypatch.setattr(packed._Copy, "pack", lambda *args: calls.append(args) or pack(*args))
    return calls


@pytest.mark.parametrize("change", ["in place", "data", "replaced", "moved storage"])
def test_a_changed_weight_is_packed_anew(monkeypatch, change):
    packs = _counted(monkeypatch)
    convs = packed.PackedWeights(nn.Module(), active=True)
    weight, x = nn.Parameter(torch.randn(6, 4, 3, 3)), torch.randn(2, 4, 5, 5)
    for _ in range(3):
        torch.testing.assert_close(convs.conv2d(x, weight, padding=1), conv2d(x, weight, padding=1))
    assert len(packs) == 1
    if change == "in place":
        weight.mul_(2)
    elif change == "data":
        weight.data += 0.5
    elif change == "replaced":
        weight = nn.Parameter(weight * 3)
    else:
        weight.data = weight.data * 2
    for _ in range(3):
        torch.testing.assert_close(convs.conv2d(x, weight, padding=1), conv2d(x, weight, padding=1))
    assert len(packs) == 2


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 3, 3, 3)])
def test_copies_outlive_a_generation_unless_a_weight_has_changed(monkeypatch, shape, offset):
    packs = _counted(monkeypatch)
    convs = packed.PackedWeights(nn.Module(), active=True)
    values = torch.randn(1000)[offset:][: torch.Size(shape).numel()]
    weight, x = nn.Parameter(values.view(shape)), torch.randn(2, shape[1], 5, 5)
    monkeypatch.setattr(weights, "NUM_SAMPLES", 1)
    for count in (1, 1, 2):
        for _ in range(3):
            torch.testing.assert_close(convs.conv2d(x, weight), conv2d(x, weight))
        assert len(packs) == count
        if convs._generation == 1:
            # A single value, neither counted by torch nor among the samples.
            weight.data.view(-1)[-1] += 0.5
        convs.begin()
    convs.begin()
    assert not convs._copies, "weights that nobody used for a generation are dropped"


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": (1, 0)}, {"dilation": 2}, {"bias": True}])
def test_options_of_a_convolution(options):
    convs = packed.PackedWeights(nn.Module(), active=True)
    options = {**options, "bias": torch.randn(6) if options.get("bias") else None}
    weight, x = torch.randn(6, 4, 3, 3), torch.randn(2, 4, 7, 6)
    for _ in range(3):
        torch.testing.assert_close(convs.conv2d(x, weight, **options), conv2d(x, weight, **options))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(monkeypatch, shape, bias):
    packs = _counted_copies(monkeypatch)
    layers = packed.PackedWeights(nn.Module(), active=True)
    weight, x = nn.Parameter(torch.randn(6, 5)), torch.randn(shape)
    bias = torch.randn(6) if bias else None
    for count in (1, 1, 2):
        for _ in range(3):
            torch.testing.assert_close(layers.linear(x, weight, bias), linear(x, weight, bias))
        # One that does not lie in one piece.
        x = torch.randn(*shape[:-1], 10)[..., ::2] if count == 1 else x
        torch.testing.assert_close(layers.linear(x, weight, bias), linear(x, weight, bias))
        assert len(packs) == count
        if layers._generation == 1:
            weight.data[3] += 1
        layers.begin()


def test_linear_layers_that_do_not_pay(monkeypatch):
    packs = _counted_copies(monkeypatch)
    layers = packed.PackedWeights(nn.Module(), active=True)
    weight = torch.randn(6, 5)
    inputs = [torch.randn(0, 5), torch.randn(packed.MOST_PIXELS + 1, 5), torch.randn(3, 5).double()]
    for x in inputs:
        for _ in range(3):
            assert torch.equal(layers.linear(x, weight.to(x.dtype)), linear(x, weight.to(x.dtype)))
    for _ in range(3):
        assert torch.equal(layers.linear(inputs[0], weight.t().contiguous().t()), linear(inputs[0], weight))
    assert not packs


def test_modes_that_follow_a_function_see_it(monkeypatch):
    """Patches watch convolutions, not linear layers; anybody else may watch both."""
    packs = _counted_copies(monkeypatch)
    net = nn.ModuleList([nn.Conv2d(4, 6, 3), nn.Linear(5, 6)])
    layers, seen = packed.PackedWeights(net, active=True), []

    def watched(function, args, kwargs):
        seen.append(function)
        return function(*args, **kwargs)

    class Anybody(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    inputs = torch.randn(1, 4, 5, 5), torch.randn(3, 5)
    for _ in range(3):
        with Anybody():
            results = [module(x) for module, x in zip(net, inputs, strict=True)]
    assert not packs
    for _ in range(3):
        with Watch({torch.conv2d}, watched):
            again = [module(x) for module, x in zip(net, inputs, strict=True)]
    assert len(seen) == 3 and len(packs) == 1
    torch.testing.assert_close(again, results)
    layers.remove()


def test_shapes_that_take_turns_are_not_packed(monkeypatch):
    packs = _counted(monkeypatch)
    convs = packed.PackedWeights(nn.Module(), active=True)
    weight = torch.randn(6, 4, 3, 3)
    for size in (5, 6, 5, 6):
        convs.conv2d(torch.randn(1, 4, size, size), weight)
    assert not packs


def test_one_device_patched_and_unpatched(monkeypatch):
    packs = _counted(monkeypatch)
    net = Net().eval()
    x = torch.randn(1, 4, 8, 8)
    exact = net(x, 5.0)
    runtime = asyncdiff_fast.patch(net)
    for step in range(4):
        torch.testing.assert_close(net(x, 5.0 - step), exact)
    assert len(packs) == 2 and repr(runtime) == "<Runtime of Net: one device>"
    told = runtime.stats()["kernels"]["packed"]
    weight_bytes = net.first.weight.nbytes + net.last.weight.nbytes
    assert told == {"weights": 2, "mb": pytest.approx(weight_bytes / 1e6)}
    net.first.weight.data.mul_(2)
    later = nn.Module.__call__(net, x, 5.0)
    asyncdiff_fast.unpatch(net)
    assert torch.equal(later, net(x, 5.0)) or torch.allclose(later, net(x, 5.0), atol=1e-5)
    assert "forward" not in vars(net.first) and len(packs) >= 2


def test_torch_kernels_pack_nothing(monkeypatch):
    packs = _counted(monkeypatch)
    net = Net().eval()
    asyncdiff_fast.patch(net, kernels="torch")
    for step in range(3):
        net(torch.ones(1, 4, 8, 8), 5.0 - step)
    asyncdiff_fast.unpatch(net)
    assert not packs


def test_gradients_take_torchs_own():
    convs = packed.PackedWeights(nn.Module(), active=True)
    weight, x = torch.randn(6, 4, 3, 3), torch.randn(2, 4, 5, 5, requires_grad=True)
    with torch.enable_grad():
        for _ in range(3):
            convs.conv2d(x, weight).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kernels, forwards", [("auto", 5), ("torch", 3)])
def test_a_division_by_time_warms_up_only_where_weights_are_packed(kernels, forwards):
    calls = []
    net = Net().eval()
    net.first.register_forward_pre_hook(lambda module, args: calls.append(module))
    inputs = {"sample": torch.ones(1, 4, 8, 8), "timestep": 5.0}
    asyncdiff_fast.plan(net, inputs, num_stages=2, balance="time", kernels=kernels)
    # One is the traced one.
    assert len(calls) == forwards
