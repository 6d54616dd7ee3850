"""The command line: what each command is asked by. The options of `patch` come from `Config` and its docstring."""

import argparse
import dataclasses
import re
import typing
from pathlib import Path

from ..config import CHOICES, Config


class Parser(argparse.ArgumentParser):
    """Answers a wrong command line with one line and exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parser(carry_out):
    """The parser of all commands; `carry_out` has the function of each, by name."""
    from .. import __version__

    whole = Parser(prog="asyncdiff-fast", description="One image of a diffusers pipeline faster, by several processes.")
    whole.add_argument("--version", action="version", version=f"asyncdiff_fast {__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_run, _add_plan, _add_profile, _add_tune):
        add(commands)
    doctor = commands.add_parser("doctor", help="what is installed, found, and would be used")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    for name, command in commands.choices.items():
        command.set_defaults(command=carry_out[name])
    return whole


def _add_demo(commands):
    text = "the same pictures unpatched and shared between processes: a picture, a table, a report"
    demo = commands.add_parser("demo", help=text, description=text)
    _add_path(demo)
    demo.add_argument("--prompts", nargs="+", metavar="PROMPT", help="default: five captions of the small pipeline")
    demo.add_argument("--steps", type=_positive, default=50, help="steps of the sampler (default: 50)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: 0)")
    demo.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for compare.png and report.json (default: out)"
    )
    _add_options(demo, "without any, three ways to share are drawn: steps side by side, stages, patches")


def _add_run(commands):
    text = "start a script of yours in several processes, its pipelines patched if an option is given"
    run = commands.add_parser("run", help=text, description=f"{text}. Options stand before the script.")
    run.add_argument("--nproc", type=_positive, help="processes (default: as many as the options need)")
    _add_options(run, "where they name no way to share, as many steps side by side as processes")
    run.add_argument("script", help="a Python script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def _add_plan(commands):
    plan = commands.add_parser("plan", help="which process would compute what, and what would travel")
    _add_path(plan)
    _add_inputs(plan)
    plan.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: float32")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument(
        "--simulate",
        metavar="nodes=N,gpus=N,link=NAME",
        help="what a picture would take on a cluster; also nics=, inside= and call_ms= or tflops=, of one device",
    )
    plan.add_argument("--steps", type=_positive, default=50, help="of a simulated picture (default: 50)")
    _add_options(plan, "without any way to share, two steps side by side")


def _add_profile(commands):
    text = "what all processes do in each step: a trace for Perfetto, a picture of one step, a table"
    profile = commands.add_parser("profile", help=text, description=text)
    _add_path(profile)
    _add_inputs(profile)
    profile.add_argument("--nproc", type=_positive, help="processes (default: as many as the options need)")
    profile.add_argument("--steps", type=_positive, default=12, help="steps of the sampler (default: 12)")
    profile.add_argument("--out", type=Path, default=Path("out"), help="folder for what is found (default: out)")
    _add_options(profile, "where they name no way to share, as many steps side by side as processes")


def _add_tune(commands):
    text = "try ways to share a pipeline on these devices, and say which to take"
    tune = commands.add_parser("tune", help=text, description=f"{text}. Begun again, it goes on where it stopped.")
    _add_path(tune)
    tune.add_argument("--nproc", type=_positive, default=2, help="processes, of which each takes a device (default: 2)")
    tune.add_argument("--prompts", type=Path, help="text file, one prompt a line (default: those of the demo)")
    tune.add_argument("--steps", type=_positive, default=30, help="steps of the sampler (default: 30)")
    aim = tune.add_mutually_exclusive_group()
    aim.add_argument(
        "--min-psnr",
        type=float,
        default=35.0,
        metavar="DB",
        help="the fastest whose worst picture has it (default: 35)",
    )
    aim.add_argument("--max-seconds", type=float, metavar="S", help="or the closest that draws a picture in so long")
    tune.add_argument("--minutes", type=float, default=10.0, help="nothing new is begun after these (default: 10)")
    tune.add_argument("--all", action="store_true", help="try every set on every prompt, without leaving any out early")
    tune.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: 0)")
    # What remains of the minutes, told to the ranks.
    tune.add_argument("--until", type=float, help=argparse.SUPPRESS)
    tune.add_argument("--out", type=Path, default=Path("out"), help="folder for tune.json, .md, .png (default: out)")


def _add_inputs(parser):
    parser.add_argument("--prompt", default="a photograph", help="what the pipeline is called with")
    parser.add_argument("--height", type=_positive, help="pixels (default: the pipeline's)")
    parser.add_argument("--width", type=_positive, help="pixels (default: the pipeline's)")


def _add_path(parser):
    parser.add_argument(
        "path", nargs="?", metavar="PATH", help="folder of a pipeline (default: the checkout's small one)"
    )


def _add_options(parser, description):
    """One option for each field of `Config` that a word can express, with the help that its docstring has."""
    group = parser.add_argument_group("options of patch()", description)
    for field in dataclasses.fields(Config):
        kinds = [k for k in (field.type, *typing.get_args(field.type)) if k in (bool, int, float, str)]
        if kinds:
            kind = _number_or_word if {int, str} <= set(kinds) else kinds[0]
            value = {"type": kind, "metavar": "|".join(k.__name__.upper() for k in kinds)}
            if field.name in CHOICES:
                value = {"metavar": "{" + ",".join(CHOICES[field.name]) + "}"}
            how = {"action": argparse.BooleanOptionalAction} if kinds[0] is bool else value
            # What depends on other options, the docstring says.
            default = "" if field.default is None else f" (default: {field.default})"
            text = f"{_help(field.name)}{default}"
            group.add_argument(f"--{field.name.replace('_', '-')}", dest=f"option_{field.name}", help=text, **how)


def _help(name):
    """What the docstring of `Config` says of a field."""
    found = re.search(rf"^ +{name}: (.*?)(?=^ +\w+: |^ *Raises:)", Config.__doc__ or "", re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()).rstrip(".").replace("%", "%%") if found else ""


def _number_or_word(text):
    return int(text) if text.removeprefix("-").isdigit() else text


def _positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1: got {text!r}")
    return int(text)


def patch_options(args):
    """{name: value} of the options of `patch` that were given."""
    given = {name.removeprefix("option_"): value for name, value in vars(args).items() if name.startswith("option_")}
    return {name: value for name, value in given.items() if value is not None}
