r"""Trains the UNet and the text encoder of a shapes pipeline further; the VAE stays as it is.

    torchrun --nproc-per-node 2 examples/shapes/train.py \
        --start-from examples/shapes/unet --out build/shapes --samples 400000

Every process computes its share of each batch on one thread, and the gradients are averaged. The same command goes on
from the last checkpoint in `--out`. A checkpoint is `state.pt` (all that training needs), `samples_N.png` (a fixed set
of captions, drawn after N samples) and `pipeline/` (averaged weights, fp16). The result depends on start, seed, batch
size, samples and number of processes, not on interruptions. `--samples` may be changed until the learning rate falls.
"""

import argparse
import copy
import math
import os
import time
from datetime import timedelta
from pathlib import Path

import grammar
import torch
import torch.distributed as dist
import torch.nn.functional as F
from batches import Batches
from sampling import draw, load, sheet, to_bytes
from tqdm import tqdm

LEARNING_RATE = 1e-3
WARMUP_STEPS, DECAY_SHARE = 100, 0.4
AVERAGE_KEEP = 0.998


def learning_rate(step_idx, num_steps):
    """Up in the first hundred steps, level, and down a half cosine to 1 % in the last two fifths of all steps."""
    falling = max(0.0, (step_idx / num_steps - (1 - DECAY_SHARE)) / DECAY_SHARE)
    fall = 0.01 + 0.99 * (1 + math.cos(math.pi * falling)) / 2
    return LEARNING_RATE * min(1.0, (step_idx + 1) / WARMUP_STEPS) * fall


class Trainer:
    """Weights, their running average and the optimizer of one run."""

    def __init__(self, start, batch_size, seed, rank=0, world_size=1):
        self.pipe = load(start)
        self.world_size = world_size
        self.net = torch.nn.ModuleDict({"unet": self.pipe.unet, "text_encoder": self.pipe.text_encoder}).train()
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        self.batches = Batches(self.pipe, batch_size // world_size, f"{seed} {rank}")
        self.step_idx = 0

    def step(self, num_steps):
        """One optimizer step of `num_steps`; returns the loss of this process's share."""
        noisy, timesteps, tokens, velocity = self.batches[self.step_idx]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step_idx, num_steps)
        states = self.net["text_encoder"](tokens).last_hidden_state
        loss = F.mse_loss(self.net["unet"](noisy, timesteps, states).sample, velocity)
        self.optimizer.zero_grad()
        loss.backward()
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 1 - AVERAGE_KEEP)
        self.step_idx += 1
        return loss.item()

    def _average_gradients(self):
        if self.world_size == 1:
            return
        gradients = [parameter.grad for parameter in self.net.parameters()]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = (flat / self.world_size).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def state(self):
        return {
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step_idx": self.step_idx,
        }

    def load_state(self, state):
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_idx = state["step_idx"]

    def averaged_pipe(self, dtype):
        """A pipeline with copies of the averaged weights."""
        parts = {name: copy.deepcopy(part) for name, part in self.average.items()}
        parts = {**self.pipe.components, **parts, "vae": copy.deepcopy(self.pipe.vae)}
        pipe = type(self.pipe)(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.to(memory_format=torch.contiguous_format)
        return pipe.to(dtype)


def export(trainer, folder):
    """Write the averaged weights in fp16, such that a plain `from_pretrained` runs in fp32."""
    trainer.averaged_pipe(torch.float16).save_pretrained(folder)
    # Unless told, diffusers loads in fp32, but transformers in what the config names: the two halves would not fit.
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def checkpoint(trainer, out, num_samples):
    """Write state, pipeline and sample grid; the state goes last, and whole or not at all."""
    export(trainer, out / "pipeline")
    captions = grammar.held_out_set(16, num_objects=1) + grammar.held_out_set(16, num_objects=2)
    pictures = draw(trainer.averaged_pipe(torch.float32), captions, seeds=range(len(captions)), steps=25)
    sheet(to_bytes(pictures), columns=8, captions=captions).save(out / f"samples_{num_samples:07d}.png")
    torch.save(trainer.state(), out / "state.tmp")
    (out / "state.tmp").replace(out / "state.pt")


def wait_while(pause_file):
    while pause_file is not None and pause_file.exists():
        time.sleep(2)


def run(args):
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        # A long pause of one process is no failure of the others.
        dist.init_process_group("gloo", timeout=timedelta(hours=12))
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args.start_from, args.batch_size, args.seed, rank, world_size)
    if (args.out / "state.pt").exists():
        trainer.load_state(torch.load(args.out / "state.pt"))
    train(trainer, args, is_writer=rank == 0)


def train(trainer, args, is_writer):
    """Steps until `args.samples` are seen, with a checkpoint every `args.checkpoint_every` and at the end."""
    num_steps, batch_size = args.samples // args.batch_size, args.batch_size
    steps_between = max(1, args.checkpoint_every // batch_size)
    bar = tqdm(
        total=num_steps * batch_size,
        initial=trainer.step_idx * batch_size,
        unit=" samples",
        mininterval=5,
        disable=not is_writer,
    )
    loss = None
    while trainer.step_idx < num_steps:
        wait_while(args.pause_file)
        latest = trainer.step(num_steps)
        loss = latest if loss is None else 0.99 * loss + 0.01 * latest
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update(batch_size)
        if is_writer and (trainer.step_idx % steps_between == 0 or trainer.step_idx == num_steps):
            checkpoint(trainer, args.out, trainer.step_idx * batch_size)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-from", type=Path, required=True, help="folder of the pipeline to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints; an interrupted run goes on")
    parser.add_argument("--samples", type=int, required=True, help="training samples in all")
    parser.add_argument("--batch-size", type=int, default=32, help="over all processes; each share divides 2048")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=25_000, metavar="SAMPLES")
    parser.add_argument("--pause-file", type=Path, help="pause while this file exists")
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
