"""One forward on a whole picture, recorded: its sites, what follows from positions alone, and its outermost modules."""

import copy

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..calls.signature import copied
from ..fused.projections import KeptBytes
from .following import Called, Followed
from .regions import OuterCalls
from .sites import ATTENTION, JOINS, KINDS, PROMPT, SUMS, seen

# Floating-point inputs of more values than these hold no sizes or masks.
FEW = 4096
_NUMBERS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__,
    torch.Tensor.__index__, torch.equal, torch.allclose,
}  # fmt: skip


class Recorder(TorchFunctionMode):
    """Records one forward on a whole picture: its sites, and which tensors follow from positions alone.

    `sites`: {(module, call): [Seen]}. `order`: (key, place among them) of each, as met. `met`: (module, call, place) of
    these and of what may sum over rows. `calls`: every function call on tensors made of the picture, as `Called`.
    `constants`: {(module, call): result} of modules whose results follow from no input. `joins`: {(module, call):
    [(place, argument, tensor, shape of the result)]} of functions that join an activation with such a tensor. `beside`:
    {(module, call, leaf of its constant result)} that runs along something that is not made of the picture, such as
    text of as many tokens. `steered_by`: modules where a number read from the picture's activations steers Python.
    `reads`: names of other inputs from which numbers are read into Python, which positions may follow from. `tokens`:
    their `TokenOrder`, if it was found. `kept_bytes`: of the projections of the inputs that are made once, see
    `KeptBytes`. `outer`: `OuterCalls` of the forward. `entered`: (module, call) of all calls, as they began.
    `attentions`: how many were met. `region`, `outside`: see `narrowed`.

    Args:
        named: {name: tensors} of the small inputs.
        prompt: the inputs that speak of the prompt.
    """

    def __init__(self, latent, inputs, named, prompt=()):
        super().__init__()
        self.sites, self.order, self.constants, self.joins, self.steered_by = {}, [], {}, {}, []
        self.kept_bytes, self.reads, self.calls = 0, set(), []
        self._named = {name: Followed(x) for name, x in named.items()}
        self.met, self.tokens = [], None
        self._inputs, self.picture, self._text = Followed(inputs), Followed(latent), Followed(prompt)
        # {(module, call, leaf): that leaf, and what follows from it and other constants alone}, until it is first used.
        self.beside, self._unused = set(), {}
        self.stack, self._calls, self._joins_met, self._sums_met = [("", 0)], {}, {}, {}
        self.outer, self.entered, self.attentions = OuterCalls(self, self._text), [], 0
        self.region, self.outside = None, frozenset()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self._note_use(leaves, result)
        key = self.stack[-1]
        site = self._site(key, func, args, kwargs, result)
        called = Called.of(self.picture, func, args, kwargs, leaves, result, key[0], site)
        from_inputs = self._inputs.pass_on(func, args, leaves, result)
        if self.picture.pass_on(func, args, leaves, result) and called.made:
            self.calls.append(called)
        if func in JOINS:
            self._note_join(key, args, leaves, result)
        elif func in _NUMBERS and self.picture.any(leaves):
            self.steered_by.append(key[0] or "the forward itself")
        elif func in _NUMBERS and from_inputs:
            self.reads |= {name for name, followed in self._named.items() if followed.any(leaves)}
        for followed in (self._text, *self._named.values()) if from_inputs else ():
            followed.pass_on(func, args, leaves, result)
        return result

    def _site(self, key, func, args, kwargs, result):
        """(module, call, place) of a watched call, which is noted; None of any other."""
        if func in SUMS:
            place = self._sums_met[key] = self._sums_met.get(key, -1) + 1
            self.met.append((*key, f"sum {place}"))
            return self.met[-1]
        if func not in KINDS:
            return None
        sites = self.sites.setdefault(key, [])
        self.order.append((key, len(sites)))
        self.attentions += KINDS[func] == ATTENTION
        sites.append(seen(KINDS[func], args, kwargs, result))
        self.met.append((*key, len(sites) - 1))
        return self.met[-1]

    @property
    def summing(self):
        """Names of the modules that call what may sum over rows."""
        return tuple(sorted({name for name, _ in self._sums_met}))

    def _note_use(self, leaves, result):
        """See whether a constant first meets the picture or something else that it runs along."""
        others = [x for x in leaves if x in self._inputs and not any(x in f for f in self._unused.values())]
        for tag, followed in list(self._unused.items()):
            mine = [x for x in leaves if x in followed]
            if not mine:
                continue
            if not others:
                followed.add(result)
            elif self.picture.any(others) or _along(mine[0], others):
                del self._unused[tag]
                if not self.picture.any(others):
                    self.beside.add(tag)

    def _note_join(self, key, args, leaves, result):
        place = self._joins_met[key] = self._joins_met.get(key, -1) + 1
        if not self._inputs.any(leaves):
            return
        others = [x for x in leaves if x in self._inputs]
        for i, x in enumerate(args[:2]):
            if isinstance(x, torch.Tensor) and x not in self._inputs and x.dim() > 1:
                if not self.picture.any(others) and _along(x, others):
                    continue
                self.joins.setdefault(key, []).append((place, i, x.detach(), tuple(result.shape)))

    def narrowed(self, region):
        """This record as seen from a `Region`: sites `outside` share nothing, and no positions there are cut."""
        found, (begin, end) = copy.copy(self), region.calls
        inside = set(self.entered[begin:end])
        found.region = region
        found.outside = {s for i, s in enumerate(self.met) if not region.met[0] <= i < region.met[1]}
        found.constants = {key: x for key, x in self.constants.items() if key in inside}
        found.joins = {key: x for key, x in self.joins.items() if key in inside}
        return found

    def watch(self, denoiser):
        """Follow the calls of every submodule; returns the hooks' handles."""
        handles = []
        for name, module in denoiser.named_modules():
            if not name:
                continue

            def enter(module, args, kwargs, name=name):
                call = self._calls[name] = self._calls.get(name, -1) + 1
                self.stack.append((name, call))
                self.outer.enter((name, call), (args, kwargs))
                self.entered.append((name, call))

            def leave(module, args, kwargs, output):
                self.outer.leave(output)
                key = self.stack.pop()
                tensors = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
                if tensors and not self._inputs.any(tensors):
                    self.constants[key] = output
                    self._unused |= {(*key, i): Followed(x) for i, x in enumerate(tensors)}
                    # What is made of it needs no care of its own: the module's result will be a patch's.
                    self._inputs.add(output)

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        return handles


def _is_small(tree):
    """True of an argument that may hold sizes and masks: whole numbers, or few of any."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
    return bool(tensors) and all(not x.is_floating_point() or x.numel() <= FEW for x in tensors)


def _along(x, others):
    """True if a tensor has a dimension, other than features, that some of the others have too."""
    sizes = set(x.shape[:-1]) - {1}
    return any(sizes & set(other.shape[:-1]) for other in others)


def record(denoiser, forward, signature, args, kwargs):
    """(result, `Recorder`) of one forward on the whole picture."""
    args, kwargs = copied(args, kwargs)
    latent = signature.latent(args, kwargs)
    named = signature.named(args, kwargs)
    others = {n: x for n, x in named.items() if _is_small(x) and n != signature.timestep_name}
    prompt = [x for n, x in named.items() if any(word in n for word in PROMPT)]
    recorder = Recorder(latent, (args, kwargs), others, prompt)
    handles = recorder.watch(denoiser)
    try:
        with torch.no_grad(), KeptBytes((args, kwargs), latent) as kept, recorder:
            result = forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    recorder.kept_bytes = kept.nbytes
    return result, recorder
