"""What ranks compare while a generation begins, so that none draws another picture without a word.

At the first call: the denoiser's inputs, the pipeline's and the scheduler's settings, weights written since `patch`,
and torch's own random numbers, which all get from rank 0. At the second step: what the first one made of it all.
"""

import logging
import zlib

import torch
from torch.utils._pytree import tree_leaves

from .calls.watch import last_drawn, last_numbers, last_scheduler, random_states
from .exchange import fingerprint
from .modules import structure, told, torch_hooks

log = logging.getLogger(__name__)
# How far latents of two ranks may be after one step, of their spread: devices may round differently.
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}
CLOSE_IN_HALF = 2e-2
# Numbers of a latent that are compared.
SAMPLE = 256
# Attributes of a pipeline that are no settings: how far it is, and whether it is stopped.
_NO_SETTINGS = ("_interrupt", "_current_timestep")


class Alike:
    """The comparisons of one denoiser's ranks.

    Args:
        world: all of them.
        pipeline: returns the pipeline, None where there is none.
        scheduler: the caller's, None for the last one of diffusers that this thread has used.
    """

    def __init__(self, world, denoiser, pipeline, scheduler=None):
        self._world, self._pipeline, self._scheduler = world, pipeline, scheduler
        self._model = AlikeModel(world, denoiser, "denoiser")
        self._passing = self._drawn = None

    def report(self, named):
        """What this rank tells at the first call, of which `named` are the arguments."""
        return {
            "inputs": fingerprint.input_digests(named),
            "settings": _of_scheduler(self._scheduler or last_scheduler()),
            "told": _settings(self._pipeline()),
            "model": self._model.report(),
            "random": [zlib.crc32(state) for state in random_states()],
        }

    @property
    def structure(self):
        """`modules.structure` of the denoiser, as it was last reported."""
        return self._model.structure

    def check_hooks(self, reports, run):
        """See `AlikeModel.check_hooks`. Collective."""
        self._model.check_hooks([report["model"] for report in reports], run)

    def check(self, reports):
        """Compare what all ranks tell. Collective, all alike. Raises: ValueError that names what differs."""
        first, names = reports[0], self._world.ranks
        for rank, theirs in zip(names, reports, strict=True):
            different = _differing(first["inputs"], theirs["inputs"])
            if different:
                raise ValueError(
                    f"every rank must call the denoiser with the same inputs: {', '.join(different)} differ between "
                    f"rank {names[0]} and rank {rank}; use the same prompt, size and seed on all ranks "
                    "(generator=torch.Generator().manual_seed(0))"
                )
        for rank, theirs in zip(names, reports, strict=True):
            _refuse_settings(first["settings"], theirs["settings"], names[0], rank)
            # Another pipeline may call, and the one that was patched be gone on one rank, or never have been called.
            both = first["told"].keys() & theirs["told"].keys()
            told = [{name: report["told"][name] for name in both} for report in (first, theirs)]
            _refuse_settings(*told, names[0], rank)
        self._model.check([report["model"] for report in reports])
        if any(report["random"] != first["random"] for report in reports):
            log.info("torch's own random numbers differed between ranks: all go on with those of rank %s", names[0])
            share_seeds(self._world)
        if self._passing is not None:
            self._passing.forget()
        self._passing, self._drawn = self._world.passing(), last_drawn()

    def check_draws(self, step):
        """Tell which random numbers of torch's own the last step has drawn, and hear of the others. Never waits.

        Raises: ValueError if they were not the same.
        """
        drawn = last_drawn()
        if drawn is not self._drawn:
            self._drawn = drawn
            self._passing.tell(step, drawn)
        found = self._passing.look()
        if found is not None:
            raise ValueError(
                f"every rank must draw the same random numbers: before step {found[0]} the scheduler drew others on "
                f"rank {self._world.name} than on rank {found[1]}; something else has drawn from torch's own generator "
                "on one of them only: give the pipeline, and what draws beside it, generators of their own"
            )

    def check_step(self, latent, which="first"):
        """Compare what the first step, or all but the last, has made of the latents. Collective. Raises: ValueError."""
        tensor = next((x for x in latent if isinstance(x, torch.Tensor)), None) if isinstance(latent, list) else latent
        told = [_sample(tensor)] if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else []
        # A callback may have changed the pipeline's settings as well, its guidance say.
        reports = self._world.gather((_settings(self._pipeline()) | last_numbers(), told), f"the {which} step")
        names, when = self._world.ranks, "after the first" if which == "first" else "before the last"
        for rank, (settings, theirs) in zip(names, reports, strict=True):
            both = reports[0][0].keys() & settings.keys()
            _refuse_settings(*({n: x[n] for n in both} for x in (reports[0][0], settings)), names[0], rank)
            worst = max((_distance(a, b) for a, b in zip(reports[0][1], theirs, strict=True)), default=0.0)
            if not worst <= (CLOSE.get(tensor.dtype, CLOSE_IN_HALF) if told else 0.0):
                raise ValueError(
                    f"every rank must make the same of a step: latents of rank {names[0]} and rank {rank} differ by "
                    f"{worst:.1e} of their spread {when} one; use the same guidance, scheduler and "
                    "callbacks, and a generator of the same seed for what the scheduler draws, on all ranks"
                )


