"""How figures are taken and kept: timing, facts of the machine, rows of results."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch

RESULTS = pathlib.Path(os.environ.get("BENCHMARK_RESULTS") or pathlib.Path(__file__).parent / "results")
# When the caller's time is up, in seconds since the epoch: nothing new is begun then.
DEADLINE = float(os.environ.get("DEADLINE", "inf"))


def facts():
    """Dict: what a row needs to be understood later: commit, date, device, versions."""
    cuda = torch.cuda.is_available()
    return {
        # A copy of a checkout may not know it.
        "commit": os.environ.get("COMMIT") or _output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else _cpu(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "python": platform.python_version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        **{name: _version(name) for name in ("torch", "diffusers", "triton")},
    }


def left_s():
    """Seconds until `DEADLINE`."""
    return DEADLINE - time.time()


class Failures:
    """Cases that failed, which must not cost the others their rows; `count` of them."""

    def __init__(self):
        self.count = 0

    @contextlib.contextmanager
    def kept(self, case):
        """Within it an exception is printed and counted."""
        try:
            yield
        except Exception as error:
            self.count += 1
            print(f"FAILED {case}: {type(error).__name__}: {error}"[:600], file=sys.stderr, flush=True)


def summary(seconds):
    """Dict: median, 20th and 80th percentile of a list of seconds, and how many there are."""
    if len(seconds) == 1:
        return {"median_s": seconds[0], "p20_s": seconds[0], "p80_s": seconds[0], "count": 1}
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median_s": statistics.median(seconds), "p20_s": cuts[0], "p80_s": cuts[3], "count": len(seconds)}


def median_interval(values):
    """(low, high): where the median of what `values` are a sample of lies, 95 times of 100; by their order alone."""
    inside = (len(values) - 1.96 * len(values) ** 0.5) / 2
    lowest = max(0, int(inside))
    ordered = sorted(values)
    return ordered[lowest], ordered[-1 - lowest]


def peak_rss_mb():
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def write_row(name, row):
    """Append a row, with the machine's facts, to `results/NAME.jsonl`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps({**row, **facts()}) + "\n")


def read_rows(name):
    """The rows of `results/NAME.jsonl`."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def read_result(name):
    """The dict in `results/NAME.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
