"""Trains the judge on rendered pictures, held-out captions among them: it must read every picture of the grammar.

    python examples/shapes/train_judge.py

Half of the pictures get a little noise or blur, so that the judge does not mind what an autoencoder leaves behind.
"""

import argparse
import random
from pathlib import Path

import grammar
import torch
import torch.nn.functional as F
from judge import WEIGHTS, Judge, to_pixels, truth, verdicts
from render import render
from safetensors.torch import save_file
from tqdm import tqdm

LEARNING_RATE = 3e-3


def draw_captions(n, seed):
    """n captions, held out or not as it comes."""
    rng = random.Random(seed)
    return [grammar.sample(rng, held_out=rng.random() < 0.125) for _ in range(n)]


def disturb(pixels, generator):
    """Blur a quarter of the pictures, and add noise to a quarter."""
    n = len(pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(n, 1, 1, 1, generator=generator)
    chosen = torch.rand(n, 1, 1, 1, generator=generator)
    noisy = pixels + 0.1 * share * torch.randn(pixels.shape, generator=generator)
    return torch.where(chosen < 0.25, pixels + share * (blurred - pixels), torch.where(chosen < 0.5, noisy, pixels))


def train(samples, batch_size, seed):
    """Returns: the trained judge. One pass: no picture is seen twice."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    judge = Judge()
    num_steps = samples // batch_size
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, num_steps, pct_start=0.05)
    for step_idx in (bar := tqdm(range(num_steps), mininterval=5)):
        captions = draw_captions(batch_size, f"{seed} {step_idx}")
        pixels = disturb(to_pixels(render(captions, seed=step_idx)), generator)
        logits, wanted = judge(pixels), truth(captions)
        loss = sum(F.cross_entropy(logits[head], wanted[head], ignore_index=-1) for head in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return judge.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--samples", type=int, default=80_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judge = train(args.samples, args.batch_size, args.seed).half()
    save_file({name: weight.contiguous() for name, weight in judge.state_dict().items()}, args.out)
    captions = draw_captions(2048, "test")
    scores = verdicts(judge.float(), render(captions, seed=10**6), captions)
    print(
        {name: f"{right.float().mean():.4f}" for name, right in scores.items()}, "right on 2048 new rendered pictures"
    )


if __name__ == "__main__":
    main()
