"""The stages of run_on_gpu.sh: one after the other, within a deadline, packed after each; see there."""

import argparse
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu_work"
# To pack, and to say how it ended.
CLOSING_S = 8
# A stage's own scripts stop so long before it is stopped.
MARGIN_S = 5
# Of Triton's cache, which spares the next run its compiling, if it is not larger.
LARGEST_CACHE = 8 << 20
SHOWN = re.compile(r"^(ROW|OK|FAIL|FAILED|E  |\{\"part\")|^\d+ (passed|failed)| in [\d.]+s")


class Stage(NamedTuple):
    """`least`: seconds without which it is not begun; `limit`: after which it is ended. `commands`: {log: arguments}.

    `beside`: a command that runs meanwhile. `vital`: if it fails, there is no sense in what follows.
    """

    name: str
    least: float
    limit: float
    commands: dict
    beside: tuple = ()
    vital: bool = False


def stages(options):
    """All of them, in the order of their value."""
    tiny = options.rehearse
    python, benchmark = [options.python, "-P"], str(ROOT / "benchmarks")

    def run(script, *arguments):
        return [*python, f"{benchmark}/{script}.py", *arguments]

    def tests(*paths):
        return [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=100", *_workers(tiny), *paths]

    on_cpu = ["--device", "cpu"] if tiny else []
    exchange_tests = tests("tests/exchange/test_gpu_exchange.py")
    model = ["--tiny", *on_cpu] if tiny else ["--model", "sdxl", "--rounds", "5", "--calls", "4"]
    kernels = ["--kernels", "torch"] if tiny else ["--kernels", "torch", "auto", "triton"]
    single = run("single_device", *model, *kernels, "--save")
    sizes = ["--model", "tiny", "--patches", "2", "--rounds", "1"] if tiny else ["--model", "sdxl"]
    sizes += [] if tiny else ["--pixels", "1024", "3840", "--patches", "2", "8"]
    patches = {
        f"patches_{name}": run("patch_compute", *on_cpu, *sizes, "--options", f"kernels={name}", "--save")
        for name in (("torch",) if tiny else ("auto", "torch"))
    }
    few = ["--device", "cpu", "--model", "tiny", "--rounds", "2"] if tiny else ["--model", "sdxl"]
    pieces = run("pieces", *few, "--kernels", *(("torch",) if tiny else ("auto", "torch")), "--save")

    def op(name):
        # What rows say of goals is printed after each.
        return {name: run(f"bench_{name}", *on_cpu, "--quick"), f"goals_{name}": run("goals")}

    left_out = ["--without", "text", "joined", "add_layer_norm", "channels_last"]
    profile = [
        *model,
        "--kernels",
        "torch" if tiny else "auto",
        "--profile",
        "--formats",
        "contiguous_format",
        *left_out,
    ]
    compiled = [*model, "--kernels", "torch" if tiny else "auto", "--formats", "channels_last", "--save", "--compile"]

    def other(name):
        tried = ["--tiny", *on_cpu] if tiny else ["--model", name, "--quick"]
        return {f"single_{name}": run("single_device", *tried, "--kernels", "torch" if tiny else "auto", "--save")}

    return [
        Stage("build", 5, 120, {"build": run("gpu_build", options.site)}),
        Stage("facts", 5, 30, {"facts": run("gpu_smoke", "facts")}, vital=True),
        Stage("smoke", 10, 75, {"smoke": run("gpu_smoke", "right")}, ("exchange_smoke", exchange_tests)),
        Stage("captures", 10, 45, {"captures": tests("tests/fused/test_gpu_captures.py")}),
        Stage("kernels", 30, 120, {"kernels": tests("tests/kernels/test_gpu_kernels.py")}),
        Stage("pieces", 20, 90, {"pieces": pieces}),
        Stage("single", 30, 120, {"single": single}),
        Stage("group_norm", 20, 90, op("group_norm")),
        Stage("pointwise", 15, 60, op("pointwise")),
        Stage("patches", 30, 120, patches),
        Stage("flux", 30, 75, other("flux")),
        Stage("sd15", 20, 60, other("sd15")),
        Stage("pipelines", 20, 90, {"pipelines": tests("tests/test_gpu_pipelines.py")}),
        Stage("attention", 20, 90, op("attention")),
        Stage("exchange", 15, 60, {"exchange": run("bench_exchange", "--only", "gpu", "--quick", "--save")}),
        Stage("profile", 30, 90, {"profile": run("single_device", *profile, "--save")}),
        Stage("blocks", 60, 150, {"blocks": run("single_device", *compiled, "blocks")}),
        # Compiled for many minutes: what all others leave of the time.
        Stage("autotune", 240, 560, {"autotune": run("single_device", *compiled, "whole")}),
    ]


def _workers(tiny):
    """Nearly all of the tests' time on a GPU goes into compiling, on the CPU's cores."""
    try:
        import xdist  # noqa: F401
    except ImportError:
        return []
    return [] if tiny else ["-n", str(max(1, (os.cpu_count() or 1) - 2))]


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--site", default=str(WORK / "site"), help="where packages are installed for this run")
    parser.add_argument("--seconds", type=float, default=560, help="for all stages together")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, on tiny shapes")
    parser.add_argument("--list", action="store_true", help="print the stages with their limits")
    parser.add_argument("--python", default=sys.executable, help=argparse.SUPPRESS)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    options = parser.parse_args(argv)
    known = [stage.name for stage in stages(options)]
    unknown = [name for name in options.stages if name not in known]
    if unknown:
        parser.error(f"no stage is called {', '.join(unknown)}; there are {', '.join(known)}")
    return options


class Run:
    """One run: its deadline, the lines of its summary, what is packed."""

    def __init__(self, options):
        self.options = options
        self.end = float(os.environ.get("BEGAN") or time.time()) + options.seconds - CLOSING_S
        options.out.mkdir(parents=True, exist_ok=True)
        self.logs, self.rows = WORK / "logs", WORK / "rows"
        for folder in (self.logs, self.rows):
            folder.mkdir(parents=True, exist_ok=True)
        self.summary = options.out / "summary.txt"
        self.environment = os.environ | {"BENCHMARK_RESULTS": str(self.rows), "OMP_NUM_THREADS": "1"}
        self.environment |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
        # The scripts' own folder is not on the path of a Python that is started with -P.
        path = [options.site, str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, path)))
        self.environment.setdefault("TRITON_CACHE_DIR", str(WORK / "triton"))
        self.environment.setdefault("ASYNCDIFF_FAST_CACHE", str(WORK / "choices"))

    def note(self, line):
        """Add a line to the summary, and print it."""
        print(line, flush=True)
        with open(self.summary, "a") as file:
            file.write(line + "\n")

    def done(self):
        """Names of the stages that an earlier run has brought to a good end, of these sources."""
        lines = self.summary.read_text().splitlines() if self.summary.exists() else []
        heads = [i for i, line in enumerate(lines) if line.startswith("== ")]
        same = heads and lines[heads[-1]].split()[1:3] == self._head().split()[1:3]
        return {line.split()[0] for line in lines if same and line.split()[1:2] == ["ok"]}

    def _head(self):
        known = (os.environ.get(name) or "unknown" for name in ("COMMIT", "SOURCES"))
        return f"== {' '.join(known)} {time.strftime('%Y-%m-%d %H:%M:%S')}"

    def begin(self):
        """Returns the stages to run."""
        wanted, done = self.options.stages, self.done()
        self.note(self._head())
        return [s for s in stages(self.options) if (s.name in wanted if wanted else s.name not in done)]

    def carry_out(self, stage):
        """Whether all commands of a stage came to a good end."""
        left = self.end - time.time()
        if left < stage.least:
            self.note(f"{stage.name:<10} left out: {left:.0f} s are left, it takes {stage.least:.0f}")
            return False
        began, good = time.time(), True
        limit = began + min(stage.limit, left)
        beside = self._start(*stage.beside, limit) if stage.beside else None
        for name, command in stage.commands.items():
            good = self._finish(name, self._start(name, command, limit), limit) and good
        if beside is not None:
            good = self._finish(stage.beside[0], beside, limit) and good
        self.note(f"{stage.name:<10} {'ok' if good else 'FAIL':<5} {time.time() - began:5.0f} s of {stage.limit:.0f}")
        return good

    def _start(self, name, command, limit):
        environment = self.environment | {"DEADLINE": str(limit - MARGIN_S)}
        with open(self.logs / f"{name}.log", "a") as log:
            log.write(f"== {' '.join(command)}\n")
            log.flush()
            # A session of its own, so that all its processes can be ended.
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )

    def _finish(self, name, process, limit):
        code = "took too long"
        try:
            code = process.wait(max(0.1, limit - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        text = (self.logs / f"{name}.log").read_text(errors="replace").rpartition("== ")[2].splitlines()
        shown = [line for line in text if SHOWN.search(line)][-40:] if code == 0 else text[-20:]
        for line in shown:
            self.note(f"  {line[:230]}")
        if code != 0:
            self.note(f"  FAIL {name}: {code if isinstance(code, str) else f'exit code {code}'}")
        return code == 0

    def pack(self):
        """Renew run.tar.gz."""
        packed = WORK / "run.tar.gz"
        with tarfile.open(packed, "w:gz") as archive:
            for name in ("logs", "rows", "choices"):
                if (WORK / name).exists():
                    archive.add(WORK / name, name)
            cache = WORK / "triton"
            files = [f for f in cache.rglob("*") if f.is_file()] if cache.exists() else []
            if sum(f.stat().st_size for f in files) <= LARGEST_CACHE:
                for file in files:
                    archive.add(file, f"triton/{file.relative_to(cache)}")
        shutil.copy(packed, self.options.out / "run.tar.gz")


def main(argv):
    options = parse(argv)
    if options.list:
        for stage in stages(options):
            print(f"{stage.name:<10} at least {stage.least:.0f} s, at most {stage.limit:.0f} s")
        return 0
    run, failed = Run(options), 0
    for stage in run.begin():
        good = run.carry_out(stage)
        run.pack()
        failed += not good
        if stage.vital and not good:
            run.note(f"{stage.name} is what everything else stands on: nothing follows")
            break
    print(run.summary.read_text())
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
