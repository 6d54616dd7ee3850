"""The commands: what they print and write, and how they answer what they cannot work with."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image

from asyncdiff_fast import Config
from asyncdiff_fast.commands import cli, compare, demo, folder, report
from asyncdiff_fast.commands.launch import as_text, complete
from asyncdiff_fast.config import parse_options
from asyncdiff_fast.exchange.world import World

CAPTION = "a green circle, night background"


def _command(*arguments, cwd=None):
    """Run the command as a user would. Returns the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "asyncdiff_fast.commands.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
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
        (["run", "--nproc", "2", "--balance", "luck", __file__], 'balance must be "flops" or "time"'),
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
        "--warmup-steps INT first steps of each generation",
        "(default: 4)",
        "--time-shift, --no-time-shift",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("options", "num_processes", "expected"),
    [
        ({}, 1, {}),
        ({}, 3, {"num_stages": 3}),
        ({"warmup_steps": 1}, 2, {"warmup_steps": 1, "num_stages": 2}),
        ({"stride": 2}, 4, {"stride": 2, "num_stages": 3}),
        ({"num_stages": 2}, 4, {"num_stages": 2}),
        ({"stages": (("a",), ("b",))}, 4, {"stages": (("a",), ("b",))}),
    ],
)
def test_a_num_stages_left_out_follows_from_the_processes(options, num_processes, expected):
    assert complete(options, num_processes) == expected


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
    ]
    assert cli.main(arguments) == 0
    assert "3 stages, stride 2, 4 ranks" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["processes"] == 4 and len(plan["stages"]) == 3
    assert sum(send["bytes"] for send in plan["sends"]) == plan["bytes_per_call"]
    # 8 latent channels of 8 × 12, both halves of guidance, fp32
    assert {send["bytes"] for send in plan["sends"] if send["tensors_of"] == "prediction"} == {2 * 8 * 8 * 12 * 4}


def test_plan_refuses_what_cannot_be_planned(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--num-stages", "2000"])
    assert stop.value.code == 2 and "no plan" in capsys.readouterr().err


def test_demo_writes_a_sheet_and_a_report(tmp_path):
    done = _command("demo", "--prompts", CAPTION, "a striped white ring, sky background", "--steps", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all pictures" in done.stdout and "bytes sent per step" in done.stdout and "PSNR" in done.stdout
    assert "patched, 2 processes" in done.stderr
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert made["processes"] == 2 and made["threads_per_process"] == 1 and made["options"]["num_stages"] == 2
    assert made["pictures"][0]["prompt"] == CAPTION and len(made["wait_s"]) == 2
    assert made["bytes_per_step"] == made["planned_bytes_per_call"] > 0
    assert made["speed_up"] == pytest.approx(made["unpatched"]["seconds"] / made["patched"]["seconds"])
    assert 20 < made["psnr_db"] < 100
    # Two rows of pictures, each enlarged three times to 192 pixels.
    sheet = Image.open(tmp_path / "out" / "compare.png")
    assert sheet.width > 3 * 192 and 2 * 192 < sheet.height < 3 * 192


def test_demo_in_one_process_draws_the_same_pictures(tmp_path, capsys):
    path = folder.checked()
    demo.draw_and_compare(path, Config(), [CAPTION], 3, tmp_path, 0)
    made = json.loads((tmp_path / "report.json").read_text())
    assert made["psnr_db"] is None and made["bytes_per_step"] == 0 and made["pictures"][0]["psnr_db"] is None
    assert made["steady_speed_up"] is None
    assert "the same picture" in capsys.readouterr().out


def test_a_refusal_to_patch_is_told_once_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        demo._patched(torch.nn.Linear(1, 1), Config(num_stages=2), World([0], 1.0))
    assert stop.value.code == 2 and "start 2 processes" in capsys.readouterr().err


def test_psnr_is_that_of_the_formula():
    exact = torch.zeros(3, 4, 4)
    assert report.psnr_db(exact + 0.1, exact) == pytest.approx(20.0, abs=1e-4)  # fp32 rounding of 0.01
    assert report.psnr_db(exact, exact) is None


@pytest.mark.parametrize(("side", "drawn"), [(16, 192), (64, 192), (80, 160), (512, 192)])
def test_sheet_enlarges_small_pictures_and_reduces_large_ones(side, drawn):
    picture = torch.full((3, side, side), 0.5)
    sheet = compare.sheet("title", "subtitle", [("prompt", "note", picture, picture)])
    # One row below the 76 pixels of the title; 12 pixels around.
    assert sheet.height == 76 + drawn + 2 * 12
    # The difference of equal pictures is black, at the lower right.
    assert sheet.getpixel((sheet.width - 40, sheet.height - 40)) == (0, 0, 0)


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
