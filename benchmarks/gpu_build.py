"""Installs the package of this checkout into a folder for run_on_gpu.sh, unless one of it with an engine is there.

    python benchmarks/gpu_build.py FOLDER

Where the engine cannot be built this says so and fails, but leaves the part in Python, which the kernels run with.
"""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def is_of_checkout(package):
    """Whether all in Python that is installed is what the checkout has, and the other way round."""
    return sources(package, package / "kernels") == sources(ROOT / "asyncdiff_fast", ROOT / "kernels")


def sources(package, kernels):
    """{path: bytes} of the modules of a package."""
    found = {f"kernels/{path.name}": path.read_bytes() for path in kernels.glob("*.py")}
    inside = (path for path in package.rglob("*.py") if path.parent != kernels)
    return found | {str(path.relative_to(package)): path.read_bytes() for path in inside}


def main(argv):
    site = pathlib.Path(argv[0])
    package = site / "asyncdiff_fast"
    if not (any(package.glob("_C.*")) and is_of_checkout(package)):
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
