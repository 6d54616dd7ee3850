"""The commands: what they print and write, and how they answer what they cannot work with."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

from asyncdiff_fast import Config
from asyncdiff_fast.commands import cli, compare, demo, folder, report
from asyncdiff_fast.commands.launch import as_text, complete
from asyncdiff_fast.environment import parse_options

CAPTION = "a green circle, night background"


def _command(*arguments, cwd=None):
    """Run the command as a user would. Returns the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "asyncdiff_fast.commands.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "COMMAND"),
        (["frob"], "frob"),
        (["demo", "--steps", "0"], "at least 1: got '0'"),
        (["demo", "--num-stages", "0"], "num_stages must be an integer of at least 1: got num_stages=0"),
        (["demo", "--stride", "2", "--num-stages", "1"], "stride=2 needs num_stages of at least 2"),
        (["demo", "--num-stages", "999"], "needs a CPU core for each process"),
        (["demo", "/no/such/folder"], "no folder /no/such/folder"),
        (["plan", "."], "no model_index.json"),
        (["plan", "--num-stages", "many"], "invalid int value: 'many'"),
        (["run", "no_such_script.py"], "no file no_such_script.py"),
        (["run", "--nproc", "3", "--num-stages", "2", __file__], "got --nproc 3, num_stages=2 needs 2"),
        (["run", "--nproc", "2", "--balance", "luck", __file__], 'balance must be "flops", "time" or "memory"'),
        (["profile", "--nproc", "3", "--num-stages", "2"], "got --nproc 3, num_stages=2 needs 2"),
        (["profile", "--out", __file__], "--out must be a folder"),
        (["plan", "--warmup-steps", "some"], "got warmup_steps='some'"),
        (["plan", "--warmup-steps", "-1"], "got warmup_steps=-1"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("asyncdiff-fast") and expected in lines[0]


def test_without_the_small_pipeline_the_error_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "shapes_folder", lambda: tmp_path / "nothing")
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan"])
    assert stop.value.code == 2 and "belongs to the checkout" in capsys.readouterr().err


