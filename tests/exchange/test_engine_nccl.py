"""The real libnccl of NVIDIA's package: it loads, answers without a GPU, fails cleanly, and looks as we declare it."""

import ctypes
import pathlib
import re
import subprocess
import sys
import textwrap

import building
import pytest

from asyncdiff_fast import _C
from asyncdiff_fast.exchange.connecting import nccl_package
from asyncdiff_fast.exchange.world import ExchangeError

LIBRARY = nccl_package()
pytestmark = pytest.mark.skipif(not LIBRARY, reason="needs the nvidia-nccl-cu12 or -cu13 package")
C_TYPES = {"int": ctypes.c_int, "unsigned int": ctypes.c_uint, "size_t": ctypes.c_size_t, "pointer": ctypes.c_void_p}


def _header():
    return (pathlib.Path(LIBRARY).parent.parent / "include" / "nccl.h").read_text()


def test_it_loads_and_answers_without_a_gpu():
    libraries = _C.Libraries(nccl=LIBRARY)
    code = int(re.search(r"#define NCCL_VERSION_CODE (\d+)", _header())[1])
    assert libraries.nccl_version == code >= 21900
    assert pathlib.Path(libraries.nccl_path).samefile(LIBRARY)
    first, second = _C.unique_id(libraries), _C.unique_id(libraries)
    assert len(first) == len(second) == 128 and first != second


def test_the_loaded_copy_is_taken_before_the_package_and_the_system():
    script = f"""
        import ctypes
        from asyncdiff_fast import _C
        ctypes.CDLL({LIBRARY!r})
        assert _C.Libraries(nccl_package="/nowhere/libnccl.so.2").nccl_path == {LIBRARY!r}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    with pytest.raises(ExchangeError, match=r"libnccl\.so\.2 cannot be opened: /nowhere"):
        _C.Libraries(nccl="/nowhere/libnccl.so.2")


def test_starting_without_a_gpu_fails_cleanly():
    """The driver is the double's, so that NCCL itself is what finds no GPU."""
    double = str(building.build()[0])
    script = f"""
        import ctypes, time
        from asyncdiff_fast import _C
        ctypes.CDLL({double!r}).cuCtxSetCurrent(ctypes.c_void_p(0x50000001))
        libraries = _C.Libraries({double!r}, {LIBRARY!r})
        try:
            transport = _C.NcclTransport(libraries, _C.unique_id(libraries), 0, 2, timeout_s=20.0)
            while not transport.ready():
                time.sleep(0.01)
        except RuntimeError as error:
            print(type(error).__name__, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("ExchangeError ") and "cuda" in done.stdout.lower(), done.stdout + done.stderr


def _fields():
    """[(name, C type)] of ncclConfig_t in the header."""
    body = re.search(r"typedef struct ncclConfig_v\d+ \{(.*?)\} ncclConfig_t;", _header(), re.DOTALL)[1]
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
    found = re.findall(r"(size_t|unsigned int|int|const char\s*\*)\s*(\w+);", body)
    return [(name, "pointer" if "*" in kind else kind) for kind, name in found]


def test_the_configuration_has_the_header_s_layout():
    layout = type("Config", (ctypes.Structure,), {"_fields_": [(name, C_TYPES[kind]) for name, kind in _fields()]})
    theirs = [(name, getattr(layout, name).offset, getattr(layout, name).size) for name, _ in _fields()]
    abi = _C.nccl_abi()
    # An older header ends earlier; NCCL reads no more than it knows.
    assert abi["config"][: len(theirs)] == theirs
    if len(theirs) == len(abi["config"]):
        assert abi["config_bytes"] == ctypes.sizeof(layout)


def test_numbers_and_signatures_are_the_header_s():
    header, abi = _header(), _C.nccl_abi()

    def enumerated(name):
        return int(re.search(rf"\b{name}\s*=\s*(\d+)", header)[1])

    assert abi["ncclSuccess"] == enumerated("ncclSuccess")
    assert abi["ncclInt8"] == enumerated("ncclInt8")
    assert abi["unique_id_bytes"] == int(re.search(r"#define NCCL_UNIQUE_ID_BYTES (\d+)", header)[1])
    assert abi["undefined"] == -(2**31) and "NCCL_CONFIG_UNDEF_INT INT_MIN" in header
    assert abi["magic"] == int(re.search(r"#define NCCL_API_MAGIC (0x\w+)", header)[1], 16)
    _compare_signatures(header, abi["functions"])


def _compare_signatures(header, functions):
    for name, ours in functions.items():
        theirs = re.search(rf"\n(?:ncclResult_t|const char\*)\s+{name}\((.*?)\);", header, re.DOTALL)[1]
        ours = ours.strip("()")
        assert len(ours.split(",")) == len(theirs.split(",")), f"{name}: {ours} here, {theirs} in nccl.h"
        for mine, other in zip(ours.split(","), theirs.split(","), strict=True):
            assert _is_pointer(mine) == _is_pointer(other), f"{name}: {mine} here, {other} in nccl.h"


def test_what_one_sided_puts_need_is_the_header_s():
    header, abi = _header(), _C.nccl_abi()
    if int(re.search(r"#define NCCL_VERSION_CODE (\d+)", header)[1]) < abi["puts_since"]:
        assert "NCCL 2.29.2 or later is needed" in _C.Libraries(nccl=LIBRARY).puts_missing
        return
    assert _C.Libraries(nccl=LIBRARY).puts_missing == ""
    _compare_signatures(header, abi["puts_functions"])
    for name in ("NCCL_WIN_COLL_SYMMETRIC", "NCCL_WIN_REQUIRED_ALIGNMENT"):
        assert abi[name] == int(re.search(rf"#define {name} (\w+)", header)[1], 0)
    body = re.search(r"typedef struct \{([^}]*)\} ncclWaitSignalDesc_t;", header)[1]
    names = re.findall(r"int (\w+);", body)
    assert body.count(";") == len(names), "its fields are ints"
    assert abi["awaited"] == [(name, 4 * i) for i, name in enumerate(names)]
    assert abi["awaited_bytes"] == 4 * len(names)


def _is_pointer(parameter):
    handles = ("NcclComm", "CuStream", "NcclWindow", "ncclComm_t", "cudaStream_t", "ncclWindow_t")
    return "*" in parameter or any(re.search(rf"\b{handle}\b", parameter) for handle in handles)
