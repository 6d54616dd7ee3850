"""One call of a denoiser on one device, unpatched and patched with fused kernels: launched eagerly and as a CUDA graph.

    python benchmarks/single_device.py --model sdxl --save
    python benchmarks/single_device.py --device cpu --tiny

Weights are random, in the published checkpoint's configuration. Both ways share the weights and run in turns, a UNet in
each memory format; a row has the median time with its 20th and 80th percentile, and how far the patched result is off.
The unpatched denoiser may attend by another backend, or be compiled: then it is the rival, not the start. With
`graphs=True` convolutions' weights are in channels_last whatever format the unpatched ones have. `--without` gives a
row for each thing that is left out, so that what it gains is read from one run.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time

import left_out
import measure
import real_models
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import asyncdiff_fast

FORMATS = ("contiguous_format", "channels_last")
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# What one case of a large model may take.
LEAST_S = 12


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=sorted(real_models.MODELS), default="sdxl")
    parser.add_argument(
        "--pixels", type=int, nargs="+", metavar="SIZE", help="heights and widths; default: the model's"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the model's")
    parser.add_argument("--kernels", nargs="+", choices=("auto", "triton", "torch"), default=["auto"])
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=("default", *BACKENDS),
        default=["default"],
        help="which of torch's backends the unpatched denoiser attends by, on a GPU",
    )
    parser.add_argument(
        "--compile",
        choices=("no", "blocks", "whole"),
        default="no",
        help="compile the unpatched denoiser: its repeated blocks, or all of it",
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=FORMATS, help="memory formats of a UNet's convolutions"
    )
    parser.add_argument(
        "--without", nargs="+", choices=left_out.NAMES, default=[], help="leave out each, with graphs=True"
    )
    parser.add_argument("--profile", action="store_true", help="print where the patched call spends its time")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=5, help="calls in each round, which is timed as a whole")
    parser.add_argument("--quick", action="store_true", help="8 rounds of 2 calls, the model's own size only")
    parser.add_argument("--tiny", action="store_true", help="a UNet of two narrow levels, to try the script")
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results/single_device.jsonl")
    options = parser.parse_args(argv)
    if options.quick or options.tiny:
        options.rounds, options.calls, options.pixels = 2 if options.tiny else 8, 2, None
    return options


def build(options):
    """(denoiser, a twin with the same weights, which stays unpatched)."""
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.tiny:
        denoiser = real_models.tiny(options.device, dtype or torch.float32)[0]
    else:
        denoiser = real_models.build(options.model, device=options.device, dtype=dtype)
    with torch.device("meta"):
        twin = type(denoiser).from_config(denoiser.config)
    twin.load_state_dict(denoiser.state_dict(), assign=True)
    return denoiser.eval().requires_grad_(False), twin.eval().requires_grad_(False)


def inputs(options, denoiser, pixels):
    """Arguments of one call: a picture of `pixels`, or of the model's own size."""
    if options.tiny:
        return real_models.tiny(options.device, denoiser.dtype)[1]
    return real_models.inputs(options.model, denoiser, options.device, pixels, pixels)


def captured(call):
    """(replay of a CUDA graph of one call, the result it writes)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def seconds(call, calls, device):
    """Seconds of one of `calls` calls in a row, until the device has done them."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def compare(options, plain, patched):
    """Dict: times of both, taken in turns, and the speed-up as the median of the rounds' ratios."""
    rounds = []
    for _ in range(options.rounds):
        rounds.append([seconds(call, options.calls, options.device) for call in (plain, patched)])
    return {
        "unpatched": measure.summary([a for a, _ in rounds]),
        "patched": measure.summary([b for _, b in rounds]),
        "speedup": statistics.median(a / b for a, b in rounds),
    }


def cases(options, denoiser):
    """[(memory format, attention of the unpatched, kernels)], the plainest first; formats matter to convolutions."""
    formats = options.formats if "UNet2D" in type(denoiser).__name__ else FORMATS[:1]
    return [(fmt, way, kernels) for way, fmt, kernels in itertools.product(options.attention, formats, options.kernels)]


