"""The benchmarks of attention and of the small fusions without a GPU: their rows, baselines and resumption."""

import importlib
import json
import pathlib

import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A function that imports a module of `benchmarks/`, whose neighbours it finds on `sys.path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def timed_once(load, monkeypatch):
    """Replace the clock: everything takes a millisecond. What is timed is called, for its result."""
    timing = load("gpu_timing")
    monkeypatch.setattr(timing.Clock, "seconds", lambda self, run, **_: (run(), ([1e-3], False))[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["bench_attention", "bench_pointwise"])
def test_says_that_it_needs_a_gpu(load, name):
    with pytest.raises(SystemExit, match="needs a GPU"):
        load(name).main([])


@pytest.mark.parametrize(
    ("name", "share", "own", "count"),
    [("attention", "share_of_matmul", "ring, torch", 2 * 5), ("pointwise", "share_of_copy", "torch", 6 * 2)],
)
def test_measures_each_row_once(load, monkeypatch, tmp_path, name, share, own, count):
    timed_once(load, monkeypatch)
    out = tmp_path / f"{name}.jsonl"
    bench, roofline = load(f"bench_{name}"), load("roofline")
    bench.main(["--device", "cpu", "--quick", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    # Torch's CPU build has no cuDNN: its rows are left out.
    assert len(rows) == count and not any("cudnn" in row["key"]["op"] for row in rows)
    # A run that was broken off: what is there stays, what is missing comes.
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:-3]))
    bench.main(["--device", "cpu", "--quick", "--out", str(out)])
    again = [json.loads(line)["key"] for line in out.read_text().splitlines()]
    assert again == [row["key"] for row in rows]
    monkeypatch.setattr(load("measure"), "RESULTS", tmp_path)
    header, lines = roofline.table_cells(roofline.latest(name), own, (own,), share)
    assert lines and all(len(line) == len(header) and line[-1].startswith("1.0") for line in lines)


def test_no_row_is_begun_when_the_time_is_up(load, monkeypatch, tmp_path, capsys):
    timed_once(load, monkeypatch)
    op_bench, options = load("op_bench"), ["--device", "cpu", "--quick", "--out", str(tmp_path / "rows.jsonl")]
    options = op_bench.parse(options, "", "rows", -1)
    op_bench.add_rows(options, [({}, lambda: pytest.fail("too late"))] * 2)
    assert "2 of 2 cases not begun" in capsys.readouterr().out


def test_a_case_that_is_wrong_costs_no_other(load, monkeypatch, tmp_path):
    timed_once(load, monkeypatch)
    op_bench, roofline = load("op_bench"), load("roofline")
    monkeypatch.setattr(load("measure"), "RESULTS", tmp_path)

    def wrong():
        raise AssertionError("the kernel is off by 3")

    ways = {"torch": (lambda: None, None, None), "cat, torch.compile": (wrong, None, None)}
    cases = [({"shape": [1]}, wrong), ({"shape": [2]}, lambda: ways)]
    options = op_bench.parse(["--device", "cpu", "--quick", "--out", str(tmp_path / "rows.jsonl")], "", "rows", 60)
    for again in range(1, 3):
        with pytest.raises(SystemExit, match="1 of 2 cases failed"):
            op_bench.add_rows(options, cases)
        rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert [row["key"]["op"] for row in rows] == ["failed", "torch", "failed"][: again + 1]
        assert rows[0]["error"] == "AssertionError: the kernel is off by 3"
    assert [row["key"]["shape"] for row in roofline.latest("rows")] == [[2]]


def test_baselines_of_attention_agree(load):
    bench = load("bench_attention")
    for shape in bench.shapes("cpu", True):
        inputs = bench.Inputs(shape, torch.float32, "cpu")
        ops = {name: run for name, run in bench.baseline_ops(inputs, "cpu").items() if "cudnn" not in name}
        want = torch.cat(bench.attention_reference(inputs.queries, inputs.segments), 1)
        assert {name.split(", ")[0] for name in ops} == {"cat", "ring"}
        for run in ops.values():
            torch.testing.assert_close(run(), want)


def test_every_shape_of_the_models_is_there(load):
    """Sizes as in the models' own configurations, at every number of pixels and patches."""
    attention, pointwise = load("bench_attention"), load("bench_pointwise")
    found = {(s.model, s.px, s.patches, s.queries, s.heads) for s in attention.shapes("cuda", False)}
    for case in [
        ("sdxl", 1024, 1, 4096, 10), ("sdxl", 1024, 8, 128, 20), ("sdxl", 2048, 4, 4096, 10),
        ("sdxl", 3840, 8, 7200, 10), ("sd3", 1024, 2, 333 + 2048, 24), ("flux", 2048, 8, 512 + 2048, 24),
    ]:  # fmt: skip
        assert case in found
    fusions = {(m, px, p, pointwise.op_of(layer).__name__) for m, px, p, layer in pointwise.cases("cuda", False)}
    assert len(fusions) >= 3 * 4 + 2 * 4 * 3 + 2 * 4 * 4
    assert {("sdxl", 3840, 8, "geglu"), ("flux", 1024, 1, "gelu_beside")} <= fusions


def row(op, seconds, shape, **key):
    """A row as a benchmark writes it, at 0.9 of the copy bandwidth."""
    return {"key": {"op": op, "shape": shape, **key}, "median_s": seconds, "share_of_copy": 0.9}


def test_goals_are_judged_by_the_worst_shape(load):
    goals = load("goals")
    unmeasured = goals.lines("group_norm", [])
    assert {line[2] for line in unmeasured} == {"not measured"}
    large, small = [1, 640, 240, 480], [1, 640, 8, 64]
    rows = [
        row("group_norm", 1.0, large, px=3840, patches=2), row("torch", 7.0, large, px=3840, patches=2),
        row("group_norm", 1.0, [1, 640, 480, 480], px=3840, patches=1),
        row("torch", 5.0, [1, 640, 480, 480], px=3840, patches=1),
        # Too small to count for this goal.
        row("group_norm", 1.0, small, px=1024, patches=8), row("torch", 1.0, small, px=1024, patches=8),
    ]  # fmt: skip
    told = {what: (goal, measured) for what, goal, measured in goals.lines("group_norm", rows)}
    assert told["against `F.group_norm`, SiLU and `cat`, 8 MB and more"] == ("6.00×", "5.00×, missed")
    assert next(iter(told.values())) == ("85%", "90%")
    auto = [row(op, s, [1, 2, 3, 4]) for op, s in {"auto": 2.0, "ring, cudnn": 3.0, "attention": 1.9}.items()]
    assert goals.lines("attention", auto)[-1][2] == "0.95×, missed"


def test_every_goal_is_about_rows_that_are_measured(load):
    """Each goal finds shapes among those of the benchmark that is run in full."""
    goals, group_norm = load("goals"), load("bench_group_norm")
    attention, pointwise = load("bench_attention"), load("bench_pointwise")
    keys = {
        "group_norm": [dict(px=px, patches=n, shape=list(s)) for px, n, s in group_norm.shapes("cuda", False)],
        "attention": [
            dict(model=s.model, px=s.px, patches=s.patches, shape=[s.queries, s.text + s.image, s.heads, s.head_size])
            for s in attention.shapes("cuda", False)
        ],
        "pointwise": [
            dict(fusion=pointwise.op_of(layer).__name__, model=m, px=px, patches=n,
                 shape=[layer[3] + (px // layer[2]) ** 2 // n, layer[1]])
            for m, px, n, layer in pointwise.cases("cuda", False)
        ],
    }  # fmt: skip
    ops = {"group_norm": ["group_norm", "apply", "torch", "DistriFusion's formula", "one program per group"]}
    ops["attention"] = ["attention", "auto", "ring, cudnn", "cat, cudnn"]
    ops["pointwise"] = ["kernel", "torch", "auto"]
    for name, found in keys.items():
        rows = [row(op, 1.0, key["shape"], **{k: v for k, v in key.items() if k != "shape"})
                for key in found for op in ops[name]]  # fmt: skip
        assert not [line for line in goals.lines(name, rows) if line[2] == "not measured"]
