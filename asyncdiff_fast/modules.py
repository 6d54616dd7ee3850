"""Hooks and watches of ours on the modules of one denoiser, put on and taken off without disturbing anybody else's."""

import functools
import itertools
import types
import zlib

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import HookFunctionReference
from torch.overrides import TorchFunctionMode

_numbers = itertools.count()


_PREFIX = "asyncdiff_fast_"
# Where accelerate keeps the forward that its own calls.
_BENEATH = "_old_forward"


class ForwardHook(ModelHook):
    """Calls `handler(original_forward, args, kwargs)` in place of a module's forward; without a handler, the forward.

    One that another hook was put upon cannot be taken off, and stays where it is, without a handler.
    """

    def __init__(self, handler, kind):
        super().__init__()
        self.handler, self._kind = handler, kind

    def new_forward(self, module, *args, **kwargs):
        """What the module runs."""
        forward = self.fn_ref.original_forward
        if type(module) is not self._kind and getattr(forward, "__func__", None) is self._kind.forward:
            # The class was replaced since, as token merging does.
            forward = types.MethodType(type(module).forward, module)
        if self.handler is None:
            return forward(*args, **kwargs)
        return self.handler(forward, args, kwargs)


class _Reference(HookFunctionReference):
    """As a hook is removed, diffusers gives its forward to the hook above it; ours then calls that, and is not lost."""

    @property
    def forward(self):
        return self.runs

    @forward.setter
    def forward(self, beneath):
        self.original_forward = beneath

    @classmethod
    def instead_of(cls, reference):
        """`reference`, of this class from now on."""
        reference.runs = vars(reference).pop("forward")
        reference.__class__ = cls


class Attachment:
    """One hook on one module.

    With `beneath`, accelerate's hook stays above it: as models are offloaded, that is put on anew after each pipeline.
    """

    def __init__(self, module, handler, beneath=False):
        self.module = module
        outer = vars(module).get("forward") if beneath and _BENEATH in vars(module) else None
        self._had_registry = hasattr(module, "_diffusers_hook")
        self._registry = HookRegistry.check_if_exists_or_initialize(module)
        if outer is not None and not self._registry.hooks:
            module.forward = module._old_forward
        else:
            outer = None
        self._had_forward = outer is None and "forward" in vars(module)
        self._name = f"{_PREFIX}{next(_numbers)}"
        self.hook = ForwardHook(handler, type(module))
        self._registry.register_hook(self.hook, self._name)
        _Reference.instead_of(self.hook.fn_ref)
        self._forward = vars(module)["forward"]
        if outer is not None:
            module._old_forward, module.forward = self._forward, outer

    @property
    def is_covered(self):
        """True if a hook of somebody else's lies upon this one: it may leave the module uncalled."""
        return not self._registry._hook_order[-1].startswith(_PREFIX)

    def remove(self):
        """Restore the module's forward; where another hook sits on top, leave this one without effect."""
        self.hook.handler = None
        if self._registry._hook_order[-1:] != [self._name]:
            return
        outer = vars(self.module).get("forward")
        if outer is self._forward:
            self._registry.remove_hook(self._name, recurse=False)
            if not self._registry.hooks and not self._had_forward:
                del self.module.forward
        elif vars(self.module).get(_BENEATH) is self._forward:
            self._registry.remove_hook(self._name, recurse=False)
            self.module._old_forward, self.module.forward = self.module.forward, outer
        if not self._registry.hooks and not self._had_registry:
            del self.module._diffusers_hook


class CompiledAttachment:
    """A hook around a module that was compiled in place: what was compiled stays as it is."""

    def __init__(self, module, handler):
        self.module, self._compiled = module, module._compiled_call_impl

        def call(*args, **kwargs):
            return handler(self._compiled, args, kwargs)

        self._ours = module._compiled_call_impl = call

    def remove(self):
        """Give the module back what it had."""
        if self.module._compiled_call_impl is self._ours:
            self.module._compiled_call_impl = self._compiled


