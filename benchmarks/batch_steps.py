"""What a call with several steps in one batch costs on one device: `python benchmarks/batch_steps.py [--save]`.

A block of N steps could be evaluated by one device as one batch of N. That pays where such a call takes less time than
the calls that it stands for: the table sets the one against the other, with blocks as long as quality_steps.py has
measured them.
"""

import argparse
import statistics
import time

import end_to_end
import measure
import torch
from diffusers import UNet2DConditionModel
from quality import SHAPES

LENGTHS = (1, 2, 4)


def shapes(device):
    """(the trained small U-Net, its inputs for one picture with guidance)."""
    unet = UNet2DConditionModel.from_pretrained(SHAPES / "unet" / "unet").to(device).eval().requires_grad_(False)
    size, text = unet.config.sample_size, unet.config.cross_attention_dim
    inputs = dict(
        sample=torch.randn(2, unet.config.in_channels, size, size, device=device),
        timestep=torch.tensor(500, device=device),
        encoder_hidden_states=torch.randn(2, 16, text, device=device),
    )
    return unet, inputs


def repeated(inputs, length):
    """The arguments of `length` calls as those of one, with a timestep for each picture."""
    batch = inputs["sample"].shape[0]

    def of_all(value):
        whole = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == batch
        return torch.cat([value] * length) if whole else value

    found = {name: of_all(value) for name, value in inputs.items()}
    return found | {"timestep": inputs["timestep"].expand(batch * length).contiguous()}


def costs(denoiser, inputs, rounds):
    """{length: median over rounds of a call with so many steps, in calls with one step of the same round}."""
    arguments = {length: repeated(inputs, length) for length in LENGTHS}
    seconds = {length: [] for length in LENGTHS}
    with torch.inference_mode():
        for round_idx in range(rounds + 1):
            for length, given in arguments.items():
                start = time.perf_counter()
                denoiser(**given)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                # The first round warms up.
                if round_idx:
                    seconds[length].append(time.perf_counter() - start)
    ratios = {n: [a / b for a, b in zip(seconds[n], seconds[1], strict=True)] for n in LENGTHS}
    return {n: statistics.median(found) for n, found in ratios.items()}, statistics.median(seconds[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="append rows to benchmarks/results/batch_steps.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, (denoiser, inputs) in {
        "shapes": shapes(device),
        "sd15_width": end_to_end.load("sd15_width", device),
    }.items():
        found, alone = costs(denoiser, inputs, args.rounds)
        row = {
            "model": name,
            "sample": list(inputs["sample"].shape),
            "call_s": alone,
            "cost_in_calls": found,
            "rounds": args.rounds,
        }
        print(row)
        if args.save:
            measure.write_row("batch_steps", row)


if __name__ == "__main__":
    main()
