"""What `tune` tries, chooses, keeps and shows; and that it finds the best in a run of its own."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from skimage.metrics import structural_similarity

from asyncdiff_fast.commands import cli
from asyncdiff_fast.commands.artist import Drawn
from asyncdiff_fast.commands.report import ssim
from asyncdiff_fast.commands.tune import choosing, page, sheet
from asyncdiff_fast.commands.tune.choosing import Aim, Trial
from asyncdiff_fast.commands.tune.record import Record
from asyncdiff_fast.commands.tune.session import PATCHED, UNPATCHED, Session
from asyncdiff_fast.commands.tune.sets import option_sets

AIM = Aim(min_psnr=35.0)
PROMPTS = [(0, "a red star", 0), (1, "a blue ring", 1)]
SUPPORT = Path(__file__).parents[1] / "support"


def _trial(name, seconds, db, options=None, **more):
    options = {"parallel_steps": 2} if options is None and more.pop("shared", True) else options
    return Trial(name, options, name, 20, seconds=[seconds] * 2, psnr_db={0: db, 1: db}, **more)


def _alone(seconds, db=None, name=PATCHED):
    return Trial(name, None, num_steps=20, seconds=[seconds], psnr_db={0: db, 1: db})


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_sets_take_all_processes(n, guided):
    found = option_sets(n, guided)
    assert all(one.config.world_size == n for one in found)
    assert len({one.name for one in found}) == len(found)
    assert any(one.config.cfg_parallel for one in found) == (guided and n % 2 == 0)
    assert {"parallel_steps", "num_stages", "num_patches"} <= {name for one in found for name, _ in one.options}
    # A list that a person would draw up, not a grid.
    assert len(found) <= 16 * len(range(2, n + 1))


def test_the_fastest_that_is_close_enough_is_chosen():
    trials = [_alone(2.0), _trial("fast", 1.0, 30.0), _trial("close", 1.2, 40.0), _trial("closer", 1.5, 60.0)]
    assert choosing.best(trials, AIM, 2).name == "close"
    assert choosing.best(trials, Aim(max_seconds=1.6), 2).name == "closer"
    assert choosing.best(trials, Aim(min_psnr=50), 2).name == "closer"


def test_one_device_is_chosen_where_sharing_is_not_worth_it():
    trials = [_alone(2.0), _trial("shared", 1.95, 60.0)]
    assert choosing.best(trials, AIM, 2).name == PATCHED
    fewer = _alone(1.0, 36.0, f"{PATCHED}, 10 steps")
    assert choosing.best([*trials, fewer, _trial("shared", 1.1, 60.0)], AIM, 2) is fewer


def test_where_nothing_is_as_fast_as_wanted_the_fastest_is_taken_and_the_page_says_so():
    trials = [
        _alone(2.0, name=UNPATCHED),
        _trial("fast", 1.0, 30.0),
        Trial("half", {"num_stages": 2}, seconds=[0.9], psnr_db={0: 50.0}),
    ]
    assert choosing.best(trials, Aim(max_seconds=0.5), 2).name == "fast"
    args = Namespace(nproc=2, steps=20)
    record = Namespace(trials={t.name: t for t in trials}, link=None)
    for trial in trials:
        trial.ssim = {0: 1.0}
    said = page.Found(args, record, Aim(max_seconds=0.5), 2, torch.device("cpu")).markdown()
    assert "**Take fast**" in said and "Nothing is as fast as wanted" in said


def test_what_was_not_drawn_whole_is_not_chosen():
    half = Trial("half", {"num_stages": 2}, seconds=[0.5], psnr_db={0: 50.0})
    assert choosing.best([_alone(2.0), half], AIM, 2).name == PATCHED


def test_the_front_is_of_what_nothing_beats():
    trials = [_alone(2.0), _trial("a", 1.0, 30.0), _trial("b", 1.2, 40.0), _trial("beaten", 1.3, 35.0)]
    assert {t.name for t in choosing.front(trials)} == {PATCHED, "a", "b"}


def test_the_structural_similarity_is_scikit_image_s():
    a, b = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    theirs = structural_similarity(a.numpy(), b.numpy(), data_range=1.0, channel_axis=0)
    # Ours is computed in float64.
    assert ssim(a, b) == pytest.approx(theirs, abs=1e-5) and ssim(a, a) == pytest.approx(1.0)


class _World:
    """Ranks without processes: what sets take and how close they come is given."""

    is_guided = True

    def __init__(self, seconds, closeness, refused=()):
        self.seconds, self.closeness, self.refused, self.drawn = seconds, closeness, refused, []

    def of(self, one, num_steps):
        return self.seconds(dict(one.options)), None

    def carry_out(self, session):
        for name, task in session.tasks():
            self.drawn.append(name)
            refused = None
            for number, _, _ in task.wanted:
                options = task.options or {}
                if name in self.refused:
                    refused = "cannot"
                    break
                noise = 10 ** (-self.closeness(options, task.num_steps) / 20)
                picture = torch.full((3, 8, 8), 0.5) + (0.0 if noise < 1e-9 else noise)
                seconds = self.seconds(options) * task.num_steps / 20
                if not session.take(number, Drawn(picture, seconds, None, 0.0)):
                    break
            session.ended(refused)


def _seconds(options):
    return 2.0 if not options else 1.1 if "parallel_steps" in options else 1.5 if "num_stages" in options else 3.0


def _closeness(options, num_steps):
    return 30.0 if num_steps < 20 else 45.0 if options else 200.0


def _session(record, world, until=None, every=False):
    return Session(record, PROMPTS, 20, AIM, until or time.time() + 1e6, every, 2, world)


def test_a_session_leaves_out_what_cannot_pay_and_recommends_the_best(tmp_path):
    record, world = Record(tmp_path, {}), _World(_seconds, _closeness, refused=("num_stages=2",))
    session = _session(record, world)
    world.carry_out(session)
    assert choosing.best(record.trials.values(), AIM, 2).options["parallel_steps"] == 2
    assert "by simulation" in record.trials["num_patches=2"].left_out and "num_patches=2" not in world.drawn
    assert record.trials["num_stages=2"].left_out == "cannot"
    assert world.drawn[:2] == [UNPATCHED, PATCHED]


def test_a_slow_exchange_makes_it_one_device(tmp_path):
    record, world = Record(tmp_path, {}), _World(lambda options: 5.0 if options else 2.0, _closeness)
    world.carry_out(_session(record, world))
    assert not choosing.best(record.trials.values(), AIM, 2).is_shared
    # What the simulation thinks best was tried all the same.
    assert sum(t.is_shared and bool(t.seconds) for t in record.trials.values()) == 1


def test_a_session_goes_on_where_it_stopped_and_ends_in_time(tmp_path):
    first, world = Record(tmp_path, {"steps": 20}), _World(_seconds, _closeness)
    world.carry_out(_session(first, world, until=time.time()))
    assert first.trials[UNPATCHED].seconds and first.trials[PATCHED].left_out == "no time was left"
    again, later = Record(tmp_path, {"steps": 20}), _World(_seconds, _closeness)
    later.carry_out(_session(again, later))
    assert UNPATCHED not in later.drawn and PATCHED in later.drawn
    assert not Record(tmp_path, {"steps": 21}).trials


def test_all_ranks_may_leave_out_what_is_of_something_else(tmp_path):
    """Every rank opens the record of the folder, at the same time."""
    Record(tmp_path, {"steps": 19}).save()
    pictures = tmp_path / "tune"
    for number in range(500):
        (pictures / f"{number}.npy").touch()
    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(lambda _: Record(tmp_path, {"steps": 20}), range(4)))
    assert len(found) == 4 and not list(pictures.iterdir())


@pytest.mark.parametrize("text", (None, "{,", "[1]", "{}", '{"key": 3, "trials": [{}]}', '{"key": {"steps": 20}}'))
def test_what_tune_has_not_written_stays(tmp_path, text):
    mine = tmp_path / "tune" / "mine.npy"
    mine.parent.mkdir()
    mine.touch()
    if text is not None:
        (tmp_path / "tune.json").write_text(text)
    assert not Record(tmp_path, {"steps": 20}).trials and mine.exists()


def test_the_page_and_the_picture(tmp_path):
    record, world = Record(tmp_path, {}), _World(_seconds, _closeness)
    record.link = {"latency_s": 1e-4, "gbs": 2.0}
    session = _session(record, world)
    world.carry_out(session)
    args = Namespace(nproc=2, steps=20)
    found = page.Found(args, record, AIM, 2, torch.device("cpu"))
    text = found.markdown()
    assert "asyncdiff_fast.patch(pipe, parallel_steps=2" in text and "Left out:" in text and "1.82×" in text
    json.dumps(found.as_dict())
    exact = [record.picture(UNPATCHED, i) for i in (0, 1)]
    image = sheet.drawn(found, [p for _, p, _ in PROMPTS], exact)
    assert image.width > 900 and image.height > 600


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nproc", "0"], "at least 1: got '0'"),
        (["--minutes", "0"], "--minutes must be more than 0: got 0"),
        (["--prompts", "/no/such/file"], "--prompts must be a text file with a prompt a line: /no/such/file"),
        (["--min-psnr", "30", "--max-seconds", "2"], "not allowed with argument"),
        (["/no/such/folder"], "no folder /no/such/folder"),
    ],
)
def test_wrong_usage_is_one_line(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and expected in lines[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_two_processes_are_tuned(tmp_path, delay_s):
    """With an exchange that takes longer than a call, one device is best."""
    command = ["tune", "--steps", "12", "--nproc", "2", "--minutes", "3", "--min-psnr", "25", "--out", str(tmp_path)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    script = [str(SUPPORT / "slow_exchange.py"), str(delay_s)]
    done = subprocess.run([*start, *script, *command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "tune.json").read_text())
    assert (tmp_path / "tune.png").is_file() and kept["chosen"]["line"] in (tmp_path / "tune.md").read_text()
    if delay_s:
        assert kept["chosen"]["one_device"]
