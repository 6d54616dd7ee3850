"""Every tiny pipeline on a real GPU with fused kernels, against itself without; and replayed from a CUDA graph."""

import pytest
import tiny_pipelines
import torch

import asyncdiff_fast

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_float32():
    """Convolutions and products in true float32, so that two ways of computing can be compared."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def choices(tmp_path, monkeypatch):
    """A cache of its own for measured choices."""
    monkeypatch.setenv("ASYNCDIFF_FAST_CACHE", str(tmp_path))


def _relative(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


@pytest.mark.usefixtures("choices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kernels", ["triton", "auto"])
@pytest.mark.parametrize("name", tiny_pipelines.NAMES)
@torch.no_grad()
def test_pipeline(name, kernels, dtype):
    pipe, calls = tiny_pipelines.build(name).to(DEVICE), []
    denoiser = tiny_pipelines.denoiser(pipe)
    watch = denoiser.register_forward_pre_hook(lambda m, *given: calls.append(given), with_kwargs=True)
    # With one step PixArt's pipeline wants a distilled model's scheduler.
    tiny_pipelines.generate(pipe, name, steps=2)
    watch.remove()
    if dtype is not torch.float32:
        denoiser.to(dtype)
    args, kwargs = _cast(calls[0], dtype)
    want = denoiser(*args, **kwargs)[0]
    runtime = asyncdiff_fast.patch(pipe, kernels=kernels)
    try:
        got, again = (denoiser(*args, **kwargs)[0] for _ in range(2))
    finally:
        summary = runtime.stats()["kernels"]
        asyncdiff_fast.unpatch(pipe)
    after = denoiser(*args, **kwargs)[0]
    limit = 5e-5 if dtype is torch.float32 else 2e-2
    assert _relative(got, want) < limit and _relative(again, got) < limit
    assert _relative(after, want) < limit / 10
    assert summary["mode"] == kernels and (kernels == "triton" or not summary["layers"] or summary["shapes"])


def _cast(x, dtype):
    if isinstance(x, torch.Tensor):
        # HunyuanDiT computes in the dtype of its timesteps, which its pipeline gives in that of the latents.
        return x.to(dtype) if x.is_floating_point() and x.ndim > 0 else x
    if isinstance(x, dict):
        return {name: _cast(value, dtype) for name, value in x.items()}
    return type(x)(_cast(item, dtype) for item in x) if isinstance(x, list | tuple) else x


@pytest.mark.usefixtures("choices")
@pytest.mark.parametrize("kernels", ["torch", "auto", "triton"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "pixart"])
@torch.no_grad()
def test_captured_calls(name, kernels):
    pipe = tiny_pipelines.build(name).to(DEVICE)
    want = tiny_pipelines.generate(pipe, name, steps=5)
    runtime = asyncdiff_fast.patch(pipe, kernels=kernels, graphs=True)
    got = [tiny_pipelines.generate(pipe, name, steps=5) for _ in range(2)]
    told = runtime.stats()["kernels"]["graphs"]
    asyncdiff_fast.unpatch(pipe)
    assert told["captured"] == 1 and told["replayed"] >= 8 and told["refused"] == [], told
    assert all(_relative(torch.from_numpy(x), torch.from_numpy(want)) < 1e-2 for x in got)


@pytest.mark.usefixtures("choices")
@torch.no_grad()
def test_replayed_calls_see_texts_and_weights_change():
    unet = tiny_pipelines.build("sdxl").to(DEVICE).unet.half()
    x, text = (torch.randn(shape, device=DEVICE).half() for shape in ((2, 4, 16, 16), (2, 7, 64)))
    added = dict(text_embeds=torch.randn(2, 32, device=DEVICE).half(), time_ids=torch.ones(2, 6, device=DEVICE).half())
    keys = next(module for name, module in unet.named_modules() if name.endswith("attn2.to_k"))

    def calls():
        found = []
        for step in range(9):
            if step == 3:
                text.mul_(1.5)
            elif step == 6:
                keys.weight.mul_(1.5)
            found.append(unet(x * (1 + step), 900 - step, text, added_cond_kwargs=added, return_dict=False)[0])
        text.div_(1.5)
        keys.weight.div_(1.5)
        return found

    want, strides = calls(), [weight.stride() for weight in unet.parameters()]
    runtime = asyncdiff_fast.patch(unet, graphs=True)
    got = calls()
    told = runtime.stats()["kernels"]["graphs"]
    asyncdiff_fast.unpatch(unet)
    assert told == {"captured": 1, "replayed": 8, "refused": []}
    assert all(_relative(a.cpu(), b.cpu()) < 1e-2 for a, b in zip(got, want, strict=True))
    assert [weight.stride() for weight in unet.parameters()] == strides
    assert _relative(calls()[8].cpu(), want[8].cpu()) < 1e-3


@pytest.mark.usefixtures("choices")
@pytest.mark.parametrize("kernels", ["triton", "auto"])
@torch.no_grad()
def test_replayed_from_a_graph(kernels):
    pipe = tiny_pipelines.build("sdxl").to(DEVICE)
    unet = pipe.unet.half()
    x, text = (torch.randn(shape, device=DEVICE).half() for shape in ((2, 4, 16, 16), (2, 7, 64)))
    added = dict(text_embeds=torch.randn(2, 32, device=DEVICE).half(), time_ids=torch.ones(2, 6, device=DEVICE).half())
    t = torch.tensor(500.0, device=DEVICE)

    def call():
        return unet(x, t, text, added_cond_kwargs=added, return_dict=False)[0]

    asyncdiff_fast.patch(pipe, kernels=kernels)
    want = call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    x.copy_(x.flip(0))
    graph.replay()
    flipped = call()
    asyncdiff_fast.unpatch(pipe)
    assert _relative(got, flipped) < 1e-2 and _relative(got, want) > 1e-2
