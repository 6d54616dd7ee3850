"""The package builds and installs from its sources in every usual way, also where the engine cannot be built."""

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXTENSION = f"asyncdiff_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _run(*command, **environment):
    """Output of a command that must succeed; the build sees no CUDA and nothing of this checkout."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_HOME", "CXX")}
    done = subprocess.run(command, capture_output=True, text=True, env=kept | environment, cwd="/")
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def _pip(*arguments, **environment):
    return _run(sys.executable, "-m", "pip", *arguments, **environment)


@pytest.fixture
def sources(tmp_path):
    """A copy of what is in the repository, without anything that was built here or by another test."""
    folder = tmp_path / "sources"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "examples/", "benchmarks/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def sdist(sources, tmp_path):
    folder = tmp_path / "sdist"
    script = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=sources, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture
def python(tmp_path):
    """The interpreter of an environment of its own, which sees the packages of this one, but not what is editable."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, capture_output=True)
    found = folder / "bin" / "python"
    packages = _run(found, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    seen = [path for path in sys.path if path.endswith("site-packages")]
    pathlib.Path(packages, "of_the_tests.pth").write_text("\n".join([*seen, ""]))
    return found


def _wheel(folder, *arguments, **environment):
    output = _pip("wheel", "--no-deps", "-w", str(folder), *arguments, **environment)
    (wheel,) = pathlib.Path(folder).glob("*.whl")
    return zipfile.ZipFile(wheel), output


def test_an_sdist_has_all_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    patterns = ("csrc/*.?pp", "asyncdiff_fast/**/*.py", "kernels/*.py")
    sources = {str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names


def test_a_wheel_of_the_sdist_without_isolation(sdist, tmp_path):
    wheel, _ = _wheel(tmp_path, "--no-build-isolation", str(sdist))
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "asyncdiff_fast").rglob("*.py")}
    modules |= {f"asyncdiff_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    files = {name for name in wheel.namelist() if ".dist-info" not in name}
    assert files == modules | {EXTENSION}
    library = wheel.extract(EXTENSION, tmp_path)
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", _run("readelf", "-d", library)))
    assert needed <= {"libstdc++", "libgcc_s", "libc", "libm", "libpthread", "libdl", "ld-linux-x86-64"}, needed
    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    requirements = email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist")
    assert any(r.startswith("nvidia-nccl-cu12") and 'extra == "cu12"' in r for r in requirements)
    assert any(r.startswith("nvidia-nccl-cu13") and 'extra == "cu13"' in r for r in requirements)
    assert not any(r.startswith("nvidia") and "extra" not in r for r in requirements)


def test_a_wheel_in_isolation(sources, tmp_path):
    """The build's own environment has no torch."""
    wheel, _ = _wheel(tmp_path, str(sources))
    assert EXTENSION in wheel.namelist()


def test_without_a_compiler_the_package_installs_and_says_so(sources, tmp_path, python):
    wheel, output = _wheel(tmp_path, "-v", "--no-build-isolation", str(sources), PATH="/nowhere")
    assert "_C is not built: no C++ compiler was found; exchanges will run on torch.distributed" in output
    assert EXTENSION not in wheel.namelist() and "asyncdiff_fast/exchange/engine.py" in wheel.namelist()
    wheel.extractall(tmp_path / "installed")
    script = "from asyncdiff_fast.exchange import engine; print(engine.missing())"
    said = _run(python, "-c", script, PYTHONPATH=str(tmp_path / "installed"))
    assert "asyncdiff_fast._C is not built" in said and "install a C++ compiler" in said


@pytest.mark.parametrize(
    # The second as `make install` does.
    "isolation",
    [(), pytest.param(("--no-build-isolation",), marks=pytest.mark.exhaustive)],
)
def test_an_editable_installation(sources, tmp_path, python, isolation):
    checkout = tmp_path / "checkout"
    shutil.copytree(sources, checkout)
    _pip("--python", str(python), "install", "--no-deps", *isolation, "-e", str(checkout))
    script = "from asyncdiff_fast import _C, kernels; print(_C.__file__); print(kernels.__file__)"
    found = [pathlib.Path(line).resolve() for line in _run(python, "-c", script).splitlines()]
    assert found == [(checkout / name).resolve() for name in (EXTENSION, "kernels/__init__.py")]
