"""What one step of a sampler is given, and what of it the step before had returned."""

import functools
import inspect

import torch

OUTPUT, SAMPLE, TIMESTEP = "model_output", "sample", "timestep"


class Step:
    """One call of a scheduler's `step`: its arguments by name, and which of them are results of the step before.

    `links` is {name of an argument: place among those results}. `follows` is False where the sample is none of them:
    somebody has changed the latents in between.
    """

    def __init__(self, method, scheduler, args, kwargs, results=None):
        self._method, self._scheduler, self._as_given = method, scheduler, (args, kwargs)
        names = _names(method)
        self.named, self._unnamed = dict(zip(names, args, strict=False)) | kwargs, args[len(names) :]
        self.links = {}
        for name, x in self.named.items() if results else ():
            place = _place(x, results, name == SAMPLE)
            if place is not None:
                self.links[name] = place
        self.follows = results is None or SAMPLE in self.links

    @property
    def reason(self):
        """Why a step like this cannot be replayed, or None."""
        found = {name: self.named.get(name) for name in (OUTPUT, SAMPLE)}
        missing = [n for n, x in found.items() if not isinstance(x, torch.Tensor) or not x.is_floating_point()]
        if missing or self._unnamed:
            return f"{type(self._scheduler).__name__}.step takes no {' or '.join(missing)} of floating numbers"
        return None

    @property
    def output(self):
        """What the denoiser predicted, as it reached the step: after guidance."""
        return self.named[OUTPUT]

    @property
    def sample(self):
        """The latents at this step."""
        return self.named[SAMPLE]

    def run(self, output, results=None):
        """The step's result with another output of the denoiser, and with results of another step before.

        Returns: (what `step` returned, its tensors).
        """
        named = {**self.named, OUTPUT: output}
        for name, place in self.links.items() if results else ():
            named[name] = results[place].to(named[name])
        result = self._method(self._scheduler, **named)
        return result, tensors(result)

    def plain(self):
        """The step as it was given. Returns as `run`."""
        args, kwargs = self._as_given
        result = self._method(self._scheduler, *args, **kwargs)
        return result, tensors(result)


def tensors(result):
    """The results of a step in order, whatever it returns them in; `None` where one is no tensor."""
    if isinstance(result, torch.Tensor):
        return [result]
    if not isinstance(result, tuple):
        result = result.values() if hasattr(result, "values") else ()
    return [x if isinstance(x, torch.Tensor) else None for x in result]


@functools.cache
def _names(method):
    """The names of a step's arguments, in order, until one that has none."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return named if len(named) == len([p for p in parameters if p.kind is not p.KEYWORD_ONLY]) else []


def _place(x, results, by_value):
    """Where an argument stands among results: the same tensor, or with `by_value` one with its values."""
    if not isinstance(x, torch.Tensor):
        return None
    for place, y in enumerate(results):
        if y is x:
            return place
    for place, y in enumerate(results if by_value else ()):
        if y is not None and y.shape == x.shape and torch.equal(y.to(x), x):
            return place
    return None
