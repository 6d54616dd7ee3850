r"""Teaches the UNet of a shapes pipeline to say the same in another way: as noise, or as the velocity of a flow.

    python examples/shapes/train_forms.py --form epsilon --out build/shapes_epsilon

The start predicts velocities of noise that preserves the variance. A copy of its UNet learns to predict what the
start's velocity stands for: the noise ("epsilon"), or noise minus picture ("flow", at latents (1 - s) · picture + s ·
noise and timestep 1000 · s). Its pipeline has a sampler of that kind, with the same weights but for the UNet's. One
process, one thread; the result depends on form, start, seed, batch size and samples.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from batches import Batches
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from sampling import load
from tqdm import tqdm
from train import learning_rate

# Of a flow's batch, the share at more noise than the start has seen, where it takes latents for its noisiest ones.
BEYOND = 0.1


def scheduler(form, start):
    """The sampler of a pipeline that predicts in a form; `start` is the one of its start."""
    if form == "epsilon":
        return DDIMScheduler.from_config(start.config, prediction_type="epsilon")
    # Of first order it steps as FlowMatchEulerDiscreteScheduler does, and scales what this kind of pipeline asks it to.
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1)


def levels(form, timesteps, alphas_cumprod, beyond):
    """(alpha, sigma, what the UNet is told), each (n,), of latents alpha · picture + sigma · noise in a form.

    Args:
        timesteps: (n,), of the start.
        beyond: (n,) fp32 in 0..1, where a flow is to be noisier than the start's last timestep; elsewhere negative.
    """
    alpha, sigma = alphas_cumprod[timesteps].sqrt(), (1 - alphas_cumprod[timesteps]).sqrt()
    if form == "epsilon":
        return alpha, sigma, timesteps
    share = sigma / (alpha + sigma)
    noisiest = (1 - alphas_cumprod[-1]).sqrt() / (alphas_cumprod[-1].sqrt() + (1 - alphas_cumprod[-1]).sqrt())
    share = torch.where(beyond >= 0, noisiest + (1 - noisiest) * beyond, share)
    return 1 - share, share, 1000 * share


class Teacher:
    """`batches` of a start's pipeline with what it predicts, in another form."""

    def __init__(self, pipe, form, batches):
        self.pipe, self.form, self.batches = pipe, form, batches

    @torch.no_grad()
    def __getitem__(self, batch_idx):
        """Returns: latents (b, 8, 16, 16), what the UNet is told (b,), text (b, 20, width), what to predict."""
        noisy, timesteps, tokens, velocity = self.batches[batch_idx]
        generator = torch.Generator().manual_seed(batch_idx)
        drawn = torch.rand(2, len(noisy), generator=generator)
        beyond = torch.where(drawn[0] < BEYOND, drawn[1], -1.0)
        alphas_cumprod = self.pipe.scheduler.alphas_cumprod
        alpha, sigma = (x.view(-1, 1, 1, 1) for x in self._preserving(timesteps))
        clean, noise = alpha * noisy - sigma * velocity, sigma * noisy + alpha * velocity
        if self.form == "flow":
            timesteps = torch.where(beyond >= 0, len(alphas_cumprod) - 1, timesteps)
        to_clean, to_noise, told = levels(self.form, timesteps, alphas_cumprod, beyond)
        to_clean, to_noise = (x.view(-1, 1, 1, 1) for x in (to_clean, to_noise))
        latents = to_clean * clean + to_noise * noise
        text = self.pipe.text_encoder(tokens).last_hidden_state
        seen = latents / (to_clean**2 + to_noise**2).sqrt()
        said = self.pipe.unet(seen, timesteps, text).sample
        alpha, sigma = (x.view(-1, 1, 1, 1) for x in self._preserving(timesteps))
        if self.form == "epsilon":
            return latents, told, text, alpha * said + sigma * seen
        return latents, told, text, (latents - (alpha * seen - sigma * said)) / to_noise

    def _preserving(self, timesteps):
        signal = self.pipe.scheduler.alphas_cumprod[timesteps]
        return signal.sqrt(), (1 - signal).sqrt()


def train(pipe, form, num_steps, batch_size, seed, keep=0.995):
    """The averaged weights of a UNet in `form` after so many steps; `pipe` is the start, and stays."""
    pipe.unet.eval().requires_grad_(False)
    teacher = Teacher(pipe, form, Batches(pipe, batch_size, seed))
    net = copy.deepcopy(pipe.unet).train().requires_grad_(True)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    bar, loss = tqdm(range(num_steps), mininterval=5), None
    for step_idx in bar:
        latents, told, text, wanted = teacher[step_idx]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step_idx, num_steps)
        latest = F.mse_loss(net(latents, told, text).sample, wanted)
        optimizer.zero_grad()
        latest.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - keep)
        loss = latest.item() if loss is None else 0.98 * loss + 0.02 * latest.item()
        bar.set_postfix(loss=f"{loss:.5f}", refresh=False)
    return average


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-from", type=Path, default=Path(__file__).parent / "unet")
    parser.add_argument("--form", choices=("epsilon", "flow"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--samples", type=int, default=9600)
    parser.add_argument("--batch-size", type=int, default=8, help="divides 2048")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pipe = load(args.start_from)
    net = train(pipe, args.form, args.samples // args.batch_size, args.batch_size, args.seed)
    pipe.register_modules(unet=net, scheduler=scheduler(args.form, pipe.scheduler))
    pipe.save_pretrained(args.out)


if __name__ == "__main__":
    main()
