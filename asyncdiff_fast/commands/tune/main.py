"""`tune` from beginning to end: the process that starts the ranks, and what each of them runs."""

import time

from .. import demo, folder
from ..artist import Artist, together
from ..launch import UsageError, is_rank, start_ranks
from . import page, sheet
from .choosing import Aim
from .drawing import carry_out
from .link import measured
from .prospects import Prospects
from .record import Record
from .session import UNPATCHED, Session

# Exit codes of an interrupt and of a termination, which no set of options is to blame for.
_STOPPED = (130, 143)
# After so many crashes it is not the options.
_CRASHES = 5


def tune(path, args):
    """Carry out the command. Returns its exit code."""
    prompts = _prompts(args)
    if not args.minutes > 0:
        raise UsageError(f"--minutes must be more than 0: got {args.minutes:g}")
    key = {
        "pipeline": str(path), "processes": args.nproc, "steps": args.steps, "prompts": prompts, "seed": args.seed,
        "all": args.all, "aim": [args.min_psnr, args.max_seconds],
    }  # fmt: skip
    if is_rank():
        return _rank(path, args, prompts, key)
    until = time.time() + args.minutes * 60
    for _ in range(_CRASHES):
        code = start_ranks(args.nproc, [*args.command_line, "--until", str(until)])
        crashed = Record(args.out, key)
        if code in (0, 2, *_STOPPED) or crashed.running is None:
            return code
        # The next ranks go on without what these did not survive.
        trial = crashed.trials[crashed.running]
        if not trial.is_shared:
            return code
        trial.left_out, crashed.running = f"a process ended with exit code {code}", None
        crashed.save()
    return code


def _prompts(args):
    if args.prompts is None:
        return list(demo.PROMPTS[:3])
    try:
        found = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts must be a text file with a prompt a line: {args.prompts}: {error}") from error
    if not found:
        raise UsageError(f"--prompts must be a text file with a prompt a line: {args.prompts} has none")
    return found


def _rank(path, args, prompts, key):
    import torch
    from tqdm import tqdm

    from ...exchange.world import stop_process_group
    from ...patching import denoisers

    opened = together(args.nproc, args.out, "the folder for the results")
    if opened is None:
        return 2
    world, place = opened
    pipe = folder.load(path, place, torch.float32 if place.type == "cpu" else torch.float16)
    artist = Artist(pipe, denoisers(pipe), place, args.steps, tqdm(disable=True), inputs={})
    record = Record(args.out, key)
    link = measured(world, place) if args.nproc > 1 else None
    if world.rank == 0:
        record.link = link and {"latency_s": link[0], "gbs": link[1]}
        aim = Aim(args.min_psnr, args.max_seconds)
        wanted = [(i, prompt, args.seed + i) for i, prompt in enumerate(prompts)]
        until = args.until or time.time() + args.minutes * 60
        prospects = Prospects(pipe, artist, prompts[0], args.nproc, link, place)
        session = Session(record, wanted, args.steps, aim, until, args.all, args.nproc, prospects)
        _lead(session, pipe, artist, world)
        _tell(args, record, session, place)
    else:
        while (task := world.broadcast(None, "what is tried next")) is not None:
            carry_out(task, pipe, artist, world, None)
    stop_process_group()
    return 0


def _lead(session, pipe, artist, world):
    from tqdm import tqdm

    with tqdm(bar_format="{elapsed}, {n} tried; now {desc}") as bar:
        for description, task in session.tasks():
            bar.set_description_str(description)
            world.broadcast(task, "what is tried next")
            session.ended(carry_out(task, pipe, artist, world, session.take))
            bar.update(1)
    world.broadcast(None, "what is tried next")


def _tell(args, record, session, place):
    """Write and print what was found."""
    found = page.Found(args, record, session.aim, len(session.prompts), place)
    record.chosen = found.as_dict()
    record.save()
    text = found.markdown()
    (args.out / "tune.md").write_text(text)
    exact = [record.picture(UNPATCHED, i) for i, _, _ in session.prompts]
    if all(picture is not None for picture in exact):
        sheet.drawn(found, [prompt for _, prompt, _ in session.prompts], exact).save(args.out / "tune.png")
    print(text)
    print(f"see {args.out / 'tune.png'}, {args.out / 'tune.md'} and {args.out / 'tune.json'}")
