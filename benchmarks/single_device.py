"""One call of a denoiser on one device, unpatched and patched with fused kernels: launched eagerly and as a CUDA graph.

    python benchmarks/single_device.py --model sdxl --save
    python benchmarks/single_device.py --device cpu --tiny

Weights are random, in the published checkpoint's configuration. Both ways share the weights and run in turns, a UNet in
each memory format; a row has the median time with its 20th and 80th percentile, and how far the patched result is off.
"""

import argparse
import json
import statistics
import sys
import time

import measure
import real_models
import torch

import asyncdiff_fast


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=sorted(real_models.MODELS), default="sdxl")
    parser.add_argument(
        "--pixels", type=int, nargs="+", metavar="SIZE", help="heights and widths; default: the model's"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the model's")
    parser.add_argument("--kernels", choices=("auto", "triton", "torch"), default="auto")
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


def rows(options, pixels, memory_format):
    """Rows of one size and memory format, if the model has convolutions to mind it: eager, and on a GPU as a graph."""
    denoiser, twin = build(options)
    if memory_format != "contiguous_format" and "UNet2D" not in type(denoiser).__name__:
        return []
    layout = getattr(torch, memory_format)
    for module in (denoiser, twin):
        module.to(memory_format=layout)
    given = inputs(options, denoiser, pixels)
    runtime = asyncdiff_fast.patch(denoiser, kernels=options.kernels)
    calls = [lambda module=module: module(**given)[0] for module in (twin, denoiser)]
    # The first call measures and chooses; the caches of both are warm after it.
    exact, fused = (call() for call in calls)
    common = {
        "model": "tiny" if options.tiny else options.model,
        "latents": list(given[next(n for n in ("sample", "hidden_states") if n in given)].shape),
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "memory_format": memory_format,
        "relative_difference": ((fused - exact).abs().max() / exact.abs().max()).item(),
        "kernels": runtime.stats()["kernels"],
    }
    made = [{**common, "mode": "eager", **compare(options, *calls)}]
    if options.device == "cuda":
        graphs = [captured(call)[0] for call in calls]
        made.append({**common, "mode": "graph", **compare(options, *graphs)})
    asyncdiff_fast.unpatch(denoiser)
    return made


@torch.no_grad()
def main(argv):
    options = parse(argv)
    for pixels in options.pixels or [None]:
        for memory_format in ("contiguous_format", "channels_last"):
            for row in rows(options, pixels, memory_format):
                if options.save:
                    measure.write_row("single_device", row)
                print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
