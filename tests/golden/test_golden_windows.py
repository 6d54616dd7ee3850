"""The published ParaTAA and ParaDiGMS, round by round: windows and points of every recorded case."""

import importlib.util
import os
import pathlib

import pytest
import torch

import asyncdiff_fast

FOLDER = pathlib.Path(os.environ.get("ADF_GOLDEN", pathlib.Path(__file__).parent))
# Of the largest point: the model counts in fp32, and batches of other sizes in another order.
TOLERANCE = 2e-6
OPTIONS = {
    "parataa": ("anderson", ("window", "order", "memory", "regularisation", "tol1", "tol2")),
    "paradigms": ("picard", ("window", "tolerance")),
}

_spec = importlib.util.spec_from_file_location("golden_load", FOLDER / "load.py")
load = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(load)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cases(kind):
    return sorted(path.name for path in FOLDER.glob(f"{kind}_*.safetensors"))


def predicting(case, inputs):
    """The guided prediction of a case's model on many points."""
    model, text = load.build_model(case["model"], case["weight_seed"]), inputs["encoder_hidden_states"]

    def predict(points, timesteps):
        n = len(points)
        both = dict(encoder_hidden_states=text.repeat_interleave(n, 0), return_dict=False)
        u, c = model(torch.cat((points, points)), torch.cat((timesteps, timesteps)), **both)[0].chunk(2)
        return u + case["guidance"] * (c - u)

    return predict


def play(name, **more):
    """(case, what was recorded, latents, record of `sample_window`)."""
    case, inputs, expected = load.load_case(FOLDER / name)
    method, names = OPTIONS[case["kind"]]
    scheduler = load.make_scheduler(case["scheduler"], case["steps"])
    noise = (inputs["latents"] * scheduler.init_noise_sigma)[0]
    options = {name: case[name] for name in names} | more
    latents, record = asyncdiff_fast.sample_window(
        predicting(case, inputs), scheduler, noise, method, keep_points=True, **options
    )
    return case, expected, latents, record


def close(found, expected, largest):
    return float((found - expected).abs().max()) <= TOLERANCE * float(largest.abs().max())


@pytest.mark.parametrize("name", cases("parataa"))
def test_parataa(name):
    case, expected, latents, record = play(name)
    # As recorded, points are counted from the picture.
    windows = [[case["steps"] - end + 1, case["steps"] - begin] for begin, end in record.windows]
    assert windows == expected["ref_windows"].tolist() and record.rounds == case["rounds"]
    for number, (points, theirs) in enumerate(zip(record.points, expected["ref_samples"], strict=True)):
        assert close(points.flip(0), theirs, expected["ref_samples"]), f"round {number}"
    assert close(latents, expected["ref_latents"][0], expected["ref_samples"])


@pytest.mark.parametrize("name", cases("paradigms"))
def test_paradigms(name):
    case, expected, latents, record = play(name, end_at_one=True)
    assert [list(w) for w in record.windows] == expected["ref_windows"].tolist() and record.rounds == case["rounds"]
    # Recorded were the points that each round began with.
    began = [record.points[0][:1].expand_as(record.points[0]), *record.points[:-1]]
    found = torch.cat([points[begin:end] for points, (begin, end) in zip(began, record.windows, strict=True)])
    assert close(found, expected["ref_points"], expected["ref_points"])
    assert close(latents, expected["ref_latents"][0], expected["ref_points"])


def test_cases_tell_rounds_apart():
    """The comparison can fail: rounds differ by more than the tolerance, and so does ParaDiGMS's own end."""
    _, expected, _, record = play(cases("parataa")[1], memory=1)
    assert not close(record.points[2].flip(0), expected["ref_samples"][2], expected["ref_samples"])
    _, expected, latents, _ = play(cases("paradigms")[0])
    assert not close(latents, expected["ref_latents"][0], expected["ref_points"])