def attached(module, handler):
    """A hook around all of a denoiser, compiled or not."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return CompiledAttachment(module, handler) if compiled else Attachment(module, handler, beneath=True)


def own(denoiser):
    """The module itself, where it is wrapped by torch.compile."""
    return getattr(denoiser, "_orig_mod", denoiser)


class Forwards:
    """Forwards of single modules that are replaced, beneath every hook that comes later.

    `replaced` is {module: its forward from us}.
    """

    def __init__(self):
        self.replaced, self._before = {}, {}
        # {(function, class): what modules run}: one for all, so that torch.compile compiles it once.
        self._runs = {}

    def replace(self, module, function, *bound):
        """Let a module run `function(module, *bound, …)` until `restore`; if its class is replaced, that one's forward.

        A copy of the module runs it on itself: nothing but the arguments of `functools.partial` knows the module.
        """
        key = function, type(module)
        run = self._runs[key] = self._runs.get(key) or _run(function, type(module), len(bound))
        self._before[module] = vars(module).get("forward")
        self.replaced[module] = module.forward = functools.partial(run, module, *bound)

    def restore(self):
        """Give the modules back what they had; a forward that somebody's hook lies upon stays."""
        for module, forward in self.replaced.items():
            before = self._before[module]
            if vars(module).get("forward") is forward:
                del module.forward
                if before is not None:
                    module.forward = before
            elif vars(module).get(_BENEATH) is forward:
                module._old_forward = types.MethodType(type(module).forward, module) if before is None else before
        self.replaced.clear()
        self._before.clear()
        self._runs.clear()


def _run(function, kind, num_bound):
    def run(module, *args, **kwargs):
        if type(module) is kind:
            return function(module, *args, **kwargs)
        return type(module).forward(module, *args[num_bound:], **kwargs)

    # What torch.compile has compiled it counts by code.
    run.__code__ = run.__code__.replace(co_name=f"run_{kind.__name__}")
    return run


class Watch(TorchFunctionMode):
    """Within `inside(module)` hands every watched function call to `handle(func, args, kwargs)`."""

    def __init__(self, watched, handle):
        super().__init__()
        self.watched, self._handle = watched, handle

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.watched:
            return self._handle(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def is_plain(module, kind):
    """True if a module is of a class exactly, and its forward is its class's own but for hooks of ours."""
    if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
        return False
    if "forward" not in vars(module):
        return True
    hooks = list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values())
    if not hooks or not all(isinstance(hook, ForwardHook) for hook in hooks):
        return False
    return getattr(hooks[0].fn_ref.original_forward, "__func__", None) is kind.forward


# What diffusers and PEFT change in a module that stays: its attention processor, FreeU's factors, which adapters run.
_SETTINGS = ("processor", "s1", "s2", "b1", "b2", "_disable_adapters", "_active_adapter", "merged_adapters")


def containers(denoiser):
    """Names of the modules that hold a list of modules."""
    lists = (torch.nn.ModuleList, torch.nn.ModuleDict)
    return {name for name, m in denoiser.named_modules() if any(isinstance(c, lists) for c in m.children())}


def structure(denoiser):
    """A number that changes when modules, their classes, processors, adapters or others' hooks do."""

    def settings(module):
        found = tuple(map(vars(module).get, _SETTINGS))
        return tuple(tuple(x) if isinstance(x, list | dict) else x for x in found), _scales(module), other_hooks(module)

    return hash(tuple((name, id(module), type(module), settings(module)) for name, module in denoiser.named_modules()))


def told(denoiser):
    """A digest of what `structure` is of that is the same in every process that has changed the same."""

    def setting(x):
        return repr(x) if isinstance(x, bool | int | float | str | list | tuple | None) else type(x).__qualname__

    found = [
        (name, type(module).__qualname__, *(setting(vars(module).get(s)) for s in _SETTINGS), repr(_scales(module)))
        for name, module in denoiser.named_modules()
    ]
    return zlib.crc32(repr(found).encode())


def _scales(module):
    scaling = vars(module).get("scaling")
    return tuple(scaling.items()) if isinstance(scaling, dict) else None


def other_hooks(module):
    """Names of the hooks of diffusers on a module that are not ours."""
    registry = vars(module).get("_diffusers_hook")
    return tuple(n for n in registry._hook_order if not n.startswith(_PREFIX)) if registry else ()


def is_compiled(denoiser):
    """True if the denoiser as a whole was compiled: its parts then cannot be replaced."""
    return hasattr(denoiser, "_orig_mod") or getattr(denoiser, "_compiled_call_impl", None) is not None


def step_cache(denoiser):
    """True if a diffusers step cache (PAB, FirstBlockCache, ...) is enabled."""
    return bool(getattr(denoiser, "is_cache_enabled", False))


def on_pipeline_end(denoiser, callback):
    """Have `callback()` called when a pipeline ends. Returns a function that undoes it."""
    original = getattr(denoiser, "_reset_stateful_cache", None)

    def ended(*args, **kwargs):
        callback()
        return original(*args, **kwargs) if original is not None else None

    denoiser._reset_stateful_cache = ended

    def undo():
        if vars(denoiser).get("_reset_stateful_cache") is ended:
            del denoiser._reset_stateful_cache

    return undo
