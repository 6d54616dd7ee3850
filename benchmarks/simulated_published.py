"""What papers measured, and what the simulation's clockwork says of their rules on the hardware they name.

Their rules, not this package's: AsyncDiff broadcasts every stage's results after a call and waits for them;
DistriFusion gathers keys, values and rows beside the next call; PipeFusion lets a patch enter the first stage of a step
when it has left the last stage of the step before.
"""

import dataclasses

import measure
import torch
from diffusers import AutoencoderKL
from report import table
from torch.utils.flop_counter import FlopCounterMode

from asyncdiff_fast.simulation.cluster import LINKS, Cluster
from asyncdiff_fast.simulation.events import Compute, Mark, Post, Wait, run
from asyncdiff_fast.simulation.steps import everyone

# (model, pixels, MACs of 50 calls in tera, seconds on one device, exact steps,
#  {(stages, stride): seconds}, seconds of communication per picture where they were published)
ASYNCDIFF = (
    ("SD2.1", 768, 76, 5.51, 1, {(2, 1): 3.03, (3, 1): 2.41, (4, 1): 2.10, (2, 2): 1.82, (3, 2): 1.35},
     {(2, 1): 0.13, (3, 1): 0.23, (4, 1): 0.40, (2, 2): 0.12, (3, 2): 0.10}),
    ("SDXL", 1024, 299, 13.81, 3, {(2, 1): 8.00, (3, 1): 5.84, (4, 1): 5.12, (2, 2): 4.91, (3, 2): 3.65}, {}),
)  # fmt: skip
# (pixels, devices, seconds on one, seconds without communication, GB that a rank receives in a step, seconds)
DISTRIFUSION = (
    (1024, 2, 5.02, 2.83, 0.24, 3.35),
    (1024, 4, 5.02, 1.74, 0.36, 2.26),
    (1024, 8, 5.02, 1.48, 0.42, 1.77),
    (2048, 8, 23.7, 4.14, 1.48, 4.81),
    (3840, 8, 140.0, 21.3, 5.38, 22.9),
)
# (model, pixels, steps, halves of guidance, stages, patches, speed-up over one device)
PIPEFUSION = (
    ("PixArt-alpha", 1024, 20, 2, 4, 4, 5.09),
    ("PixArt-alpha", 2048, 20, 2, 4, 4, 7.91),
    ("PixArt-alpha", 4096, 20, 2, 4, 4, 8.59),
    ("SD3-medium", 1024, 20, 2, 4, 4, 3.11),
    ("SD3-medium", 2048, 20, 2, 4, 4, 8.16),
    ("FLUX.1-dev", 1024, 28, 1, 8, 8, 3.42),
    ("FLUX.1-dev", 2048, 28, 1, 8, 8, 5.79),
)
# Kernels that gather take multiprocessors from those that compute, as the paper says.
GATHERING = dataclasses.replace(LINKS["nvlink3"], steals=1.0)
STEPS, DISTRIFUSION_WARMUP, GROUPS = 50, 5, 5


def seconds(programs, inside):
    """Until the last of some ranks on one host ends."""
    cluster = Cluster(1, len(programs), inside)
    return run([[*program, Mark("end")] for program in programs], cluster).at("end")


