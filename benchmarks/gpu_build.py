"""Installs the package of this checkout into a folder for run_on_gpu.sh, unless one with an engine was carried there.

    python benchmarks/gpu_build.py FOLDER

Where the engine cannot be built this says so and fails, but leaves the part in Python, which the kernels run with.
"""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(argv):
    site = pathlib.Path(argv[0])
    package = site / "asyncdiff_fast"
    if not any(package.glob("_C.*")):
        shutil.rmtree(package, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
        done = subprocess.run([*command, "--upgrade", "--target", site, "."], cwd=ROOT)
        # Without a compiler the package is installed all the same, without the engine.
        if done.returncode:
            shutil.copytree(ROOT / "asyncdiff_fast", package, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
            shutil.copytree(ROOT / "kernels", package / "kernels")
    engine = next(package.glob("_C.*"), None)
    print(f"FAIL no engine in {package}" if engine is None else f"OK {engine}", flush=True)
    return int(engine is None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
