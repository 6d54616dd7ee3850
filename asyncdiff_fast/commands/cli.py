"""The command `asyncdiff-fast`: demo, run, plan, profile, tune, doctor.

Nothing heavy is imported before a command needs it, so that help and errors come at once.
"""

import json
import os
import sys
from pathlib import Path

from ..config import Config
from ..environment import environment_options
from . import arguments
from .arguments import patch_options
from .launch import UsageError, as_text, complete, is_rank, launch, start_ranks

# What the demo draws without options: ways for two processes to share a picture.
MODES = ({"parallel_steps": 2}, {"num_stages": 2, "predict": "linear"}, {"num_patches": 2})


def main(argv=None):
    """Carry out one command line. Returns its exit code; wrong usage exits with 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"demo": _demo, "run": _run, "plan": _plan, "profile": _profile, "tune": _tune, "doctor": _doctor}
    parser = arguments.parser(commands)
    args = parser.parse_args(argv)
    args.command_line = argv
    try:
        return args.command(args) or 0
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


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

    given = patch_options(args)
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

    given = patch_options(args)
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
    given = patch_options(args)
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

    options, request = _for_two(patch_options(args)), None
    _config(options)
    if args.simulate is not None:
        from ..simulation import cluster

        try:
            request = cluster.parse(args.simulate)
        except ValueError as error:
            raise UsageError(f"--simulate: {error}") from error
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
    found = plan_json.as_dict(made) if args.json else made
    if request is not None:
        from . import simulated

        try:
            times = simulated.as_asked(pipe, inputs, made, request, args.steps)
        except ValueError as error:
            raise UsageError(f"--simulate: {error}") from error
        found = found | {"simulated": simulated.as_dict(times)} if args.json else f"{found}\n\n{times}"
    print(json.dumps(found, indent=1) if args.json else found)


def _tune(args):
    from . import folder

    path = folder.checked(args.path)
    _check_out(args.out)
    from .tune import main

    return main.tune(path, args)


def _doctor(args):
    from . import doctor

    facts = doctor.facts()
    print(json.dumps(facts, indent=1) if args.json else doctor.text(facts))


if __name__ == "__main__":
    sys.exit(main())
