"""Compile every shipped kernel ahead of time for one target, without a device (`python compile_kernels.py sm_90`).

The launchers themselves are called, on tensors in host memory that nobody touches, with a driver that names the target
and with launches that end after compiling: what is inspected is specialised as on the device. One JSON line per kernel.
"""

import dataclasses
import importlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import descriptors
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What each generation multiplies tiles with: warps, warp groups, and from tensor memory.
TENSOR_CORE = {80: r"\bHMMA\b", 90: r"\bHGMMA\b", 100: r"\bUTC\w*MMA\b"}
BINARIES = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A call of a launcher. Of its kernels, `wide` ones access tensors by 16 bytes, `many` of them have four such loads
    in flight, `tensor_core` ones use those, and `beside` ones compute exponentials meanwhile on sm_90."""

    name: str
    launch: object
    wide: tuple = ()
    tensor_core: tuple = ()
    targets: tuple = tuple(TARGETS)
    many: tuple = ()
    beside: tuple = ()


class TargetOnly:
    """A driver for compiling: it names a target and has no device."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compiled(variant):
    """(name, compiled kernel) of each launch that the variant makes."""
    made, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **keywords):
        made.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **keywords)))

    JITFunction.run = compile_only
    try:
        variant.launch()
    finally:
        JITFunction.run = run
    return made


def inspected(kernel, known):
    """`_inspected`, of each code once: `known` has what was found before."""
    code = kernel.asm["cubin"] if "cubin" in kernel.asm else kernel.asm["amdgcn"]
    if code not in known:
        known[code] = _inspected(kernel)
    return known[code]


def _inspected(kernel):
    """Dict: registers, stack and spills (bytes or instructions: zero is what counts), shared bytes, kinds of access."""
    facts = {"shared": kernel.metadata.shared, "num_warps": kernel.metadata.num_warps}
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage, sass = _output("cuobjdump", "-res-usage", file.name), _output("nvdisasm", "-c", file.name)
            misread = descriptors.misread(_output("cuobjdump", "-sass", file.name))
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups()
        spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
        access = re.findall(r"\b(?:LDG|STG|LDGSTS)\.[\w.]+", sass)
        narrow = [op for op in access if re.search(r"\.[US](?:8|16)\b", op)]
        return facts | {
            "registers": int(registers),
            "stack": int(stack) + int(local),
            "spills": spills,
            "wide_loads": sum(op.startswith("LD") and op.endswith(".128") for op in _without_hints(access)),
            "wide_stores": sum(op.startswith("ST") and op.endswith(".128") for op in _without_hints(access)),
            "in_flight": _in_flight(sass),
            "narrow_loads": sum(op.startswith("LD") for op in narrow),
            "narrow_stores": sum(op.startswith("ST") for op in narrow),
            "tensor_core": len(re.findall(TENSOR_CORE[kernel.metadata.target.arch], sass)),
            "misread": misread,
            "products_beside": bool(re.search(r"\bHGMMA\b(?:(?!WARPGROUP\.DEPBAR)[\s\S])*?\bMUFU\.EX2\b", sass)),
        }
    text = kernel.asm["amdgcn"]
    return facts | {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        # Scalars without a register of their own lie in lanes of vector registers: memory they would need is stack.
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", text)),
        "in_flight": None,
        "narrow_loads": 0,
        "narrow_stores": 0,
        "tensor_core": len(re.findall(r"\bv_mfma_", text)),
        "misread": [],
        "products_beside": None,
    }


def _output(tool, *arguments):
    return subprocess.run([BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _without_hints(access):
    """Accesses with what follows the width (cache policies) cut off."""
    return [re.sub(r"(\.128)\..*", r"\1", op) for op in access]


def _in_flight(sass):
    """The most 16-byte loads between which no instruction reads what a load before it has fetched."""
    pending, wide, most = set(), 0, 0
    for op, text in re.findall(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*) ([^;]*);", sass):
        operands = text.split(",")
        sources = ",".join(operands if op.startswith("ST") else operands[1:])
        if pending & set(map(int, re.findall(r"\bR(\d+)\b", sources))):
            pending, wide = set(), 0
        made = re.match(r"R(\d+)", text)
        if op.startswith("LDG") and made:
            wide += ".128" in op
            most = max(most, wide)
            registers = 4 if ".128" in op else 2 if ".64" in op else 1
            pending |= set(range(int(made.group(1)), int(made.group(1)) + registers))
    return most


def _number(pattern, text):
    return int(re.search(pattern, text).group(1))


def main(target):
    driver.set_active(TargetOnly(TARGETS[target]))
    modules = [
        importlib.import_module(path.stem) for path in sorted(pathlib.Path(__file__).parent.glob("compiled_*.py"))
    ]
    known = {}
    for variant in (variant for module in modules for variant in module.VARIANTS if target in variant.targets):
        for name, kernel in compiled(variant):
            row = {"variant": variant.name, "kernel": name, **inspected(kernel, known)}
            row |= {"wide": name in variant.wide, "many": name in variant.many}
            row["beside"] = name in variant.beside and target == "sm_90"
            row["must_use_tensor_core"] = name in variant.tensor_core
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
