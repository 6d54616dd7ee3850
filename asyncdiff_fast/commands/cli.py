"""The command `asyncdiff-fast`: demo, run, plan, profile, doctor.

Nothing heavy is imported before a command needs it, so that help and errors come at once.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import typing
from pathlib import Path

from ..config import Config, environment_options
from .launch import UsageError, as_text, complete, is_rank, launch, start_ranks

# What the demo draws without options: ways for two processes to share a picture.
MODES = ({"parallel_steps": 2}, {"num_stages": 2, "predict": "linear"}, {"num_patches": 2})


class _Parser(argparse.ArgumentParser):
    """Answers a wrong command line with one line and exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv=None):
    """Carry out one command line. Returns its exit code; wrong usage exits with 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    args = parser.parse_args(argv)
    args.command_line = argv
    try:
        return args.command(args) or 0
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


def _parser():
    from .. import __version__

    parser = _Parser(
        prog="asyncdiff-fast", description="One image of a diffusers pipeline faster, by several processes."
    )
    parser.add_argument("--version", action="version", version=f"asyncdiff_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_run(commands)
    _add_plan(commands)
    _add_profile(commands)
    doctor = commands.add_parser("doctor", help="what is installed, found, and would be used")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=_doctor)
    return parser


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
    demo.set_defaults(command=_demo)


def _add_run(commands):
    text = "start a script of yours in several processes, its pipelines patched if an option is given"
    run = commands.add_parser("run", help=text, description=f"{text}. Options stand before the script.")
    run.add_argument("--nproc", type=_positive, help="processes (default: as many as the options need)")
    _add_options(run, "where they name no way to share, as many steps side by side as processes")
    run.add_argument("script", help="a Python script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    run.set_defaults(command=_run)


def _add_plan(commands):
    plan = commands.add_parser("plan", help="which process would compute what, and what would travel")
    _add_path(plan)
    _add_inputs(plan)
    plan.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: float32")
    plan.add_argument("--json", action="store_true", help="print JSON")
    _add_options(plan, "without any way to share, two steps side by side")
    plan.set_defaults(command=_plan)


def _add_profile(commands):
    text = "what all processes do in each step: a trace for Perfetto, a picture of one step, a table"
    profile = commands.add_parser("profile", help=text, description=text)
    _add_path(profile)
    _add_inputs(profile)
    profile.add_argument("--nproc", type=_positive, help="processes (default: as many as the options need)")
    profile.add_argument("--steps", type=_positive, default=12, help="steps of the sampler (default: 12)")
    profile.add_argument("--out", type=Path, default=Path("out"), help="folder for what is found (default: out)")
    _add_options(profile, "where they name no way to share, as many steps side by side as processes")
    profile.set_defaults(command=_profile)


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


def _options(args):
    """{name: value} of the options of `patch` that were given."""
    given = {name.removeprefix("option_"): value for name, value in vars(args).items() if name.startswith("option_")}
    return {name: value for name, value in given.items() if value is not None}


def _for_two(options):
    """Options that share a call between two ranks (three with stride 2), if they name no way themselves."""
    return complete(options, 3 if options.get("stride") == 2 else 2)


def _config(options):
    try:
        return Config.from_options(options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _demo(args):
    from . import folder

    given = _options(args)
    configs = [_config(options) for options in ([_for_two(given)] if given else MODES)]
    path = folder.checked(args.path)
    _check_out(args.out)
    if not is_rank():
        return start_ranks(configs[0].world_size, args.command_line)
    _check_world(configs[0])
    from . import demo

    return demo.draw_and_compare(path, configs, args.prompts or demo.PROMPTS, args.steps, args.out, args.seed)


def _check_out(out):
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder: {out} is a file; name another")


def _check_world(config):
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != config.world_size:
        raise UsageError(
            f"these options need {config.world_size} processes: got WORLD_SIZE={world_size}; start as many"
        )


def _profile(args):
    from . import folder

    given = _options(args)
    options = complete(given, args.nproc) if args.nproc else _for_two(given)
    config = _config(options)
    if args.nproc and args.nproc != config.world_size:
        raise _other_nproc(args.nproc, options, config)
    path = folder.checked(args.path)
    _check_out(args.out)
    if not is_rank():
        return start_ranks(config.world_size, args.command_line)
    _check_world(config)
    from . import trace

    inputs = {name: getattr(args, name) for name in ("prompt", "height", "width") if getattr(args, name) is not None}
    return trace.draw(path, options, inputs | {"num_inference_steps": args.steps}, args.out)


def _other_nproc(nproc, options, config):
    return UsageError(
        f"--nproc must be what the options need: got --nproc {nproc}, {as_text(options)} needs {config.world_size}; "
        "leave one of them out"
    )


def _run(args):
    if not Path(args.script).is_file():
        raise UsageError(f"the script must be a file: there is no file {args.script}; options stand before the script")
    given = _options(args)
    if not given:
        return launch(args.nproc or _config(_from_environment()).world_size, [args.script, *args.arguments])
    options = _from_environment() | given
    options = complete(options, args.nproc) if args.nproc else options
    config = _config(options)
    num_processes = args.nproc or config.world_size
    if num_processes != config.world_size:
        raise _other_nproc(num_processes, options, config)
    command = ["-m", "asyncdiff_fast.auto", args.script, *args.arguments]
    return launch(num_processes, command, ASYNCDIFF_FAST=as_text(options))


def _from_environment():
    try:
        return environment_options()
    except ValueError as error:
        raise UsageError(f"ASYNCDIFF_FAST: {error}") from error


def _plan(args):
    from . import folder

    options = _for_two(_options(args))
    _config(options)
    path = folder.checked(args.path)
    inputs = {name: getattr(args, name) for name in ("prompt", "height", "width") if getattr(args, name) is not None}
    import torch

    from .. import plan
    from . import plan_json

    pipe = folder.load(path, "cpu", getattr(torch, args.dtype))
    try:
        made = plan(pipe, inputs, **options)
    except (ValueError, TypeError) as error:
        raise UsageError(f"no plan: {error}") from error
    print(json.dumps(plan_json.as_dict(made), indent=1) if args.json else made)


def _doctor(args):
    from . import doctor

    facts = doctor.facts()
    print(json.dumps(facts, indent=1) if args.json else doctor.text(facts))


if __name__ == "__main__":
    sys.exit(main())