def test_commands_are_parsed_without_importing_torch(tmp_path):
    """The package's own import stands aside: here it is a bare namespace."""
    script = f"""
        import sys, types
        package = types.ModuleType("asyncdiff_fast")
        package.__path__, package.__version__ = {[str(folder.shapes_folder().parents[2] / "asyncdiff_fast")]!r}, "0"
        sys.modules["asyncdiff_fast"] = package
        from asyncdiff_fast.commands import cli
        for arguments in (["--help"], ["run", "--help"], ["demo", "/no/such/folder"]):
            try:
                cli.main(arguments)
            except SystemExit:
                pass
        print({{"torch", "diffusers", "PIL"}} & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("set()\n"), done.stderr


def test_every_option_has_the_help_of_the_config(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for expected in (
        "--warmup-steps INT|STR first steps of each generation",
        "how many ranks share one call of the denoiser (AsyncDiff's N) (default: 1)",
        "without any way to share, two steps side by side",
        "--time-shift, --no-time-shift",
        "--exchange {displaced,sync,none} after warm-up",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("options", "num_processes", "expected"),
    [
        ({}, 1, {}),
        ({}, 3, {"parallel_steps": 3}),
        ({"warmup_steps": 1}, 2, {"warmup_steps": 1, "parallel_steps": 2}),
        ({"warmup_steps": "auto"}, 2, {"warmup_steps": "auto", "parallel_steps": 2}),
        ({"cfg_parallel": True}, 2, {"cfg_parallel": True}),
        ({"cfg_parallel": True}, 6, {"cfg_parallel": True, "parallel_steps": 3}),
        ({"parallel_steps": 2}, 4, {"parallel_steps": 2}),
        ({"num_patches": 2}, 4, {"num_patches": 2}),
        ({"stride": 2}, 4, {"stride": 2, "num_stages": 3}),
        ({"stride": 1}, 4, {"stride": 1, "num_stages": 4}),
        ({"stride": 2, "cfg_parallel": True}, 6, {"stride": 2, "cfg_parallel": True, "num_stages": 2}),
        ({"balance": "time"}, 2, {"balance": "time", "num_stages": 2}),
        ({"exchange": "sync"}, 2, {"exchange": "sync", "num_patches": 2}),
        ({"exchange": "sync", "cfg_parallel": True}, 4, {"exchange": "sync", "cfg_parallel": True, "num_patches": 2}),
        ({"predict": "linear"}, 2, {"predict": "linear", "num_stages": 2}),
        ({"num_stages": 2}, 4, {"num_stages": 2}),
        ({"stages": (("a",), ("b",))}, 4, {"stages": (("a",), ("b",))}),
    ],
)
def test_processes_that_nothing_shares_get_a_way_to_share(options, num_processes, expected):
    completed = complete(options, num_processes)
    assert completed == expected
    Config.from_options(completed)


def test_options_survive_the_environment():
    options = {"num_stages": 3, "time_shift": True, "timeout_s": 2.5, "balance": "time"}
    assert parse_options(as_text(options)) == options


def test_doctor(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"versions", "devices", "transports", "kernels", "pipeline", "use"}
    assert facts["versions"]["torch"] == torch.__version__ and facts["pipeline"] == str(folder.shapes_folder())
    assert facts["use"]["processes"] == 2
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"python", "torch", "gloo", "nccl", "engine", "pipeline"} <= {line.split()[0] for line in lines}


def test_plan(capsys):
    arguments = [
        "plan",
        str(folder.shapes_folder()),
        "--num-stages",
        "3",
        "--stride",
        "2",
        "--height",
        "32",
        "--width",
        "48",
        "--predict",
        "none",
    ]
    assert cli.main(arguments) == 0
    assert "3 stages, stride 2, 4 ranks" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["processes"] == 4 and len(plan["stages"]) == 3
    assert sum(send["bytes"] for send in plan["sends"]) == plan["bytes_per_call"]
    # 8 latent channels of 8 × 12, both halves of guidance, fp32
    assert {send["bytes"] for send in plan["sends"] if send["tensors_of"] == "prediction"} == {2 * 8 * 8 * 12 * 4}


def test_plan_without_options_is_of_steps_side_by_side(capsys):
    assert cli.main(["plan"]) == 0
    assert "2 steps side by side after 2 exact ones" in capsys.readouterr().out
    assert cli.main(["plan", "--warmup-steps", "auto", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["options"]["warmup_steps"] == "auto" and plan["calls"] == {"50": 26, "25": 13, "12": 7}
    # 8 latent channels of 16 × 16, after guidance, fp32, from each rank to the other
    assert plan["bytes_per_block"] == 2 * plan["output_bytes"] == 2 * 8 * 16 * 16 * 4
    patches = ["--parallel-steps", "2", "--num-patches", "2", "--exchange", "sync", "--warmup-steps", "auto"]
    assert cli.main(["plan", *patches, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["each_call"]["processes"] == 2
    assert cli.main(["plan", "--stride", "2"]) == 0
    assert "2 stages, stride 2, 3 ranks" in capsys.readouterr().out


def test_plan_refuses_what_cannot_be_planned(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--num-stages", "2000"])
    assert stop.value.code == 2 and "no plan" in capsys.readouterr().err


def test_a_broken_pipeline_is_named_in_one_line(capsys, tmp_path):
    (tmp_path / "model_index.json").write_text("{,")
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and f"{tmp_path} cannot be loaded, OSError" in lines[0]


def test_demo_draws_three_modes(tmp_path):
    done = _command("demo", "--prompts", CAPTION, "a striped white ring, sky background", "--steps", "12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for expected in ("2 steps side by side", "2 stages", "2 patches", "a step after warm-up", "bytes sent per step"):
        assert expected in done.stdout
    assert "where it takes longer more is gained" in done.stdout
    assert "PSNR" in done.stdout and "2 patches, 2 processes" in done.stderr and "96/96" in done.stderr
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert made["processes"] == 2 and made["threads_per_process"] == 1 and not made["refused"]
    modes = made["modes"]
    assert [m["options"]["parallel_steps"] for m in modes] == [2, 1, 1]
    assert [m["options"]["num_stages"] for m in modes] == [1, 2, 1] and modes[1]["options"]["predict"] == "linear"
    assert [m["options"]["num_patches"] for m in modes] == [1, 1, 2]
    for mode in modes:
        assert 20 < mode["psnr_db"] < 100 and len(mode["wait_s"]) == 2 and mode["bytes_per_step"] > 0
        assert mode["speed_up"] == pytest.approx(made["unpatched"]["picture_s"] / mode["picture_s"])
        assert mode["steady_speed_up"] == pytest.approx(made["unpatched"]["step_s"] / mode["step_s"])
    steps = modes[0]["side_by_side"]
    of_blocks = sum(int(length) * times for length, times in steps["block_lengths"].items())
    assert steps["exact_steps"] + of_blocks == 2 * 12 and steps["blocks"] and modes[1]["side_by_side"] is None
    assert made["pictures"][0]["prompt"] == CAPTION and len(made["pictures"][0]["modes"]) == 3
    # Two rows of pictures, each enlarged three times to 192 pixels, with their differences below.
    sheet = Image.open(tmp_path / "out" / "compare.png")
    assert 4 * 192 < sheet.width < 6 * 192 and 3 * 192 < sheet.height < 5 * 192


def test_demo_in_one_process_draws_the_same_pictures(tmp_path, capsys):
    path = folder.checked()
    demo.draw_and_compare(path, [Config()], [CAPTION], 3, tmp_path, 0)
    made = json.loads((tmp_path / "report.json").read_text())
    (mode,) = made["modes"]
    assert mode["psnr_db"] is None and mode["bytes_per_step"] == 0 and mode["steady_speed_up"] is None
    assert made["pictures"][0]["modes"][0]["psnr_db"] is None
    printed = capsys.readouterr().out
    assert "the same picture" in printed and "one process" in printed


def test_a_mode_that_is_refused_is_left_out_and_named(tmp_path, capsys):
    demo.draw_and_compare(folder.checked(), [Config(num_stages=1), Config(kernels="triton")], [CAPTION], 2, tmp_path, 0)
    made = json.loads((tmp_path / "report.json").read_text())
    assert len(made["modes"]) == 1 and "Triton" in made["refused"]["one process"]
    assert "asyncdiff-fast: no one process" in capsys.readouterr().err


def test_where_every_mode_is_refused_the_demo_says_so_and_exits_with_2(tmp_path, capsys):
    code = demo.draw_and_compare(folder.checked(), [Config(kernels="triton")], [CAPTION], 2, tmp_path, 0)
    assert code == 2 and "Triton" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_drawn(capsys):
    assert demo.draw_and_compare(folder.checked(), [Config()], [CAPTION], 10_000, Path("/proc/no/out"), 0) == 2
    assert "--out must be a folder that can be written: /proc/no/out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (Config(), ""),
        (Config(parallel_steps=2), "parallel_steps=2"),
        (Config(num_stages=2, stride=2, time_shift=True), "num_stages=2, stride=2, time_shift=True"),
        (Config(num_patches=2, exchange="sync"), "num_patches=2, exchange=sync"),
        (Config(parallel_steps=2, warmup_steps="auto"), "warmup_steps=auto, parallel_steps=2"),
    ],
)
def test_a_column_names_the_options_that_were_chosen(config, text):
    assert report.changed(config) == text


def test_psnr_is_that_of_the_formula():
    exact = torch.zeros(3, 4, 4)
    assert report.psnr_db(exact + 0.1, exact) == pytest.approx(20.0, abs=1e-4)  # fp32 rounding of 0.01
    assert report.psnr_db(exact, exact) is None


@pytest.mark.parametrize(("side", "drawn"), [(16, 192), (64, 192), (80, 160), (512, 192)])
def test_sheet_enlarges_small_pictures_and_reduces_large_ones(side, drawn):
    picture = torch.full((3, side, side), 0.5)
    columns, cells = [("unpatched", ""), ("patched", "x=1")], [(picture, "1 s"), (picture.clone(), "1 s")]
    one, two = (compare.sheet("title", ["note"], columns, [("prompt", cells)] * n) for n in (1, 2))
    # A row has the picture, its difference at half the size, and 30 pixels between.
    assert two.height - one.height == drawn + drawn // 2 + 30
    # Pictures, 12 pixels apart, end at the right; the difference of equal ones is black, at the lower left.
    left, lower = one.width - 24 - drawn, one.height - 24 - drawn // 2
    assert one.getpixel((left + 5, lower + 5)) == (0, 0, 0) != one.getpixel((left - 6, lower + 5))
    assert one.getpixel((left + 5, lower - 20)) == (128, 128, 128)


def test_run_patches_a_script_that_imports_nothing_of_ours(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            import torch
            from diffusers import DiffusionPipeline
            import beside

            pipe = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
            pipe("a red star, sky background", num_inference_steps=3, output_type="latent")
            runtime = vars(pipe.unet).get("_asyncdiff_fast")
            print("rank", os.environ["RANK"], runtime is not None, runtime.config.warmup_steps, sys.argv[2:], __name__)
            """
        )
    )
    (tmp_path / "beside.py").write_text("")
    done = _command(
        "run", "--nproc", "2", "--warmup-steps", "2", str(script), str(folder.shapes_folder()), "--seed", "1"
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} True 2 ['--seed', '1'] __main__" in done.stdout


@pytest.mark.slow
def test_run_gives_back_the_exit_code_of_the_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit('no such luck' if len(sys.argv) == 1 else int(sys.argv[1]))")
    done = _command("run", "--nproc", "1", str(script), "7")
    assert done.returncode == 7 and "exit code 7" in done.stderr
    done = _command("run", "--nproc", "1", str(script))
    assert done.returncode == 1 and "no such luck" in done.stderr


@pytest.mark.parametrize(
    "given, processes", [(["--num-patches", "3"], 3), (["--num-patches", "2", "--num-stages", "2"], 4)]
)
def test_plan_of_patches(capsys, given, processes):
    assert cli.main(["plan", str(folder.shapes_folder()), *given, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    patches = made.get("patches") if isinstance(made["patches"], dict) else made
    assert patches["processes"] == processes
    sent = sum(patch["sent_bytes"] + patch["result_bytes"] for patch in patches["patches"])
    assert sent == patches["bytes_per_call"] and made["bytes_per_call"] >= sent
    assert [patch["rows"][0] for patch in patches["patches"][1:]] == [p["rows"][1] for p in patches["patches"][:-1]]
