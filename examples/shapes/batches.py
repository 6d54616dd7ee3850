"""Training batches that depend on the seed and their number alone, so a run can stop and go on anywhere.

Pictures come in pools: one pool is drawn, encoded to latents, used a few times with other noise, and replaced.
"""

import random

import grammar
import torch
from render import render

POOL_PICTURES = 2048
POOL_USES = 4
CAPTION_DROPOUT = 0.1


class Batches:
    """`batches[i]` is batch number i: noisy latents, timesteps, caption tokens and the velocity to predict.

    Args:
        pipe: a StableDiffusionPipeline; its VAE, tokenizer and scheduler are used, its UNet is not.
        batch_size: divides 2048.
        seed: batches of different seeds share nothing.
    """

    def __init__(self, pipe, batch_size, seed):
        self.vae = pipe.vae.to(memory_format=torch.channels_last).eval()
        self.tokenizer = pipe.tokenizer
        self.alphas_cumprod = pipe.scheduler.alphas_cumprod
        self.batch_size, self.seed = batch_size, seed
        self.empty_tokens = self._tokens([""])
        self.pool_idx = None

    def __getitem__(self, batch_idx):
        """Returns: noisy (b, 8, 16, 16), timesteps (b,), tokens (b, 20), velocity (b, 8, 16, 16)."""
        per_use = POOL_PICTURES // self.batch_size
        self._fill_pool(batch_idx // (per_use * POOL_USES))
        generator = torch.Generator().manual_seed(_mix(self.seed, "batch", batch_idx))
        use_idx = batch_idx // per_use
        order = torch.randperm(POOL_PICTURES, generator=torch.Generator().manual_seed(_mix(self.seed, "use", use_idx)))
        start = batch_idx % per_use * self.batch_size
        picked = order[start : start + self.batch_size]

        tokens = self.tokens[picked]
        dropped = torch.rand(self.batch_size, 1, generator=generator) < CAPTION_DROPOUT
        tokens = torch.where(dropped, self.empty_tokens, tokens)
        clean = self.latents[picked]
        timesteps = _draw_timesteps(self.batch_size, generator)
        noise = torch.randn(clean.shape, generator=generator)
        signal = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
        return noisy, timesteps, tokens, velocity

    def _tokens(self, texts):
        return self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    @torch.no_grad()
    def _fill_pool(self, pool_idx):
        if pool_idx == self.pool_idx:
            return
        rng = random.Random(_mix(self.seed, "captions", pool_idx))
        captions = [grammar.sample(rng) for _ in range(POOL_PICTURES)]
        self.tokens = self._tokens([str(caption) for caption in captions])
        pictures = render(captions, seed=_mix(self.seed, "pictures", pool_idx))
        self.latents = torch.cat([self._encode(part) for part in pictures.split(64)])
        self.pool_idx = pool_idx

    def _encode(self, pictures):
        pixels = (pictures.float() / 127.5 - 1).to(memory_format=torch.channels_last)
        return self.vae.encode(pixels).latents.contiguous() * self.vae.config.scaling_factor


def _draw_timesteps(n, generator):
    """Half uniform, half around 550, where the layout and the shapes are decided; stratified within each half."""
    spread = (torch.arange(n) + torch.rand(n, generator=generator)) / n * 1000
    central = 550 + 180 * torch.randn(n, generator=generator)
    return torch.where(torch.arange(n) % 2 == 0, central, spread).long().clamp(0, 999)


def _mix(seed, purpose, idx):
    """A seed of its own for each use, the same in every process."""
    return random.Random(f"{seed} {purpose} {idx}").getrandbits(62)
