"""Calls of a denoiser as CUDA graphs: captured once for each kind of call, then replayed.

Launched one by one, the kernels of a call can take the host longer than the device; a replayed graph is one launch. Its
kernels read and write the same memory each time: the arguments of a call are copied into tensors that stay, and its
results out of them. The first calls of a kind (`kinds.py`) are launched, which compiles, measures and chooses; the next
is captured (`capture.py`): whole on one device, in pieces where stages or patches post and wait in it. What depends on
nothing that changes in every call, such as the text's keys and values, has a graph of its own (`pinned.py`). Graphs
share one pool of memory.
"""

import contextlib
import functools
import gc
import logging
from collections import OrderedDict

import torch
from torch.utils._pytree import tree_flatten

from ..modules import step_cache, structure
from . import capture
from .kinds import NUMBERS, Kind, copied, foreign_hook, key_of, place_for, uncached_casts
from .pinned import Pinned
from .repeatable import stranger

log = logging.getLogger(__name__)
# Kinds of calls that are kept for each caller, such as those of several sizes.
KEPT = 8


class Graphs:
    """The captured calls of one denoiser.

    Args:
        signature: the denoiser's `CallSignature`; projections: its `Projections`.
        first: context in which the first calls of a kind are launched.
        cautious: True launches what somebody else's modules might make another call of each time.
        captures: what captures, a `Capture`.
    """

    def __init__(self, denoiser, signature, projections, first=contextlib.nullcontext, cautious=False, captures=None):
        self._denoiser, self._signature, self._projections = denoiser, signature, projections
        self._first, self._cautious, self._stranger = first, cautious, None
        self._captures = captures or capture.CudaGraphs()
        self._kinds, self._state, self._told = OrderedDict(), None, set()
        self.captured = self.replayed = 0

    @property
    def outside(self):
        """What a call does that no graph may hold: see `Capture.outside`."""
        return self._captures.outside

    def begin(self):
        """A generation begins: graphs of other modules, or of weights that lie elsewhere now, are forgotten."""
        tensors = (*self._denoiser.parameters(), *self._denoiser.buffers())
        state = structure(self._denoiser), hash(tuple(x.data_ptr() for x in tensors))
        if state != self._state:
            self._kinds.clear()
            self._state = state
        self._stranger = stranger(self._denoiser) if self._cautious else None
        for kind in self._kinds.values():
            if kind.pinned is not None:
                kind.pinned.forget()

    def call(self, forward, args, kwargs, of=None, launches=1):
        """What `forward(*args, **kwargs)` returns, in new tensors.

        Args:
            of: whose call it is, where several make calls that differ in more than their arguments; hashable. None: a
                call that no other rank has a part in.
            launches: how many calls of a kind are launched before one is captured.
        """
        leaves, tree = self._leaves(args, kwargs)
        refusal = self._why_not(leaves)
        if refusal:
            return self._launched(refusal, forward, args, kwargs)
        key = of, *key_of(tree, leaves, self._captures.device_type)
        kind = self._kind(key, tree, leaves)
        if kind.refused:
            return forward(*args, **kwargs)
        given = [x for x in leaves if isinstance(x, torch.Tensor)]
        for held, x in zip(kind.inputs, given, strict=True):
            held.copy_(x)
        call = functools.partial(self._run, kind, forward, *kind.arguments(leaves, tree))
        if kind.launches < launches:
            if kind.launches and kind.pinned is not None and not kind.pinned.is_of(kind.inputs, given):
                kind.pinned.make()
            try:
                result = copied(self._recorded(kind, call))
            except BaseException:
                # The next one is the first.
                self._kinds.pop(key, None)
                raise
            kind.launches += 1
            return result
        if kind.replay is None:
            try:
                self._capture(kind, call, alone=of is None)
            except Exception as error:
                kind.refuse()
                return self._launched(f"{type(error).__name__}: {error}".splitlines()[0], forward, args, kwargs)
        if kind.make is not None and not kind.pinned.is_of(kind.inputs, given):
            kind.make()
        kind.replay()
        self.replayed += 1
        return copied(kind.result)

    def _run(self, kind, forward, args, kwargs):
        """The forward of one kind of call, with its arguments that stay."""
        if kind.pinned is not None:
            kind.pinned.look()
            forward = self._projections.with_pinned(kind.pinned, forward)
        return forward(*args, **kwargs)

    def _recorded(self, kind, call):
        """The result of a first call of a kind, which is launched."""
        with self._first(), kind.pinned.recording() if kind.pinned is not None else contextlib.nullcontext():
            return call()

    def _capture(self, kind, call, alone):
        hook = foreign_hook(self._denoiser)
        if hook:
            raise RuntimeError(hook)
        # Calls hold much of the device's memory, and what holds calls may be in cycles.
        gc.collect()
        if alone:
            self._captures.tidy()
        with torch.cuda.device_of(kind.inputs[0]), uncached_casts():
            if kind.pinned is not None and kind.pinned.nbytes:
                kind.make, _ = self._captures.capture(kind.pinned.make)
            kind.replay, kind.result = self._captures.capture(call)
        self._check(kind.result)
        self.captured += 1

    def summary(self):
        """Dict, fit for JSON: how many kinds of calls were captured, how often one was replayed, why others not."""
        return {"captured": self.captured, "replayed": self.replayed, "refused": sorted(self._told)}

    def forget(self, of=None):
        """Free every graph, or those of one caller."""
        for key in [key for key in self._kinds if of is None or key[0] == of]:
            del self._kinds[key]

    def _leaves(self, args, kwargs):
        """The arguments as a flat list; the timestep, which changes at every step, is a tensor on the device there."""
        timestep = self._signature.timestep(args, kwargs)
        number = isinstance(timestep, int | float) and not isinstance(timestep, bool)
        if number or (isinstance(timestep, torch.Tensor) and timestep.device.type != self._captures.device_type):
            where = next((x.device for x in tree_flatten((args, kwargs))[0] if self._is_there(x)), None)
            if where is not None:
                # As the models themselves make a tensor of a number.
                dtype = torch.float64 if isinstance(timestep, float) else None
                timestep = torch.as_tensor(timestep, dtype=dtype, device=where)
                args, kwargs = self._signature.with_timestep(args, kwargs, timestep)
        return tree_flatten((args, kwargs))

    def _is_there(self, x):
        return isinstance(x, torch.Tensor) and x.device.type == self._captures.device_type

    def _why_not(self, leaves):
        """Why a call cannot be captured; None if it may be tried."""
        elsewhere = [x for x in leaves if isinstance(x, torch.Tensor) and not self._is_there(x)]
        if elsewhere or not any(map(self._is_there, leaves)):
            return f"an argument is on {elsewhere[0].device if elsewhere else 'no device'}"
        odd = [x for x in leaves if not isinstance(x, (torch.Tensor, *NUMBERS))]
        if odd:
            return f"an argument is a {type(odd[0]).__name__}"
        if self._denoiser.training:
            return "the denoiser is in training mode"
        if step_cache(self._denoiser):
            return "a step cache of diffusers is enabled"
        return self._stranger

    def _kind(self, key, tree, leaves):
        """The `Kind` of a call, the one used last."""
        if key not in self._kinds:
            self._kinds[key] = self._made(tree, leaves)
        self._kinds.move_to_end(key)
        of_one = [other for other in self._kinds if other[0] == key[0]]
        for oldest in of_one[:-KEPT]:
            del self._kinds[oldest]
        return self._kinds[key]

    def _made(self, tree, leaves):
        hook = foreign_hook(self._denoiser)
        if hook:
            self.tell(hook)
            return Kind([], refused=True)
        # Ordinary tensors, whatever mode this call runs in: they are written in later ones too.
        with torch.inference_mode(False):
            kind = Kind([place_for(x) for x in leaves if isinstance(x, torch.Tensor)])
        if self._projections.active:
            call = kind.arguments(leaves, tree)
            kind.pinned = Pinned(call, self._signature.latent(*call))
        return kind

    def _check(self, result):
        """Raises: TypeError if there is anything in a result but tensors and plain values."""
        odd = [x for x in tree_flatten(result)[0] if not isinstance(x, (torch.Tensor, *NUMBERS))]
        if odd:
            raise TypeError(f"the denoiser returns a {type(odd[0]).__name__}")

    def _launched(self, why, forward, args, kwargs):
        self.tell(why)
        return forward(*args, **kwargs)

    def tell(self, why):
        """Log, once, why calls are launched kernel by kernel; `summary` has it too."""
        if why not in self._told:
            self._told.add(why)
            level, given = (logging.INFO, "graphs=auto") if self._cautious else (logging.WARNING, "graphs=True")
            log.log(level, "%s: %s is launched kernel by kernel: %s", given, type(self._denoiser).__name__, why)


def wanted(denoiser, config, device_type):
    """Whether the calls of a denoiser are to be captured: by the options or, where they leave it open, what it is."""
    if config.graphs != "auto":
        return config.graphs
    whole = config.num_stages == config.num_patches == 1
    return whole and device_type == capture.CudaGraphs.device_type and stranger(denoiser) is None