class AlikeModel:
    """The comparisons of one model, such as a denoiser, as ranks meet: its modules, and its weights.

    Args:
        world: all ranks that hold it.
        what: names it in errors.
    """

    def __init__(self, world, model, what):
        self._world, self._model, self._what = world, model, what
        self._weights, self.structure = fingerprint.Weights(model), structure(model)
        # As it was when ranks were last found alike, and every rank's hooks.
        self._was, self._hooks = self.structure, []

    def report(self):
        """What this rank tells of it: (whether modules were changed, a digest of them), what of its weights, its hooks.

        From here on `structure` is of these modules.
        """
        self.structure = structure(self._model)
        changed = self.structure != self._was
        return (changed, told(self._model)), self._weights.report(), torch_hooks(self._model)

    def check(self, reports):
        """Compare what all ranks tell. Collective, all alike. Raises: ValueError that names what differs.

        What differs is told again the next time, unless it was put right.
        """
        first, names = reports[0][0], self._world.ranks
        for rank, (theirs, *_) in zip(names, reports, strict=True):
            if (theirs[0] or first[0]) and theirs != first:
                raise ValueError(
                    f"every rank must run the same {self._what}: modules, attention processors, adapters or hooks of "
                    f"rank {names[0]} and rank {rank} differ since patch() or the last call; change them alike on all "
                    "ranks"
                )
        self._check_weights([weights for _, weights, _ in reports])
        self._was = self.structure
        self._weights.accept()

    def check_hooks(self, reports, run):
        """Hooks of torch's may be of one rank alone, if they change nothing. Collective. Raises: ValueError if they do.

        Args:
            run: gives what the whole model returns; asked where ranks have other hooks, and other ones than before.
        """
        hooks, names = [hooks for *_, hooks in reports], self._world.ranks
        if len(set(hooks)) > 1 and hooks != self._hooks:
            tensors = [x for x in tree_leaves(run()) if isinstance(x, torch.Tensor) and x.is_floating_point()]
            close = min((CLOSE.get(x.dtype, CLOSE_IN_HALF) for x in tensors), default=0.0)
            samples = self._world.gather([_sample(x) for x in tensors], "what hooks change")
            for rank, theirs in zip(names, samples, strict=True):
                if any(_distance(a, b) > close for a, b in zip(samples[0], theirs, strict=True)):
                    raise ValueError(
                        f"every rank must run the same {self._what}: torch's hooks on modules of rank {names[0]} and "
                        f"rank {rank} change what it returns; register the same on all ranks"
                    )
        self._hooks = hooks

    def _check_weights(self, reports):
        """Where some were written, every bit is compared."""
        digests = [sample for _, sample in reports]
        if any(written for written, _ in reports):
            digests = self._world.gather(self._weights.digest(), "the weights")
        known = [digest for digest in digests if digest is not None]
        if len(known) == len(digests) and len(set(known)) > 1:
            other = next(r for r, d in zip(self._world.ranks, digests, strict=True) if d != digests[0])
            raise ValueError(
                f"every rank must hold the same weights: those of the {self._what} of rank {self._world.ranks[0]} and "
                f"rank {other} differ since patch(); load the same weights and adapters on all ranks"
            )


def share_seeds(world):
    """Set the default generators of all ranks to rank 0's state: without a generator argument, all draw the same."""
    if world.size == 1:
        return
    states = world.broadcast(random_states(), "seeds")
    cpu_state, *cuda_state = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states]
    torch.set_rng_state(cpu_state)
    if cuda_state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda_state[0])


def _plain(value):
    return value is None or isinstance(value, bool | int | float | str)


def _settings(pipe):
    """{name: text} of what a call of the pipeline was told, such as its guidance scale."""
    return {
        name[1:]: repr(value)
        for name, value in (vars(pipe) if pipe is not None else {}).items()
        if name.startswith("_") and name not in _NO_SETTINGS and _plain(value)
    }


def _of_scheduler(scheduler):
    """{name: text} of a scheduler's class and configuration, and of its list of timesteps."""
    if scheduler is None:
        return {}
    config = {k: v for k, v in dict(getattr(scheduler, "config", {})).items() if not k.startswith("_")}
    found = {"scheduler": type(scheduler).__name__}
    found |= {f"scheduler.config.{name}": _short(repr(value)) for name, value in config.items()}
    timesteps = getattr(scheduler, "timesteps", None)
    if isinstance(timesteps, torch.Tensor):
        found["scheduler.timesteps"] = _short(repr(timesteps.tolist()))
    return found


def _short(text):
    return text if len(text) <= 80 else f"{text[:60]}… ({zlib.crc32(text.encode()):08x})"


def _differing(a, b):
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


def _refuse_settings(first, theirs, name, other):
    different = _differing(first, theirs)
    if different:
        shown = ", ".join(
            f"{n} is {first.get(n)} on rank {name} and {theirs.get(n)} on rank {other}" for n in different
        )
        raise ValueError(f"every rank must call the pipeline alike: {shown}")


def _sample(tensor):
    """Some numbers of a tensor, its mean and its spread."""
    flat = tensor.detach().reshape(-1).double()
    some = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE]
    return [*torch.cat((some, flat.mean()[None], flat.std(correction=0)[None])).tolist()]


def _distance(a, b):
    """The largest difference between two samples, of the spread of the first."""
    if len(a) != len(b):
        return float("inf")
    differences = [abs(x - y) for x, y in zip(a, b, strict=True) if repr(x) != repr(y)]
    # What is not a number on one of them is no distance at all; on all of them it is the same picture.
    return max((d if d == d else float("inf") for d in differences), default=0.0) / max(1e-12, a[-1])