def decoder_share(pixels, tera_macs):
    """Work of decoding a picture over that of all calls of the denoiser, by counted operations."""
    levels = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=levels[0], up_block_types=levels[1], block_out_channels=(128, 256, 512, 512),
            layers_per_block=2, latent_channels=4,
        )  # fmt: skip
        latent = torch.zeros(1, 4, pixels // 8, pixels // 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(latent)
    return counter.get_total_flops() / 2e12 / tera_macs


def asyncdiff():
    """[(what, published speed-up, simulated)]"""
    published = {row["num_stages"]: row for row in measure.read_result("plans") if "published" in row["split"]}
    found = []
    for model, pixels, macs, alone, warmup, rows, told in ASYNCDIFF:
        share = decoder_share(pixels, macs)
        fixed_s = alone * share / (1 + share)
        call_s = (alone - fixed_s) / STEPS
        for (stages, stride), took in rows.items():
            plan = published[stages] if model == "SDXL" else {"balance": 1.0, "broadcast_mb": 0.0}
            computed = [k for k in range(STEPS) if k >= warmup and (k - warmup) % stride == 0]
            # One more rank with stride 2 repeats the last stage.
            ranks = range(stages + stride - 1)
            lost_s = told.get((stages, stride), 0.0) / len(computed)
            nbytes = plan["broadcast_mb"] * 1e6 / stages
            programs = []
            for mine in ranks:
                program = [Compute(warmup * call_s)]
                for k in computed:
                    program += [Compute(call_s / stages * plan["balance"] + lost_s), *everyone(k, ranks, mine, nbytes)]
                programs.append([*program, Compute(fixed_s)])
            name = f"{model}, {pixels}², {stages} stages, stride {stride}"
            found.append((name, alone / took, alone / seconds(programs, LINKS["nvbridge"])))
    return found


def distrifusion():
    """[(what, published speed-up, simulated)]"""
    found = []
    for pixels, n, alone, computing, gigabytes, took in DISTRIFUSION:
        piece, nbytes = computing / STEPS / GROUPS, gigabytes * 1e9 / GROUPS / (n - 1)
        programs = []
        for mine in range(n):
            others, program = [rank for rank in range(n) if rank != mine], []
            for step in range(STEPS):
                for group in range(GROUPS):
                    program.append(Compute(piece))
                    program.append(Post((step, group), tuple((rank, nbytes) for rank in others)))
                    # Exact steps wait for each other, the rest for what the step before has sent.
                    late = step if step < DISTRIFUSION_WARMUP else step - 1
                    if step != DISTRIFUSION_WARMUP:
                        program += [Wait((late, group), rank) for rank in others]
            programs.append(program)
        name = f"SDXL, {pixels}², {n} patches"
        found.append((name, alone / took, alone / seconds(programs, GATHERING)))
    return found


def pipefusion():
    """[(what, published speed-up, simulated)], in calls of one device."""
    found = []
    for model, pixels, num_steps, halves, stages, patches, speed_up in PIPEFUSION:
        micro, programs = 1 / (halves * stages * patches), []
        for s in range(stages):
            # The first step is exact, stage after stage.
            program = [Wait("first", s - 1)] if s else []
            program += [Compute(1 / (halves * stages))]
            program += [Post("first", (((s + 1) % stages, 0),))] if stages > 1 else []
            program += [Wait("first", stages - 1)] if s == 0 else []
            for step in range(1, num_steps):
                for p in range(patches):
                    key = (step if s else step - 1, p)
                    if s or step > 1:
                        program.append(Wait(key, (s - 1) % stages))
                    program += [Compute(micro), Post((step, p), (((s + 1) % stages, 0),))]
            programs.append(program)
        name = f"{model}, {pixels}², {halves} × {stages} stages, {patches} patches"
        found.append((name, speed_up, num_steps / seconds(programs, LINKS["pcie4"])))
    return found


WHY = {
    "AsyncDiff": "[AsyncDiff](https://arxiv.org/abs/2406.06911), A5000 with NVLink bridges, 50 steps. Times of one "
    "device are the paper's, less the decoder's share by counted work. For SDXL, divisions and bytes of broadcasts are "
    "those of the published code; for SD2.1 divisions are even, and the seconds of communication are the paper's.",
    "DistriFusion": "[DistriFusion](https://arxiv.org/abs/2402.19481), A100 with NVLink, 50 steps. Computing is the "
    "paper's time without communication for 8 patches, and of naive patches for 2 and 4; bytes are the paper's; "
    "gathering takes as much from computing as it takes. Naive patches attend to their own keys only and merge no "
    "statistics, so that for 2 and 4 patches too little is counted: there the simulation is fast.",
    "PipeFusion": "[PipeFusion](https://arxiv.org/abs/2405.14430), 8 L40 over PCIe. The paper does not tell the number "
    "of patches: as many as stages are taken. Nor does it tell times of micro-steps: their share of the work is taken, "
    "which is too little where they are too small to fill a device (1024²) and takes no account of what large pictures "
    "cost one device beyond their work (more than 8× with 8 devices): there the simulation misses.",
}


def page():
    """The tables of published against simulated speed-ups."""
    text = []
    for name, rows in (("AsyncDiff", asyncdiff()), ("DistriFusion", distrifusion()), ("PipeFusion", pipefusion())):
        body = [[what, f"{a:.2f}×", f"{b:.2f}×", f"{b / a - 1:+.0%}"] for what, a, b in rows]
        text += [f"## {name}", WHY[name], table(["what", "published", "simulated", "off by"], body)]
    return "\n\n".join(text)


if __name__ == "__main__":
    print(page())
