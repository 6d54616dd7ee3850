"""Where a denoiser's forward takes its latent and its timestep, found by the forward's signature; keys of calls."""

import dataclasses
import inspect

import torch
from torch.utils._pytree import tree_leaves, tree_map

from .containers import held

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")
# Those of Stable Cascade and of Wuerstchen.
_OTHER_NAMES = ("timestep_ratio", "r")
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def takes_timestep(module):
    """True if a module's forward has a parameter that is called as timesteps are."""
    return not {*TIMESTEP_NAMES, *_OTHER_NAMES}.isdisjoint(inspect.signature(type(module).forward).parameters)


class CallSignature:
    """Reads and replaces the latent and timestep arguments of one denoiser's calls.

    The timestep is the parameter with one of the usual names, else the second parameter; the latent is the first of
    the others.
    """

    def __init__(self, denoiser):
        # The class's forward: hooks may sit on the instance.
        parameters = list(inspect.signature(type(denoiser).forward).parameters.values())[1:]
        self.positional = [p.name for p in parameters if p.kind in _NAMED[:2]]
        names = [p.name for p in parameters if p.kind in _NAMED]
        if not names:
            # forward(*args): the first is the latent, the second the timestep.
            names = self.positional = ["argument 0", "argument 1"]
        second = names[1] if len(names) > 1 else None
        self.timestep_name = next((n for n in names if n in TIMESTEP_NAMES), second)
        self.latent_name = next((n for n in names if n != self.timestep_name), None)

    def _get(self, name, args, kwargs):
        if name in kwargs:
            return kwargs[name]
        index = self.positional.index(name) if name in self.positional else len(args)
        return args[index] if index < len(args) else None

    def named(self, args, kwargs):
        """One call's arguments as a dict; those that the signature does not name are called by their place."""
        names = [*self.positional, *(f"argument {i}" for i in range(len(self.positional), len(args)))]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    @staticmethod
    def as_call(named, args, kwargs):
        """What `named` gives as a dict, as (args, kwargs) in the form of those given."""
        return tuple(list(named.values())[: len(args)]), {name: named[name] for name in kwargs}

    def latent_in(self, named):
        """The name under which `named` gives the latent."""
        return self.latent_name if self.latent_name in named else next(iter(named))

    def latent(self, args, kwargs):
        """The latent (a tensor, or a list of tensors) of one call; without named parameters, the first argument."""
        if self.latent_name is None:
            return args[0] if args else None
        return self._get(self.latent_name, args, kwargs)

    def timestep(self, args, kwargs):
        """The timestep of one call (a tensor or a number), None if the call has none."""
        return self._get(self.timestep_name, args, kwargs)

    def with_timestep(self, args, kwargs, timestep):
        """(args, kwargs) with the timestep replaced."""
        return self._with(self.timestep_name, args, kwargs, timestep)

    def with_latent(self, args, kwargs, latent):
        """(args, kwargs) with the latent replaced."""
        return self._with(self.latent_name, args, kwargs, latent)

    def _with(self, name, args, kwargs, value):
        if name in kwargs:
            return args, {**kwargs, name: value}
        index = 0 if name is None else self.positional.index(name)
        return (*args[:index], value, *args[index + 1 :]), kwargs


def copied(args, kwargs):
    """(args, kwargs) in containers of their own: a forward may take things out of those it is given."""
    return tree_map(lambda x: x, (args, kwargs))


def numbers_of(named, timestep_name):
    """The plain numbers among a call's arguments but for the timestep, which positions may follow from."""
    leaves = tree_leaves({name: x for name, x in named.items() if name != timestep_name})
    return tuple(x for x in leaves if type(x) in (int, float))


def device_of(args, kwargs):
    """Device of the first tensor of a call's arguments, or None."""
    return next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)), None)


def inputs_key(args, kwargs):
    """Changes when cached values no longer fit: structure, shapes, dtypes and flags of the inputs, not numbers."""
    where = device_of(args, kwargs)
    kind = "cpu" if where is None else where.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return autocast, _key((args, kwargs))


def _key(x):
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.dtype, x.device
    if isinstance(x, list | tuple):
        return tuple(_key(item) for item in x)
    if isinstance(x, dict):
        return tuple((name, _key(item)) for name, item in sorted(x.items()))
    if isinstance(x, bool | str) or x is None:
        return x
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return type(x).__name__, tuple(_key(getattr(x, f.name, None)) for f in dataclasses.fields(x))
    return type(x).__name__, _key(held(x))
