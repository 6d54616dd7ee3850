"""Generations of a denoiser that is patched and of its twin that is not, timed on all ranks together."""

import os
import statistics
import time

import measure
import prediction_cost
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler
from torch.distributed.device_mesh import DeviceMesh

import asyncdiff_fast
from asyncdiff_fast.environment import EXCHANGE_VARIABLE
from asyncdiff_fast.exchange.world import World

SPENT = prediction_cost.Spent()
# Seconds that ranks wait for each other.
PATIENCE_S = 600.0


def twin_of(denoiser):
    """The same denoiser once more, with the same weights."""
    with torch.device("meta"):
        twin = type(denoiser).from_config(denoiser.config)
    twin.load_state_dict(denoiser.state_dict(), assign=True)
    # Tables of positions may be in no state dict.
    for mine, theirs in zip(twin.modules(), denoiser.modules(), strict=True):
        mine._buffers.update(theirs._buffers)
    return twin.eval().requires_grad_(False)


class Loop:
    """A plain sampling loop with classifier-free guidance around a denoiser."""

    def __init__(self, denoiser, inputs, steps):
        self.denoiser, self.inputs = denoiser, dict(inputs)
        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )
        self.scheduler.set_timesteps(steps)
        self.latent_name = next(n for n in ("sample", "hidden_states") if n in inputs)
        self.times = iter(self.scheduler.timesteps)
        x = self.inputs[self.latent_name]
        self.latents = x[: x.shape[0] // 2 or 1].clone()

    def call(self):
        """One step of the generation."""
        t = next(self.times)
        batch = self.inputs[self.latent_name].shape[0]
        self.inputs[self.latent_name] = torch.cat([self.latents] * (batch // len(self.latents)))
        self.inputs["timestep"] = t.expand(self.inputs["timestep"].shape).to(self.inputs["timestep"])
        prediction = self.denoiser(**self.inputs)
        prediction = prediction[0] if isinstance(prediction, tuple) else prediction.sample
        if batch > len(self.latents):
            without, with_text = prediction.chunk(2)
            prediction = without + 5.0 * (with_text - without)
        self.latents = self.scheduler.step(prediction, t, self.latents, return_dict=False)[0]


def synchronised():
    """Time at which every rank has got here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def timed(loop, calls, active):
    """Seconds of each of `calls` steps of a loop; a rank that is not active sleeps meanwhile."""
    seconds = []
    began = synchronised()
    for _ in range(calls if active else 0):
        start = time.perf_counter()
        loop.call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return synchronised() - began, seconds


class Alone:
    """A denoiser patched for one device, on rank 0 only: what `patch` does for each device anyway."""

    def __init__(self, denoiser, inputs):
        self._denoiser, self._inputs, self._active = denoiser, inputs, dist.get_rank() == 0
        if self._active:
            one = DeviceMesh(next(denoiser.parameters()).device.type, [0], _init_backend=False)
            asyncdiff_fast.patch(denoiser, mesh=one)
        self.rounds = []
        # Weights are packed by the second call of a second generation.
        for _ in range(2):
            timed(self._loop(2), 2, self._active)

    def _loop(self, calls):
        return Loop(self._denoiser, self._inputs, calls)

    def round(self, calls):
        """Seconds of each of some calls; the other ranks sleep meanwhile. Collective."""
        loop = self._loop(calls + 1)
        timed(loop, 1, self._active)
        self.rounds.append(timed(loop, calls, self._active)[0] / calls)


class Patched:
    """A denoiser shared by all ranks, and what each round of it took."""

    def __init__(self, denoiser, inputs, config, exchange=None):
        self.denoiser, self.inputs, self.config = denoiser, inputs, config
        if exchange is not None:
            os.environ[EXCHANGE_VARIABLE] = exchange
        self.runtime = asyncdiff_fast.patch(denoiser, **config)
        self.together, self.warm, self.waits, self.cpu = [], [], [], []
        self.predicting = []
        # After a warm-up and two calls more there are plans, buffers and packed weights.
        loop = self.loop(2)
        self.first_warmup_s = self._warm_up(loop)
        timed(loop, 2, True)

    def loop(self, calls):
        """A new generation with `calls` steady calls."""
        return Loop(self.denoiser, self.inputs, self.config["warmup_steps"] + calls)

    def _warm_up(self, loop):
        return timed(loop, self.config["warmup_steps"], True)[0]

    def begin(self, loop):
        """Warm up, and count from there."""
        self.warm.append(self._warm_up(loop))
        self.runtime.clear_stats()

    def steady(self, loop, calls):
        """Of each of some calls together: seconds, this process' processor time, its time spent on prediction."""
        began, spent = time.process_time(), SPENT.seconds
        seconds, _ = timed(loop, calls, True)
        return seconds / calls, (time.process_time() - began) / calls, (SPENT.seconds - spent) / calls

    def ends(self, calls, seconds, cpu, predicting):
        """A round of `calls` is over; what each took."""
        self.together.append(seconds)
        self.cpu.append(cpu)
        self.predicting.append(predicting)
        self.waits.append(self.runtime.stats().get("wait_s", 0.0) / calls)


def one_round(patched, calls, folder):
    """A generation of one patched denoiser; a trace of its steady calls goes to `folder`."""
    loop = patched.loop(calls)
    patched.begin(loop)
    with profiler(folder):
        took = patched.steady(loop, calls)
    patched.ends(calls, *took)


def paired_round(pair, calls, folder, pairs):
    """A generation of each of two, call by call in turn, so that both see the same machine; (a, b) go to `pairs`."""
    # A scheduler that begins anew begins a generation of every denoiser, so both do so first.
    loops, took = [patched.loop(calls) for patched in pair], ([], [])
    for patched, loop in zip(pair, loops, strict=True):
        patched.begin(loop)
    with profiler(folder):
        for call in range(calls):
            for i in (0, 1) if call % 2 else (1, 0):
                took[i].append(pair[i].steady(loops[i], 1))
    for patched, mine in zip(pair, took, strict=True):
        patched.ends(calls, *(statistics.fmean(column) for column in zip(*mine, strict=True)))
    pairs += zip(*took, strict=True)


def compared(pairs):
    """How long calls of the second take, in units of the first's, call by call. Collective; None but on rank 0.

    Processor time is of all ranks together.
    """
    everyone = World(range(dist.get_world_size()), PATIENCE_S).gather(pairs, "the times of calls")
    if dist.get_rank():
        return None
    ratios = {"call": [second[0] / first[0] for first, second in pairs], "cpu": []}
    for turn in zip(*everyone, strict=True):
        ratios["cpu"].append(sum(second[1] for _, second in turn) / sum(first[1] for first, _ in turn))
    found = {"pairs": len(pairs)}
    for name, values in ratios.items():
        found |= {f"{name}_ratio": statistics.median(values), f"{name}_ratio_95": measure.median_interval(values)}
    return found


def profiler(folder):
    """A torch profiler that writes this rank's trace to a folder, or nothing."""
    if folder is None:
        return torch.autograd.profiler.profile(enabled=False)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"rank{dist.get_rank()}.json")
    return torch.profiler.profile(on_trace_ready=lambda p: p.export_chrome_trace(path))
