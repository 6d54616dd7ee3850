"""One forward on a whole picture, recorded: its sites, what follows from positions alone, and its outermost modules."""

import copy
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..calls.signature import copied
from ..fused.projections import KeptBytes
from .following import Called, Followed, Sources
from .inputs import tensors
from .regions import OuterCalls
from .sites import ATTENTION, JOINS, PROMPT, SUM, SUMS, kind_of, seen

# Floating-point inputs of more values than these hold no sizes or masks.
FEW = 4096
_NUMBERS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__,
    torch.Tensor.__index__, torch.equal, torch.allclose,
}  # fmt: skip


@dataclass(frozen=True)
class Join:
    """A function's argument that meets the picture and is not made of it.

    `place`: of the call among its module's joins; `argument`: the number of this one; `shape`: of the result; `of`: the
    inputs that the value follows from, as in `Recorder`; none of a constant.
    """

    place: int
    argument: int
    value: torch.Tensor
    shape: tuple[int, ...]
    of: frozenset = frozenset()

    @property
    def along(self):
        """The dimensions, but the last, that may run with the result's rows, counted from the end."""
        mine = self.value.shape
        return [d for d in range(-min(len(mine), len(self.shape)), -1) if mine[d] == self.shape[d] > 1]


class Recorder(TorchFunctionMode):
    """Records one forward on a whole picture: its sites, and which tensors follow from positions alone.

    `sites`: {(module, call): [Seen]}. `order`: (key, place among them) of each, as met. `met`: (module, call, place) of
    these and of what may sum over rows. `calls`: every function call on tensors made of the picture, as `Called`.
    `constants`: {(module, call): result} of modules whose results follow from no input. `joins`: {(module, call):
    [Join]} of functions that join an activation with a tensor that follows from no input, or from steady ones. `aside`:
    {site: inputs} of those that are made of other inputs, and not of the picture. `beside`: {(module, call, leaf of its
    constant result)} that runs along something that is not made of the picture, such as text of as many tokens.
    `steered_by`: modules where a number read from the picture's activations steers Python.
    `reads`: names of other inputs from which numbers are read into Python, which positions may follow from. `tokens`:
    their `TokenOrder`, if it was found. `kept_bytes`: of the projections of the inputs that are made once, see
    `KeptBytes`. `outer`: `OuterCalls` of the forward. `entered`: (module, call) of all calls, as they began.
    `attentions`: how many were met. `region`, `outside`, `joined`: see `narrowed` and `settled`.

    Args:
        others: {(name, rest of the path): tensor} of the inputs but the latent.
        small, steady: names of those that may hold sizes or masks; of those that stay as they are from step to step,
            and speak of no prompt.
        prompt: the inputs that do.
    """

    def __init__(self, latent, inputs, others, small=(), steady=(), prompt=()):
        super().__init__()
        self.sites, self.order, self.constants, self.joins, self.steered_by = {}, [], {}, {}, []
        self.kept_bytes, self.reads, self.calls, self.aside = 0, set(), [], {}
        self._sources, self._small, self._steady = Sources(others), set(small), set(steady)
        self.met, self.tokens = [], None
        self._inputs, self.picture, self._text = Followed(inputs), Followed(latent), Followed(prompt)
        # {(module, call, leaf): that leaf, and what follows from it and other constants alone}, until it is first used.
        self.beside, self._unused = set(), {}
        self.stack, self._calls, self._joins_met, self._sums_met = [("", 0)], {}, {}, {}
        self.outer, self.entered, self.attentions = OuterCalls(self, self._text), [], 0
        self.region, self.outside, self.joined = None, frozenset(), ()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self._note_use(leaves, result)
        key = self.stack[-1]
        site = self._site(key, func, args, kwargs, result)
        if site is not None and not self.picture.any(leaves):
            self.aside[site] = self._sources.of(leaves)
        called = Called.of(self.picture, func, args, kwargs, leaves, result, key[0], site)
        from_inputs = self._inputs.pass_on(func, args, leaves, result)
        if self.picture.pass_on(func, args, leaves, result) and called.made:
            self.calls.append(called)
        if func in JOINS:
            self._note_join(key, args, leaves, result)
        elif func in _NUMBERS and self.picture.any(leaves):
            self.steered_by.append(key[0] or "the forward itself")
        elif func in _NUMBERS and from_inputs:
            self.reads |= {name for name, _ in self._sources.of(leaves)} & self._small
        for followed in (self._text, self._sources) if from_inputs else ():
            followed.pass_on(func, args, leaves, result)
        return result

    def _site(self, key, func, args, kwargs, result):
        """(module, call, place) of a watched call, which is noted; None of any other."""
        if func in SUMS:
            place = self._sums_met[key] = self._sums_met.get(key, -1) + 1
            self.met.append((*key, f"sum {place}"))
            return self.met[-1]
        kind = kind_of(func, args, kwargs)
        if kind is None:
            return None
        sites = self.sites.setdefault(key, [])
        self.order.append((key, len(sites)))
        self.attentions += kind == ATTENTION
        sites.append(seen(kind, args, kwargs, result))
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
            if not isinstance(x, torch.Tensor) or x.dim() < 2 or x in self.picture:
                continue
            join = Join(place, i, x.detach(), tuple(result.shape), self._sources.of((x,)))
            if x not in self._inputs:
                meets = self.picture.any(others) or not _along(x, others)
            else:
                steady = join.of and {name for name, _ in join.of} <= self._steady
                meets = steady and self.picture.any(others) and join.along
            if meets:
                self.joins.setdefault(key, []).append(join)

    def narrowed(self, region):
        """This record as seen from a `Region`: sites `outside` share nothing, and no positions there are cut."""
        found, (begin, end) = copy.copy(self), region.calls
        inside = set(self.entered[begin:end])
        found.region = region
        found.outside = self.outside | {s for i, s in enumerate(self.met) if not region.met[0] <= i < region.met[1]}
        found.constants = {key: x for key, x in self.constants.items() if key in inside}
        found.joins = {key: x for key, x in self.joins.items() if key in inside}
        return found

    def settled(self, cutter, whole):
        """This record where inputs are cut by a `Cutter`, and those in `whole` are not.

        What follows from these alone and has the picture's rows, such as a mask at the size of each layer, is cut where
        it joins the picture: its values belong to the plan, and the sites that it is made by share nothing.
        """
        found, used = copy.copy(self), set()
        found.joins = {}
        for key, joins in self.joins.items():
            mine = [j for j in joins if j.of <= whole and cutter.joined(j) is not None]
            found.joins |= {key: mine} if mine else {}
            used.update(*(j.of for j in mine))
        found.outside = self.outside | {site for site, of in self.aside.items() if of and of <= used}
        found.reads, found.joined = self.reads | {name for name, _ in used}, tuple(sorted(used))
        return found

    def samples(self, plan):
        """{number of a site of a `PatchPlan`: some of what it met}."""
        found = {i: site for i, site in enumerate(plan.sites) if site.kind != SUM}
        return {i: self.sites[s.name, s.call][s.place].sample for i, s in found.items()}

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
    others = {(n, path): x for n, path, x in tensors(named) if n != signature.latent_name}
    small = {n for n, x in named.items() if _is_small(x) and n != signature.timestep_name}
    prompt = {n: x for n, x in named.items() if any(word in n for word in PROMPT)}
    steady = {n for n in named if n != signature.timestep_name and not any(word in n for word in (*PROMPT, "timestep"))}
    recorder = Recorder(latent, (args, kwargs), others, small, steady, list(prompt.values()))
    handles = recorder.watch(denoiser)
    try:
        with torch.no_grad(), KeptBytes((args, kwargs), latent) as kept, recorder:
            result = forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    recorder.kept_bytes = kept.nbytes
    return result, recorder
