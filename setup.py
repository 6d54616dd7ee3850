import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = pathlib.Path(__file__).parent.resolve()
# A build without isolation may run an environment's Python by its path alone.
PATH = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


class BuildEngine(build_ext):
    """`_C` by CMake, which has the one list of C++ sources. Without the tools for it the package works, but slower."""

    def run(self):
        reason = missing_tool()
        if reason:
            print(
                f"asyncdiff_fast: _C is not built: {reason}; exchanges will run on torch.distributed", file=sys.stderr
            )
            self.extensions = []
        super().run()

    def build_extension(self, extension):
        import pybind11

        target = pathlib.Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = pathlib.Path(self.build_temp).resolve() / "engine"
        configure = [which("cmake"), "-S", str(HERE), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}"]
        if which("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={which('ninja')}"]
        environment = os.environ | {"PATH": PATH}
        subprocess.run(configure, check=True, env=environment)
        subprocess.run([which("cmake"), "--build", str(build), "--parallel"], check=True, env=environment)


def which(tool):
    return shutil.which(tool, path=PATH)


def missing_tool():
    """What the engine cannot be built without and is not here, or None."""
    if not any(which(compiler) for compiler in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")):
        return "no C++ compiler was found"
    if not which("cmake"):
        return "cmake was not found"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed in the environment of the build"
    return None


WINGS = (
    "calls", "commands", "commands.tune", "decoder", "exchange", "fused", "halves", "patches", "pipelined",
    "prediction", "profiling", "simulation", "stages", "steps", "tracing", "workers",
)  # fmt: skip

# Named one by one: find_packages() would also take folders of the checkout that are no part of the package.
setup(
    packages=["asyncdiff_fast", "asyncdiff_fast.kernels", *(f"asyncdiff_fast.{wing}" for wing in WINGS)],
    package_dir={"asyncdiff_fast.kernels": "kernels"},
    ext_modules=[Extension("asyncdiff_fast._C", sources=[])],
    cmdclass={"build_ext": BuildEngine},
)
