"""Hooks and watches of ours on the modules of one denoiser, put on and taken off without disturbing anybody else's."""

import itertools

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch.overrides import TorchFunctionMode

_numbers = itertools.count()


class ForwardHook(ModelHook):
    """Calls `handler(original_forward, args, kwargs)` in place of a module's forward; without a handler, the forward.

    Hooks of diffusers can be removed only in the reverse order of their registration, so one that another hook was
    put upon stays where it is, without a handler.
    """

    def __init__(self, handler):
        super().__init__()
        self.handler = handler

    def new_forward(self, module, *args, **kwargs):
        """What the module runs."""
        if self.handler is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.handler(self.fn_ref.original_forward, args, kwargs)


class Attachment:
    """One hook on one module."""

    def __init__(self, module, handler):
        self.module = module
        self._had_forward = "forward" in vars(module)
        self._had_registry = hasattr(module, "_diffusers_hook")
        self._registry = HookRegistry.check_if_exists_or_initialize(module)
        self._name = f"asyncdiff_fast_{next(_numbers)}"
        self.hook = ForwardHook(handler)
        self._registry.register_hook(self.hook, self._name)

    def remove(self):
        """Restore the module's forward; where another hook sits on top, leave this one without effect."""
        self.hook.handler = None
        if self._registry._hook_order[-1:] != [self._name]:
            return
        self._registry.remove_hook(self._name, recurse=False)
        if not self._registry.hooks:
            if not self._had_forward:
                del self.module.forward
            if not self._had_registry:
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
    return (CompiledAttachment if compiled else Attachment)(module, handler)


def own(denoiser):
    """The module itself, where it is wrapped by torch.compile."""
    return getattr(denoiser, "_orig_mod", denoiser)


class Forwards:
    """Forwards of single modules that are replaced, beneath every hook that comes later.

    `replaced` is {module: its forward from us}.
    """

    def __init__(self):
        self.replaced, self._before = {}, {}

    def replace(self, module, forward):
        """Give a module another forward until `restore`."""
        self._before[module] = vars(module).get("forward")
        self.replaced[module] = module.forward = forward

    def restore(self):
        """Give the modules back what they had; a forward that somebody's hook lies upon stays."""
        for module, forward in self.replaced.items():
            if vars(module).get("forward") is forward:
                del module.forward
                if self._before[module] is not None:
                    module.forward = self._before[module]
        self.replaced.clear()
        self._before.clear()


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
    """A number that changes when modules, attention processors or adapters are added, replaced, switched or removed."""

    def settings(module):
        found = map(vars(module).get, _SETTINGS)
        return tuple(tuple(x) if isinstance(x, list) else x for x in found)

    return hash(tuple((name, id(module), settings(module)) for name, module in denoiser.named_modules()))


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
