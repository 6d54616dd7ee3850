"""What is looked at first on a machine with a GPU: what it is, and whether what runs there is right. A line for each.

    python benchmarks/gpu_smoke.py facts
    python benchmarks/gpu_smoke.py right

Without a GPU the same goes through torch's ops on the CPU, to try the script.
"""

import functools
import importlib.metadata
import json
import pathlib
import sys
import sysconfig
import time
import traceback

import measure
import real_models
import torch
import torch.nn.functional as F

import asyncdiff_fast

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)
KERNEL = "triton" if CUDA else "torch"
# Of half precision, over a whole result.
CLOSE = 1e-2


def machine():
    """Versions, the device, what the engine and the kernels' launchers need."""
    from asyncdiff_fast.exchange import engine

    found = measure.facts() | {"engine": engine.missing() or "ok"}
    for name in ("transformers", "huggingface_hub", "numpy"):
        found[name] = importlib.metadata.version(name)
    # Triton compiles a launcher for each signature.
    found["Python.h"] = pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()
    if CUDA:
        properties = torch.cuda.get_device_properties()
        found |= {"processors": properties.multi_processor_count, "cudnn": torch.backends.cudnn.version()}
        found |= {"free_mb": torch.cuda.mem_get_info()[0] >> 20}
    return found


def ceilings():
    """Copy bandwidth and matmul rate."""
    import gpu_timing

    return gpu_timing.Clock(DEVICE).ceilings()


def near(got, want):
    """The relative error of a tensor. Raises: AssertionError if it is no rounding."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    # NaN is no smaller than anything.
    assert error < CLOSE, f"off by {error}"
    return error


def group_norm():
    """GroupNorm and SiLU in both memory formats, against float64."""
    from asyncdiff_fast.fused import ops

    errors = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (torch.randn(1, 320, 40, 64, device=DEVICE) * 2 + 3).to(DTYPE).to(memory_format=layout)
        weight, bias = (torch.randn(320, device=DEVICE).to(DTYPE) for _ in range(2))
        want = F.silu(F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5))
        got = ops.group_norm(x, weight, bias, 32, 1e-5, True, None, None, None, None, None, KERNEL)
        errors.append(near(got, want))
    return {"errors": errors}


def patch_group_norm():
    """The same of a patch between its neighbours' rows, with the statistics of all patches."""
    from asyncdiff_fast.fused import patch_ops

    x = (torch.randn(1, 320, 40, 64, device=DEVICE) * 2 + 3).to(DTYPE)
    weight, bias = (torch.randn(320, device=DEVICE).to(DTYPE) for _ in range(2))
    row, shares = x[:, :, :1].contiguous(), torch.full((8,), 0.125, device=DEVICE)
    mean, var = (f(x.double().reshape(1, 32, -1), 2) for f in (torch.mean, functools.partial(torch.var, correction=0)))
    # Parts that are all this patch's own: every mode is then the local one.
    parts = torch.stack((mean, var), -1).float().expand(8, 1, 32, 2).contiguous()
    top, bottom = (torch.full_like(row, torch.nan) for _ in range(2))
    y, _ = patch_ops.patch_group_norm(
        x, weight, bias, 32, 1e-5, KERNEL, halo=[1, 1], silu=True, combine="corrected", parts=parts, own=3,
        shares=shares, above=row, below=row, top=top, bottom=bottom,
    )  # fmt: skip
    want = F.silu(F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5))
    return {"errors": [near(y[:, :, 1:-1], want), near(top, want[:, :, :1]), near(bottom, want[:, :, -1:])]}


def attention():
    """Heads of 64, keys in two pieces."""
    from asyncdiff_fast.fused import attention_ops

    q = torch.randn(2, 512, 10, 64, device=DEVICE).to(DTYPE)
    keys, values = ([torch.randn(2, n, 10, 64, device=DEVICE).to(DTYPE) for n in (512, 77)] for _ in range(2))
    k, v = (torch.cat(x, 1).double().transpose(1, 2) for x in (keys, values))
    want = F.scaled_dot_product_attention(q.double().transpose(1, 2), k, v, scale=0.125).transpose(1, 2)
    return {"errors": [near(attention_ops.attention(q, keys, values, 0.125, KERNEL), want)]}


def geglu():
    """a * gelu(b)."""
    from asyncdiff_fast.fused import ops

    x = torch.randn(2, 512, 2560, device=DEVICE).to(DTYPE)
    a, b = x.double().chunk(2, -1)
    return {"errors": [near(ops.geglu(x, KERNEL), a * F.gelu(b))]}


def tiny_unet():
    """Patched is near, replayed from a graph near that, and unpatched again the same bits."""
    unet, given = real_models.tiny(DEVICE, DTYPE)

    def call():
        return unet(**given)[0]

    want = call().clone()
    asyncdiff_fast.patch(unet, kernels=KERNEL, graphs=False)
    errors = [near(call(), want)]
    if CUDA:
        from single_device import captured

        replay, result = captured(call)
        replay()
        errors.append(near(result, want))
    asyncdiff_fast.unpatch(unet)
    assert torch.equal(call(), want), "unpatched it is not what it was"
    return {"errors": errors}


def tiny_patch():
    """One displaced call of a patch of two, without its neighbour."""
    import patch_compute

    options = ["--device", DEVICE, "--model", "tiny", "--rounds", "1", "--options", f"kernels={KERNEL}"]
    row = patch_compute.row(patch_compute.parse(options), None, 2)
    return {"layers": row["kernels"]["layers"]}


CHECKS = {"facts": (machine, ceilings)}
CHECKS["right"] = (group_norm, patch_group_norm, attention, geglu, tiny_unet, tiny_patch)


@torch.no_grad()
def main(argv):
    failed = 0
    torch.manual_seed(0)
    for check in CHECKS[argv[0]]:
        began = time.perf_counter()
        try:
            found = check()
        except Exception as error:
            failed += 1
            print(f"FAIL {check.__name__}: {type(error).__name__}: {error}"[:600], flush=True)
            traceback.print_exc()
        else:
            print(f"OK {check.__name__} {time.perf_counter() - began:.1f} s {json.dumps(found)}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