@contextlib.contextmanager
def attending(way, device):
    """Within it torch's attention is computed by a backend, "cudnn" say, which a CPU does not have."""
    with sdpa_kernel(BACKENDS[way]) if way != "default" and device == "cuda" else contextlib.nullcontext():
        yield


def compiled(twin, way):
    """What to call in place of the unpatched denoiser."""
    if way == "blocks":
        twin.compile_repeated_blocks(fullgraph=True)
    return torch.compile(twin, mode="max-autotune-no-cudagraphs") if way == "whole" else twin


def rows(options, built, given, case):
    """Yields the rows of one case: launched from Python, on a GPU both replayed from graphs, and with `graphs=True`."""
    (denoiser, twin), (memory_format, attention, kernels) = built, case
    for module in (denoiser, twin):
        module.to(memory_format=getattr(torch, memory_format))

    def plain():
        with attending(attention, options.device):
            return compiled_twin(**given)[0]

    compiled_twin = compiled(twin, options.compile)
    calls = [plain, lambda: denoiser(**given)[0]]
    with patched(denoiser, kernels=kernels, graphs=False) as runtime:
        # The first call measures and chooses; the caches of both are warm after it.
        exact, fused = (call() for call in calls)
        common = {
            "model": "tiny" if options.tiny else options.model,
            "latents": list(given[next(n for n in ("sample", "hidden_states") if n in given)].shape),
            "dtype": str(denoiser.dtype).removeprefix("torch."),
            "memory_format": memory_format,
            "attention": attention,
            "compiled": options.compile,
            "relative_difference": ((fused - exact).abs().max() / exact.abs().max()).item(),
        }
        yield {**common, "mode": "eager", **compare(options, *calls), "kernels": runtime.stats()["kernels"]}
        if options.device == "cuda":
            graphs = [captured(call)[0] for call in calls]
            yield {**common, "mode": "graph", **compare(options, *graphs), "kernels": runtime.stats()["kernels"]}
    for name in (None, *options.without):
        with left_out.without(name), patched(denoiser, kernels=kernels, graphs=True) as runtime:
            # The first call is launched, the second captured.
            for _ in range(2):
                fused = calls[1]()
            difference = ((fused - exact).abs().max() / exact.abs().max()).item()
            row = common | {"mode": "graphs=True", "relative_difference": difference}
            row |= {} if name is None else {"without": name}
            yield row | compare(options, *calls) | {"kernels": runtime.stats()["kernels"]}
            if options.profile and name is None:
                show_profile(calls[1], options.device)


@contextlib.contextmanager
def patched(denoiser, **options):
    """The runtime of a denoiser that is patched meanwhile."""
    runtime = asyncdiff_fast.patch(denoiser, **options)
    try:
        yield runtime
    finally:
        asyncdiff_fast.unpatch(denoiser)


def show_profile(call, device):
    """Print the 25 kernels, or ops, in which a call spends most of its time."""
    with torch.profiler.profile() as profile:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60), flush=True)


def told(row):
    """A row in one line."""
    ms = [f"{1e3 * row[way]['median_s']:.2f}" for way in ("unpatched", "patched")]
    what = [row[name] for name in ("model", "memory_format", "attention", "compiled", "mode")]
    what += [f"without {row['without']}"] if "without" in row else []
    return f"ROW {' '.join(what)} kernels={row['kernels']['mode']}: {ms[0]} -> {ms[1]} ms, {row['speedup']:.2f}x"


@torch.no_grad()
def main(argv):
    options, failures = parse(argv), measure.Failures()
    built = build(options)
    for pixels in options.pixels or [None]:
        given = inputs(options, built[0], pixels)
        for case in cases(options, built[0]):
            if measure.left_s() < LEAST_S:
                print(f"left out: {pixels or ''} {case}", file=sys.stderr, flush=True)
                continue
            with failures.kept(case):
                for row in rows(options, built, given, case):
                    if options.save:
                        measure.write_row("single_device", row)
                    print(json.dumps(row), flush=True)
                    print(told(row), file=sys.stderr, flush=True)
    return min(1, failures.count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
