"""One decode by one rank and by all: time, memory, bytes; and the text encoder, by all ranks or by one that sends.

    python benchmarks/decode.py --nproc 2 --size 512 --save

The autoencoder of Stable Diffusion 1.5 with random weights, one thread a rank. Rounds alternate: all ranks share a
decode, then rank 0 decodes alone while the others sleep; each time is taken from barrier to barrier. Memory is each
rank's peak before any whole decode, and rank 0's after one, less what it had before the first. Last, the text encoder:
every rank encodes at once, or rank 0 encodes and sends.
"""

import argparse
import json
import os
import statistics
import sys
import time

import measure
import torch
import torch.distributed as dist

import asyncdiff_fast
from asyncdiff_fast.commands.launch import launch

# glibc's: what is freed goes back, so that a peak is what was needed at once.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
PROMPTS, TOKENS = 2, 77


class Pipe:
    """As a pipeline with a denoiser and an autoencoder."""

    def __init__(self, vae):
        self.components = {"unet": torch.nn.Conv2d(4, 4, 1), "vae": vae}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--narrow", type=int, default=1, help="divide the channels by this, to try it out")
    parser.add_argument("--save", action="store_true", help="append the row to benchmarks/results/decode.jsonl")
    return parser.parse_args(argv)


def autoencoder(narrow):
    """The autoencoder of Stable Diffusion 1.5, with random weights that are the same on all ranks."""
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[n // narrow for n in (128, 256, 512, 512)],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
    )
    return vae.eval().requires_grad_(False)


def timed(function, works=True):
    """(seconds from barrier to barrier, what `function()` gives where this rank `works`)."""
    dist.barrier()
    began = time.perf_counter()
    result = function() if works else None
    dist.barrier()
    return time.perf_counter() - began, result


def text_encoder(narrow):
    """The text encoder of Stable Diffusion 1.5, with random weights."""
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=768 // narrow, intermediate_size=3072 // narrow, num_hidden_layers=12, num_attention_heads=12
    )
    return transformers.CLIPTextModel(config).eval().requires_grad_(False)


def measure_text(options):
    """Dict: seconds of a prompt and its negative one, encoded by every rank at once, or by rank 0, which sends."""
    first = dist.get_rank() == 0
    encoder, tokens = text_encoder(options.narrow), torch.randint(0, 1000, (PROMPTS, TOKENS))
    embeddings = torch.zeros(PROMPTS, TOKENS, 768 // options.narrow)

    def everyone():
        return encoder(tokens)[0]

    def sent():
        if first:
            embeddings.copy_(everyone())
        dist.broadcast(embeddings, 0)

    everyone()
    rounds = [(timed(everyone)[0], timed(sent)[0]) for _ in range(5 * options.rounds)]
    return {
        "text_all_s": statistics.median(a for a, _ in rounds),
        "text_sent_s": statistics.median(b for _, b in rounds),
    }


def measure_rank(options):
    """The row, on rank 0; all ranks run it together."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    vae, first = autoencoder(options.narrow), dist.get_rank() == 0
    plain = autoencoder(options.narrow)
    plain.load_state_dict(vae.state_dict(), assign=True)
    latent = torch.randn(1, 4, options.size // 8, options.size // 8, generator=torch.Generator().manual_seed(0))
    before = measure.peak_rss_mb()
    pipe = Pipe(vae)
    runtime = asyncdiff_fast.patch(
        pipe, num_patches=options.nproc, exchange="sync", vae=True, kernels="torch", timeout_s=600
    )
    planning_s, picture = timed(lambda: vae.decode(latent).sample)
    memory = measure.peak_rss_mb() - before
    alone_s, whole = timed(lambda: plain.decode(latent).sample, first)
    alone_memory = measure.peak_rss_mb() - before
    runtime.decoder.clear_stats()
    rounds = []
    for _ in range(options.rounds):
        together, _ = timed(lambda: vae.decode(latent).sample)
        rounds.append((together, timed(lambda: plain.decode(latent).sample, first)[0]))
    stats, kind = runtime.decoder.stats(), runtime.decoder.exchange_kind
    everyone = [None] * options.nproc
    dist.all_gather_object(everyone, (memory, stats["sent_bytes"] / options.rounds, stats["wait_s"] / options.rounds))
    text = measure_text(options)
    asyncdiff_fast.unpatch(pipe)
    if not first:
        return None
    return {
        "nproc": options.nproc,
        "size": options.size,
        "narrow": options.narrow,
        "exchange": kind,
        "speedup": statistics.median(b / a for a, b in rounds),
        "speedups": [b / a for a, b in rounds],
        "decode_s": statistics.median(a for a, _ in rounds),
        "decode_s_alone": statistics.median(b for _, b in rounds),
        "first_decode_s": planning_s,
        "first_decode_s_alone": alone_s,
        "memory_mb": [m for m, _, _ in everyone],
        "memory_mb_alone": alone_memory,
        "sent_bytes": [n for _, n, _ in everyone],
        "wait_s": [s for _, _, s in everyone],
        "error": float((picture - whole).abs().max() / whole.abs().max()),
        **text,
    }


def main(argv):
    options = parse(argv)
    if "RANK" not in os.environ:
        return launch(options.nproc, ["--", __file__, *argv], **GIVE_BACK)
    dist.init_process_group("gloo")
    row = measure_rank(options)
    if row is not None:
        if options.save:
            measure.write_row("decode", row)
        print(json.dumps(row, indent=1), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
