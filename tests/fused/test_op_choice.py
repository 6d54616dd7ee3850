"""Which kernel an op runs on: by times, by rank 0 for all, kept on disk; refused clearly where there is none."""

import errno
import json
import os
import shutil
from unittest import mock

import pytest
import ranks
import tiny_denoisers
import torch

import asyncdiff_fast
from asyncdiff_fast.exchange.world import World, start_process_group, stop_process_group
from asyncdiff_fast.fused import choice, choice_file, ops, timing

KEY = ("geglu", torch.Size((2, 8)), (8, 1), torch.float16, 0, ())


@pytest.mark.parametrize(
    ("times", "launched", "captured"),
    [
        (dict(torch=(10.0, 4.0), triton=(9.0, 3.0)), "triton", "triton"),
        (dict(torch=(10.0, 4.0), triton=(10.0, 4.0)), "torch", "torch"),
        # What loses to the host's launches still wins in a graph.
        (dict(torch=(10.0, 4.0), triton=(11.0, 3.0)), "torch", "triton"),
        (dict(torch=(10.0, 4.0), triton=(9.0, 4.1)), "triton", "torch"),
        (dict(torch=(10.0, 4.0), triton=None), "torch", "torch"),
        (dict(torch=None, triton=(10.0, 4.0)), "triton", "triton"),
        (dict(torch=None, triton=None), "torch", "torch"),
        (dict(torch=(9.0, 9.0), cudnn=(8.0, 5.0), flash=(7.0, 6.0), triton=(10.0, 1.0)), "flash", "triton"),
    ],
)
def test_the_fastest_is_chosen_launched_and_captured(times, launched, captured):
    found = choice.decide(times)
    assert (found["launched"], found["captured"]) == (launched, captured)


class _Gpu:
    """A GPU on which implementations take these times, in the order in which they are tried."""

    def __init__(self, *times, name="a GPU"):
        self.times, self.name, self.measured, self.captures = list(times), name, 0, False

    def available(self):
        return True

    def environment(self):
        return self.name

    def capturing(self):
        return self.captures

    def times_us(self, run, device_idx):
        self.measured += 1
        return self.times.pop(0)


SLOW, FAST = (2.0, 2.0), (1.0, 1.0)


def _choice(gpu, world=None):
    return choice.KernelChoice("auto", world or World([0], 1.0), gpu)


def _settle(settled, key=KEY, way=choice.LAUNCHED, run=lambda kernel: kernel):
    return settled._settle(key, way, run)


class _OnGpu:
    """What a choice looks at of a tensor."""

    is_cuda, shape, dtype, device = True, KEY[1], KEY[3], torch.device("cuda", 0)

    def stride(self):
        return KEY[2]


def test_captured_calls_have_a_choice_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("ASYNCDIFF_FAST_CACHE", str(tmp_path))
    gpu, ran = _Gpu((10.0, 4.0), (11.0, 3.0)), []

    def pick(choice):
        return choice.pick("geglu", _OnGpu(), (), ran.append)

    gpu.captures = True
    made = _choice(gpu)
    assert pick(made) == "torch" and not gpu.measured, "nothing is measured or compiled while a graph is captured"
    gpu.captures = False
    assert pick(made) == "torch" and gpu.measured == 2
    gpu.captures = True
    assert pick(made) == "triton"
    assert made.summary()["shapes"] == {"geglu: torch": 1} and made.summary()["captured"] == {"geglu: triton": 1}
    # In another process, which knows the choice and has compiled nothing yet.
    later = _choice(gpu)
    assert pick(later) == "torch" and ran == []
    gpu.captures = False
    assert pick(later) == "torch" and ran == ["triton"], "compiled where it may be"
    gpu.captures = True
    assert pick(later) == "triton" and ran == ["triton"]


def test_the_call_before_a_capture_runs_what_the_capture_will(monkeypatch, tmp_path):
    """What launched calls meet can be of other shapes and layouts, which would be unknown in the capture."""
    monkeypatch.setenv("ASYNCDIFF_FAST_CACHE", str(tmp_path))
    gpu = _Gpu((10.0, 4.0), (11.0, 3.0))
    made = _choice(gpu)

    def pick():
        return made.pick("geglu", _OnGpu(), (), lambda kernel: None)

    with made.as_captured():
        assert pick() == "triton" and gpu.measured == 2
    assert pick() == "torch"
    gpu.captures = True
    assert pick() == "triton"


