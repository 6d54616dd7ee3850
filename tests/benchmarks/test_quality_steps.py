"""Closeness of steps side by side: what is named can be drawn; tables and plot are what the rows make."""

import importlib
import pathlib
import types

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
MODULES = (
    "quality",
    "measure",
    "quality_steps",
    "quality_steps_plot",
    "quality_steps_tables",
    "quality_pipelined",
    "quality_meshes",
)


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the benchmark, which find their neighbours on `sys.path`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


def row(calls, mean=40.0, reference="exact@50"):
    return {
        "psnr_db": {"mean": mean, "low": mean - 1, "high": mean + 1, "worst": mean - 10},
        "ssim": {"mean": 0.99},
        "obedience": {"all": {"mean": 1.0}},
        "reference": reference,
        "latency_calls": calls,
        "calls": {"mean": calls, "most": calls + 1},
    }


STEPS = "parallel_steps=2,tolerance=0.006@50"
FORM = {"model": "flow", "prompts": 8, "steps": 50, "ranks": 2, "tolerance": 0.006}
OTHERS = {
    "num_stages=2,stride=1,warmup_steps=3,predict=linear@50": row(27.4, 50.0),
    "num_stages=2,stride=1,warmup_steps=3,predict=none@50": row(26.8, 38.0),
    "num_stages=2,stride=1,warmup_steps=3,predict=linear@25": row(14.4, 99.0, "exact@25"),
    "num_patches=2,warmup_steps=3,predict=linear@50": row(40.0, 99.0),
    "exact@29": row(29.0, 42.8),
    "exact@25": row(25.0, 41.0),
}


def test_every_configuration_can_be_drawn(scripts):
    pairs = scripts.quality_steps.configurations()
    assert len(set(pairs)) == len(pairs)
    for name, reference in pairs:
        steps = scripts.quality.parse_configuration(reference)[1]
        assert (reference, reference) in pairs
        assert scripts.quality.parse_configuration(name)[1] == steps or name.startswith("exact")
        assert scripts.quality.world_size(name) in (1, 2, 4, 8)


def test_keys_tell_exact_rows_apart(scripts):
    pairs = scripts.quality_steps.configurations()
    assert len({scripts.quality_steps.key(*pair) for pair in pairs}) == len(pairs)


def test_rivals_take_at_most_a_quarter_more_calls(scripts):
    lines = scripts.quality_steps_tables.equal_calls({"rows": {STEPS: row(27.0, 70.0)}}, {"rows": OTHERS})
    assert lines[-1] == (
        "| 50, DDIM | 2, 0.006 | 70.0 (60.0), 27.0 (28) calls | 50.0 (40.0), 27.4 calls, `num_stages=2,predict=linear` "
        "|  | 42.8 (32.8), 29 calls |"
    )


def test_missing_rows_leave_cells_empty(scripts):
    rows = {"parallel_steps=8,tolerance=0.03@25/unipc": row(9.0, 50.0, "exact@25/unipc")}
    text = scripts.quality_steps_tables.as_markdown({"title": "Drawn.", "rows": rows}, {"rows": OTHERS})
    assert "| 25, unipc | 8, 0.03 | 50.0 (40.0), 9.0 (10) calls |  |  |  |" in text
    assert "circle" in scripts.quality_steps_plot.as_plot({"rows": {}}, {"rows": OTHERS})
    assert scripts.quality_steps_plot.as_plot({"rows": {}}, {"rows": {}}).endswith("</svg>\n")


def test_plot_has_every_mode_of_50_steps_and_no_label_twice(scripts):
    text = scripts.quality_steps_plot.as_plot({"rows": {STEPS: row(27.0, 70.0)}}, {"rows": OTHERS})
    assert text.count(">2, 0.006</text>") == 1 and text.count(">29</text>") == 1
    dots = {name: (100.0, 100.0) for name in OTHERS}
    assert len(set(scripts.quality_steps_plot.placed(dots).values())) > 1


def test_calls_are_counted_for_each_picture(scripts, monkeypatch):
    torch, quality = scripts.quality.torch, scripts.quality
    monkeypatch.setattr(quality, "draw", lambda pipe, captions, *rest: torch.zeros(len(captions), 3, 2, 2))
    counts = iter([(2, 10, 0), (3, 8, 1)])

    def stats():
        return {"steps": dict(zip(("exact_steps", "blocks", "blocks_cut_short"), next(counts), strict=True))}

    config = types.SimpleNamespace(parallel_steps=2)
    runtime = types.SimpleNamespace(config=config, stats=stats, clear_stats=lambda: None)
    args = types.SimpleNamespace(prompts=2, seeds=1, batch_size=1, guidance=5.0)
    pictures, calls = quality.draw_batches(None, runtime, 50, args)
    assert len(pictures) == 2 and calls == {"calls": [12, 12], "exact_calls": [2, 3]}
    assert quality.draw_batches(None, None, 50, args)[1] == {}


def test_patches_through_stages_stand_beside_the_others(scripts):
    rows = {name: row(27.0, 39.0) for name in scripts.quality_pipelined.configurations()}
    assert all(scripts.quality.world_size(name) in (2, 4) for name in rows)
    lines = scripts.quality_pipelined.beside({"rows": rows}, {"rows": OTHERS}, {"rows": {STEPS: row(27.0, 70.0)}})
    assert lines[-1] == (
        '| 4 × 8, "linear" | 39.0 (29.0), 27.0 calls | 50.0 (40.0), 27.4 calls, `num_stages=2,predict=linear` |  '
        "| 70.0 (60.0), 27.0 calls, `parallel_steps=2,tolerance=0.006` |"
    )
    text = scripts.quality_steps_plot.as_plot({"rows": {}}, {"rows": OTHERS}, {"rows": rows})
    assert text.count(">4 × 8</text>") == 2


def test_committed_tables_and_plot_are_what_the_rows_make(scripts):
    names = ("quality_steps", "quality_predict", "quality_pipelined")
    result, others, pipelined = (scripts.measure.read_result(name) for name in names)
    results, plot = scripts.measure.RESULTS, scripts.quality_steps_plot.as_plot(result, others, pipelined)
    assert (results / "quality_steps.md").read_text() == scripts.quality_steps_tables.as_markdown(result, others)
    assert (results / "quality_steps.svg").read_text() == plot
    table = "\n".join(scripts.quality_pipelined.beside(pipelined, others, result))
    assert table in (results / "quality_pipelined.md").read_text()


def test_shared_calls_stand_beside_steps_side_by_side(scripts):
    rows = {name: row(16.0, 35.0) for name in scripts.quality_meshes.configurations()}
    assert all(scripts.quality.world_size(name) == 4 for name in rows)
    alone = {name: row(15.7, 59.5) for name in scripts.quality_meshes.BESIDE}
    lines = scripts.quality_meshes.beside({"rows": rows}, {"rows": alone})
    assert lines[-4] == "| 4 | `parallel_steps=4` | 59.5 (49.5) | 15.7 |"
    assert lines[-1] == "| 4 | `parallel_steps=2, num_stages=2, pipeline_patches=4` | 35.0 (25.0) | 16.0 |"


def test_forms_stand_side_by_side_as_drawn_last(scripts):
    old, new = dict(row(27.0), **FORM, form="picture"), dict(row(26.0, 70.0), **FORM, form="picture")
    head, lines = scripts.quality_steps_tables.forms([old, new, dict(row(28.0), **FORM, form="noise")])
    assert head[-2:] == ["picture", "noise"]
    assert lines == [["flow, 8", 50, "2, 0.006", "70.0 (60.0), 26.0 calls", "40.0 (30.0), 28.0 calls"]]
