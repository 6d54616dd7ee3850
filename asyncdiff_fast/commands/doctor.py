"""What is here: versions, devices, ways to exchange, and what a run would use."""

import os
import platform
from importlib import metadata, util

from . import folder
from .launch import UsageError

PACKAGES = ("asyncdiff_fast", "torch", "diffusers", "transformers", "triton")


def facts():
    """Dict of versions, devices, transports, the small pipeline's folder, and what would be used; fit for JSON."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    engine = util.find_spec("asyncdiff_fast._C") is not None
    distributed = torch.distributed.is_available()
    return {
        "versions": versions(),
        "devices": {"gpus": gpus, "cpu_cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()},
        "transports": {
            "gloo": distributed and torch.distributed.is_gloo_available(),
            "nccl": distributed and torch.distributed.is_nccl_available() and bool(gpus),
            "engine": engine,
        },
        "kernels": _kernels(),
        "pipeline": _pipeline(),
        "use": _use(len(gpus), engine),
    }


def text(found):
    """The facts as lines for people."""
    devices, transports = found["devices"], found["transports"]
    threads = f"{devices['cpu_cores']} CPU cores for this process, torch uses {devices['threads']} threads"
    versions = found["versions"]
    rows = [(name, versions[name] or "not installed") for name in ("python", *PACKAGES)]
    rows += [("devices", ", ".join([*devices["gpus"], threads]))]
    rows += [
        ("gloo", "yes" if transports["gloo"] else "no"),
        ("nccl", versions["nccl"] if transports["nccl"] else "no"),
    ]
    rows += [("engine", "asyncdiff_fast._C" if transports["engine"] else "not built")]
    rows += [("kernels", found["kernels"]["fused"])]
    rows += [("pipeline", found["pipeline"] or "not found: the small trained pipeline belongs to the checkout")]
    use = found["use"]
    rows += [("demo uses", f"{use['processes']} processes on {use['device']}, tensors over {use['transport']}")]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def versions():
    """{package: version, or None where it is not installed}; NCCL's where there are GPUs."""
    import torch

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return found


def _kernels():
    """What `kernels="auto"` means here, and where its measured choices are kept."""
    import torch

    from ..fused import choice, choice_file, timing

    reason = choice.why_not()
    if reason:
        return {"fused": f"torch's own: {reason}", "cache": None}
    if not torch.cuda.is_available():
        return {"fused": "torch's own; kernels=\"triton\" runs ours in Triton's interpreter", "cache": None}
    return {
        "fused": "Triton, where measured to be no slower than torch",
        "cache": str(choice_file.path(timing.environment())),
    }


def _pipeline():
    try:
        return str(folder.checked())
    except UsageError:
        return None


def _use(num_gpus, engine):
    """What two ranks take: a GPU for each process, or CPU processes."""
    if num_gpus >= 2:
        return {"device": "cuda", "processes": 2, "transport": "nccl"}
    return {"device": "cpu", "processes": 2, "transport": "shared memory" if engine else "gloo"}