def test_results_are_laid_out_as_what_was_given():
    """As torch's GroupNorm on a GPU does not leave them."""
    for x, last in (
        (torch.randn(2, 3, 4, 5), torch.channels_last),
        (torch.randn(2, 3, 2, 4, 5), torch.channels_last_3d),
    ):
        assert ops.laid_out_as(x, x) is x
        y = ops.laid_out_as(x.contiguous(memory_format=last), x)
        assert y.is_contiguous(memory_format=last) and torch.equal(x, y)


def test_measured_once_and_kept_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("ASYNCDIFF_FAST_CACHE", str(tmp_path / "made"))
    gpu = _Gpu(SLOW, FAST)
    choice = _choice(gpu)
    assert _settle(choice) == _settle(choice) == "triton"
    assert gpu.measured == 2
    assert choice.summary()["shapes"] == {"geglu: triton": 1}
    [file] = (tmp_path / "made").iterdir()
    assert list(json.loads(file.read_text())) == ["geglu (2, 8) (8, 1) float16 ()"]

    gpu = _Gpu()
    assert _settle(_choice(gpu)) == "triton"
    assert not gpu.measured

    gpu = _Gpu(FAST, SLOW, name="another GPU")
    assert _settle(_choice(gpu)) == "torch"
    assert len(list(file.parent.iterdir())) == 2


