"""Whole calls of a denoiser as CUDA graphs: captured once for each kind of call, then replayed.

Launched one by one, the kernels of a call can take the host longer than the device; a replayed graph is one launch. Its
kernels read and write the same memory each time: the arguments of a call are copied into tensors that stay, and its
results out of them. Calls are of one kind if only the numbers in their tensors differ, and the timestep. The first of a
kind is launched, which compiles, measures and chooses; the second is captured. What depends on nothing that changes in
every call, such as the text's keys and values, has a graph of its own (`pinned.py`). Graphs share one pool of memory.
"""

import contextlib
import functools
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..hooks import ForwardHook
from ..modules import step_cache, structure
from .pinned import Pinned
from .repeatable import stranger

log = logging.getLogger(__name__)
# Kinds of calls that are kept, such as those of several sizes.
KEPT = 8
_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class CudaGraphs:
    """Captures on a GPU."""

    device_type = "cuda"

    def __init__(self):
        self._pool = None

    def capture(self, call):
        """(function that replays, result that it writes) of a call, which has run before and does not run now."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may go on.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = call()
        return graph.replay, result


@dataclass
class _Kind:
    """One kind of call: `inputs` are the tensors that stay, `replay` is None until it was captured.

    `make` fills what is `pinned`, if there is anything.
    """

    inputs: list
    pinned: Any = None
    make: Any = None
    replay: Any = None
    result: Any = None
    refused: bool = False


class Graphs:
    """The captured calls of one denoiser.

    Args:
        signature: the denoiser's `CallSignature`; projections: its `Projections`.
        first: context in which the first call of a kind is launched.
        cautious: True launches what somebody else's modules might make another call of each time.
        captures: what captures, as `CudaGraphs`.
    """

    def __init__(self, denoiser, signature, projections, first=contextlib.nullcontext, cautious=False, captures=None):
        self._denoiser, self._signature, self._projections = denoiser, signature, projections
        self._first, self._cautious, self._stranger = first, cautious, None
        self._captures = captures or CudaGraphs()
        self._kinds, self._state, self._told = OrderedDict(), None, set()
        self.captured = self.replayed = 0

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

    def call(self, forward, *args, **kwargs):
        """What `forward(*args, **kwargs)` returns, in new tensors."""
        leaves, tree = self._leaves(args, kwargs)
        launched = self._projections.during(forward, self._signature.latent)
        refusal = self._why_not(leaves)
        if refusal:
            return self._launched(refusal, launched, args, kwargs)
        kind, known = self._kind(tree, leaves)
        if kind.refused:
            return launched(*args, **kwargs)
        given = [x for x in leaves if isinstance(x, torch.Tensor)]
        for held, x in zip(kind.inputs, given, strict=True):
            held.copy_(x)
        call = functools.partial(self._run, kind, forward, *tree_unflatten(_put_in(leaves, kind.inputs), tree))
        if not known:
            try:
                return _copied(self._recorded(kind, call))
            except BaseException:
                # The next one is the first.
                self._kinds.popitem()
                raise
        if kind.replay is None:
            try:
                self._capture(kind, call)
            except Exception as error:
                vars(kind).update(vars(_Kind([], refused=True)))
                return self._launched(f"{type(error).__name__}: {error}".splitlines()[0], launched, args, kwargs)
        if kind.make is not None and not kind.pinned.is_of(kind.inputs, given):
            kind.make()
        kind.replay()
        self.replayed += 1
        return _copied(kind.result)

    def _run(self, kind, forward, args, kwargs):
        """The forward of one kind of call, with its arguments that stay."""
        if kind.pinned is not None:
            kind.pinned.look()
            forward = self._projections.with_pinned(kind.pinned, forward)
        return forward(*args, **kwargs)

    def _recorded(self, kind, call):
        """The result of the first call of a kind, which is launched."""
        with self._first(), kind.pinned.recording() if kind.pinned is not None else contextlib.nullcontext():
            return call()

    def _capture(self, kind, call):
        hook = _hook(self._denoiser)
        if hook:
            raise RuntimeError(hook)
        if kind.pinned is not None and kind.pinned.nbytes:
            kind.make, _ = self._captures.capture(kind.pinned.make)
        kind.replay, kind.result = self._captures.capture(call)
        self._check(kind.result)
        self.captured += 1

    def summary(self):
        """Dict, fit for JSON: how many kinds of calls were captured, how often one was replayed, why others not."""
        return {"captured": self.captured, "replayed": self.replayed, "refused": sorted(self._told)}

    def forget(self):
        """Free every graph."""
        self._kinds.clear()

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
        odd = [x for x in leaves if not isinstance(x, (torch.Tensor, *_NUMBERS))]
        if odd:
            return f"an argument is a {type(odd[0]).__name__}"
        if self._denoiser.training:
            return "the denoiser is in training mode"
        if step_cache(self._denoiser):
            return "a step cache of diffusers is enabled"
        return self._stranger

    def _kind(self, tree, leaves):
        """(the `_Kind` of a call, whether there was one before)."""
        key = str(tree), tuple(map(_described, leaves)), _autocast(self._captures.device_type)
        known = key in self._kinds
        if not known:
            self._kinds[key] = self._made(tree, leaves)
        self._kinds.move_to_end(key)
        while len(self._kinds) > KEPT:
            self._kinds.popitem(last=False)
        return self._kinds[key], known

    def _made(self, tree, leaves):
        hook = _hook(self._denoiser)
        if hook:
            self._tell(hook)
            return _Kind([], refused=True)
        # Ordinary tensors, whatever mode this call runs in: they are written in later ones too.
        with torch.inference_mode(False):
            held = [_place_for(x) for x in leaves if isinstance(x, torch.Tensor)]
        if not self._projections.active:
            return _Kind(held)
        call = tree_unflatten(_put_in(leaves, held), tree)
        return _Kind(held, Pinned(call, self._signature.latent(*call)))

    def _check(self, result):
        """Raises: TypeError if there is anything in a result but tensors and plain values."""
        odd = [x for x in tree_flatten(result)[0] if not isinstance(x, (torch.Tensor, *_NUMBERS))]
        if odd:
            raise TypeError(f"the denoiser returns a {type(odd[0]).__name__}")

    def _launched(self, why, forward, args, kwargs):
        self._tell(why)
        return forward(*args, **kwargs)

    def _tell(self, why):
        if why not in self._told:
            self._told.add(why)
            level, given = (logging.INFO, "graphs=auto") if self._cautious else (logging.WARNING, "graphs=True")
            log.log(level, "%s: %s is launched kernel by kernel: %s", given, type(self._denoiser).__name__, why)


def wanted(denoiser, config, device_type):
    """Whether the calls of a denoiser are to be captured: by the options or, where they leave it open, what it is."""
    if config.graphs != "auto":
        return config.graphs
    whole = config.num_stages == config.num_patches == 1
    return whole and device_type == CudaGraphs.device_type and stranger(denoiser) is None


def _place_for(x):
    """A tensor like x, each of whose elements has a place of its own: a timestep may be one for the whole batch."""
    strides = torch.empty_like(x).stride() if 0 in x.stride() else x.stride()
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def _copied(result):
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, result)


def _put_in(leaves, tensors):
    """The leaves with other tensors in the places of theirs."""
    tensors = iter(tensors)
    return [next(tensors) if isinstance(x, torch.Tensor) else x for x in leaves]


def _described(x):
    """What calls of one kind have in common at one place."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    return type(x), x


def _autocast(device_type):
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _hook(denoiser):
    """Why a replay would leave out what somebody's hooks do; None if there are none."""
    for name, module in denoiser.named_modules():
        registered = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
        others = not all(isinstance(hook, ForwardHook) for hook in registered)
        if others or module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return f"a hook is on {name or 'the denoiser'}"
    return None
