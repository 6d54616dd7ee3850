"""In which form a denoiser's next outputs are best expected: `python benchmarks/steps_forms.py NAME=FOLDER … [--save]`.

Steps side by side by the package's own rule, in one process that evaluates all ranks' steps, for each of some trained
pipelines: outputs are compared as they are, or as the picture or the noise that they stand for; or the newest picture
is what is expected. Pictures are drawn each on its own, and compared with exact sampling. The pipelines are of
examples/shapes: `unet`, and what `train_forms.py` makes of it.
"""

import argparse
import copy
from pathlib import Path
from types import SimpleNamespace

import measure
import torch
from quality import GUIDANCE, captions_and_seeds, load
from quality_steps import TOLERANCES

from asyncdiff_fast.config import STEPS_WARMUP
from asyncdiff_fast.steps.block import relative_error
from asyncdiff_fast.steps.lengths import Lengths
from asyncdiff_fast.steps.levels import Level, level
from asyncdiff_fast.steps.outputs import Evaluated, Outputs

import metrics  # isort: skip

# {form: what of the picture and what of the noise it is made of, given alpha and sigma}; None: the output as it is
FORMS = {
    "picture": lambda alpha, sigma: (1.0, 0.0),
    "output": None,
    "noise": lambda alpha, sigma: (0.0, 1.0),
    "picture, newest": lambda alpha, sigma: (1.0, 0.0),
}
RUNS = (50, 25)


def compared(form, at):
    """A `Level` whose "picture" is the form in which an output is compared with others; None: as it is."""
    if FORMS[form] is None:
        return None
    picture, noise = FORMS[form](at.alpha, at.sigma)
    # noise = (latents - alpha · picture) / sigma
    share = picture - noise * at.alpha / at.sigma
    return Level(at.alpha, at.sigma, share * at.of_sample + noise / at.sigma, share * at.of_output)


class Expected(Outputs):
    """The newest outputs, compared in a form."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def add(self, said):
        if self.form.endswith("newest"):
            self._newest = []
        super().add(Evaluated(said.output, said.sample, compared(self.form, said.level)))

    def step(self, number, scheduler, timestep, latents):
        """The latents that an expected output leads to."""
        like = Evaluated(latents, latents, compared(self.form, level(scheduler, timestep)))
        return stepped(scheduler, self.ahead(number, like), timestep, latents)


def stepped(scheduler, output, timestep, latents):
    return scheduler.step(output, timestep, latents, return_dict=False)[0]


def walk(scheduler, latents, form, ranks, tolerance):
    """One picture's steps: yields [(latents, timestep) to be evaluated side by side], is sent [outputs].

    Returns: (latents, calls that were waited for).
    """
    lengths, outputs = Lengths(ranks, STEPS_WARMUP, tolerance), Expected(form)
    step, calls, timesteps = 0, 0, scheduler.timesteps
    while step < len(timesteps):
        length = lengths.at(step, len(timesteps) - step)
        ahead, places = copy.deepcopy(scheduler), [latents]
        asked = [(ahead.scale_model_input(latents, timesteps[step]), timesteps[step])]
        # What is learned of an exact step is how far its result would have been off.
        for i in range(max(length - 1, 1) if outputs else 0):
            places.append(outputs.step(i + 1, ahead, timesteps[step + i], places[-1]))
            if i + 1 < length:
                t = timesteps[step + i + 1]
                asked.append((ahead.scale_model_input(places[-1], t), t))
        errors = []
        for (_, t), place, output in zip(asked, places, (yield asked), strict=False):
            said = Evaluated(output, place, level(scheduler, t)).at(latents)
            outputs.add(said)
            scheduler.scale_model_input(latents, t)
            latents = stepped(scheduler, said.output, t, latents)
            if len(errors) + 1 < len(places):
                errors.append(float(relative_error(places[len(errors) + 1], latents)))
        if errors:
            lengths.learn(errors[-1], len(errors))
        step, calls = step + length, calls + 1
    return latents, calls


class Pictures:
    """Pictures of the first held-out prompts, drawn by one pipeline."""

    def __init__(self, folder, prompts):
        self.pipe = load(folder)
        captions, self.seeds = captions_and_seeds(SimpleNamespace(prompts=prompts, seeds=1))
        with torch.no_grad():
            text = self.pipe.encode_prompt([str(caption) for caption in captions], "cpu", 1, True)
        self.conditional, self.unconditional = text[:2]

    @torch.no_grad()
    def draw(self, steps, form, ranks, tolerance):
        """(pictures (n, 3, h, w) numpy in 0..1, calls of each)."""
        shape = (1, self.pipe.unet.config.in_channels, *[self.pipe.unet.config.sample_size] * 2)
        walks = []
        for seed in self.seeds:
            scheduler = copy.deepcopy(self.pipe.scheduler)
            scheduler.set_timesteps(steps)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            walks.append(walk(scheduler, noise * scheduler.init_noise_sigma, form, ranks, tolerance))
        asked, done = {i: next(one) for i, one in enumerate(walks)}, {}
        while asked:
            outputs = iter(self._evaluate([(i, *one) for i, many in asked.items() for one in many]))
            for i, many in list(asked.items()):
                try:
                    asked[i] = walks[i].send([next(outputs) for _ in many])
                except StopIteration as end:
                    done[i] = end.value
                    del asked[i]
        latents, calls = zip(*(done[i] for i in range(len(walks))), strict=True)
        vae = self.pipe.vae
        pictures = vae.decode(torch.cat(latents) / vae.config.scaling_factor).sample
        return (pictures / 2 + 0.5).clamp(0, 1).numpy(), calls

    def _evaluate(self, asked):
        outputs = []
        for start in range(0, len(asked), 16):
            which, latents, timesteps = zip(*asked[start : start + 16], strict=True)
            text = torch.cat((self.unconditional[list(which)], self.conditional[list(which)]))
            latents, timesteps = torch.cat(latents).repeat(2, 1, 1, 1), torch.stack(timesteps).repeat(2)
            without, with_text = self.pipe.unet(latents, timesteps, text).sample.chunk(2)
            outputs += (without + GUIDANCE * (with_text - without)).split(1)
        return outputs


def rows(name, folder, args):
    """Yields one row for each form, number of steps and number of ranks."""
    pictures = Pictures(folder, args.prompts)
    for steps in args.steps:
        exact, _ = pictures.draw(steps, "output", 1, 0.0)
        for ranks, tolerance in TOLERANCES[steps].items():
            for form in args.forms:
                drawn, calls = pictures.draw(steps, form, ranks, tolerance)
                psnr = metrics.psnr(drawn, exact)
                yield {
                    "model": name,
                    "form": form,
                    "steps": steps,
                    "ranks": ranks,
                    "tolerance": tolerance,
                    "prompts": args.prompts,
                    "psnr_db": {"mean": float(psnr.mean()), "worst": float(psnr.min())},
                    "calls": {"mean": sum(calls) / len(calls), "most": max(calls)},
                }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="such as velocity=examples/shapes/unet")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=RUNS, choices=TOLERANCES)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--save", action="store_true", help="append rows to benchmarks/results/steps_forms.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.models:
        name, _, folder = model.partition("=")
        for row in rows(name, Path(folder), args):
            print(row, flush=True)
            if args.save:
                measure.write_row("steps_forms", row)


if __name__ == "__main__":
    main()