def test_edited_kernels_are_measured_again(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    shipped = timing.environment()
    for name in ("alike", "edited"):
        shutil.copytree(timing.KERNELS, tmp_path / name)
    with open(tmp_path / "edited" / "pointwise.py", "a") as source:
        source.write("# faster\n")
    files = []
    for name in ("alike", "edited"):
        monkeypatch.setattr(timing, "KERNELS", tmp_path / name)
        files.append(choice_file.path(timing.environment()))
    assert files[0] == choice_file.path(shipped) != files[1]


UNKNOWN = '{"geglu (2, 8) (8, 1) float16 ()": {"launched": "torch", "captured": "cuda"}}'
DAMAGED = ["", "{", "[]", "3", "null", "[" * 100_000, "\x00", UNKNOWN, '{"x": 1}']
DAMAGED += ['{"": {"launched": "torch", "captured": "torch"}}', '{"geglu 1": [1]}']
DAMAGED += ['{"geglu 1": {"launched": ["torch"], "captured": "torch"}}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_cache_is_measured_again(monkeypatch, tmp_path, text):
    monkeypatch.setenv("ASYNCDIFF_FAST_CACHE", str(tmp_path))
    gpu = _Gpu(SLOW, FAST)
    choice_file.path(gpu.environment()).write_text(text)
    assert _settle(_choice(gpu)) == "triton"
    assert gpu.measured
    assert _settle(_choice(_Gpu())) == "triton", "the file must be whole again"


def test_a_choice_among_fewer_implementations_is_made_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("ASYNCDIFF_FAST_CACHE", str(tmp_path))
    gpu = _Gpu(SLOW, FAST)
    _settle(_choice(gpu))
    path = choice_file.path(gpu.environment())
    ((text, entry),) = json.loads(path.read_text()).items()
    entry["us"].pop("triton")
    path.write_text(json.dumps({text: entry | {"launched": "torch", "captured": "torch"}}))
    assert _settle(_choice(_Gpu(SLOW, FAST))) == "triton"


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASYNCDIFF_FAST_CACHE", str(tmp_path / "file" / "below"))
    assert _settle(_choice(_Gpu(SLOW, FAST))) == "triton"
    assert "not kept" in caplog.text


def test_a_full_disk_leaves_nothing_behind(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "kernels.json"
    choice = {"launched": "torch", "captured": "torch", "us": {"torch": [2.0, 2.0], "triton": None}}
    choice_file.write(path, "geglu 1", choice)
    monkeypatch.setattr(choice_file.json, "dump", full)
    choice_file.write(path, "geglu 2", choice)
    assert [file.name for file in tmp_path.iterdir()] == ["kernels.json"] and list(choice_file.read(path)) == [
        "geglu 1"
    ]


def test_without_a_home_nothing_is_kept(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ASYNCDIFF_FAST_CACHE", raising=False)
    monkeypatch.setattr(choice_file.Path, "home", no_home)
    assert choice_file.path({}) is None
    assert _settle(_choice(_Gpu(SLOW, FAST))) == "triton"


def _two_ranks(rank, folder):
    """Each rank's choices for two layers, and how often it measured."""
    os.environ["ASYNCDIFF_FAST_CACHE"] = f"{folder}/{rank}"
    start_process_group(60)
    try:
        # Rank 1 would choose otherwise.
        gpu = _Gpu(FAST, SLOW) if rank else _Gpu(SLOW, FAST)
        choice = _choice(gpu, World(range(2), 60.0))
        before = _settle(choice, ("adaln", *KEY[1:]))
        # Uneven patches: what is one shape on rank 0 are two on rank 1.
        shapes = [(2, 8), (1, 8)] if rank else [(2, 8), (2, 8)]
        with choice.learning():
            settled = [_settle(choice, (KEY[0], torch.Size(shape), *KEY[2:])) for shape in shapes]
        return before, settled, gpu.measured
    finally:
        stop_process_group()


def test_rank_0_decides(tmp_path):
    # Before they learn, ranks may be at different places: then it is the rule, and nobody measures.
    assert ranks.run(2, _two_ranks, str(tmp_path)) == [
        ("triton", ["triton"] * 2, 2),
        ("triton", ["triton"] * 2, 0),
    ]


def _one_has_no_gpu(rank):
    start_process_group(60)
    try:
        gpu = _Gpu()
        gpu.available = lambda: rank == 0
        return _choice(gpu, World(range(2), 60.0)).active
    finally:
        stop_process_group()


def test_all_do_without_if_one_has_no_gpu():
    assert ranks.run(2, _one_has_no_gpu) == [False, False]


def _refused(rank):
    unet = tiny_denoisers.sd15_unet()
    try:
        asyncdiff_fast.patch(unet, num_stages=2, kernels="triton" if rank else "torch", timeout_s=60)
    except ValueError as error:
        return str(error), vars(unet.mid_block.resnets[0]).get("forward")


def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if choice.why_not() is None:
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r'kernels="triton" needs Triton and a CUDA device.*install.*or pass'):
        asyncdiff_fast.patch(tiny_denoisers.sd15_unet(), kernels="triton")
    with pytest.raises(ValueError, match='kernels must be "auto", "triton" or "torch"'):
        asyncdiff_fast.Config(kernels="cuda")
    messages = ranks.run(2, _refused)
    assert all(forward is None for _, forward in messages)
    assert all("kernels" in text for text, _ in messages), "every rank must refuse"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("mode", ["auto", "torch"])
def test_without_a_gpu_nothing_is_replaced(mode):
    unet = tiny_denoisers.sd15_unet()
    untouched = [set(vars(m)) for m in unet.modules()]
    runtime = asyncdiff_fast.patch(unet, kernels=mode)
    assert runtime.stats()["kernels"] == {"layers": {}, "mode": mode, "active": False}
    assert [set(vars(m)) for m in unet.modules()][1:] == untouched[1:]
    asyncdiff_fast.unpatch(unet)


def test_rule_of_thumb():
    with mock.patch("torch.cuda.get_device_properties", lambda: mock.Mock(multi_processor_count=132)):
        assert choice.rule("group_norm", (1, 320, 64, 64), ()) == "triton"
        # SDXL, 10 heads: a whole picture of 1024 fills the device, one of eight patches of it does not.
        assert choice.rule("attention", (2, 4096, 10, 64), ((4096,),)) == "cudnn"
        assert choice.rule("attention", (1, 512, 10, 64), ((4096,),)) == "triton"
        assert choice.rule("attention", (2, 4096, 10, 64), ((333, 4096),)) == "triton"
    with mock.patch("torch.version.hip", "6.4"):
        assert choice.rule("attention", (2, 4096, 10, 64), ((4096,),)) == "triton"
        assert choice.rule("attention", (2, 4096, 10, 128), ((4096,),)) == "torch"
