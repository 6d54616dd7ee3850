"""What the modules of one denoiser are: their structure, whose forwards they run, whether they are compiled."""

import zlib

import torch

from .hooks import PREFIX, ForwardHook


def own(denoiser):
    """The module itself, where it is wrapped by torch.compile."""
    return getattr(denoiser, "_orig_mod", denoiser)


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
        found = tuple(tuple(x) if isinstance(x, list | dict) else x for x in found)
        return found, _scales(module), other_hooks(module)

    return hash(tuple((name, id(module), type(module), settings(module)) for name, module in denoiser.named_modules()))


def told(denoiser):
    """A digest of what `structure` is of that is the same in every process that has changed the same."""

    def setting(x):
        return repr(x) if isinstance(x, bool | int | float | str | list | tuple | None) else type(x).__qualname__

    found = [
        (
            name,
            type(module).__qualname__,
            *(setting(vars(module).get(s)) for s in _SETTINGS),
            repr(_scales(module)),
        )
        for name, module in denoiser.named_modules()
    ]
    return zlib.crc32(repr(found).encode())


def _scales(module):
    scaling = vars(module).get("scaling")
    return tuple(scaling.items()) if isinstance(scaling, dict) else None


def torch_hooks(model):
    """A digest of the names of what torch calls before and after forwards; made anew, they are the same."""
    found = []
    for name, module in model.named_modules():
        if module._forward_pre_hooks or module._forward_hooks:
            hooks = (*module._forward_pre_hooks.values(), None, *module._forward_hooks.values())
            found.append((name, *(getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks)))
    return zlib.crc32(repr(found).encode())


def other_hooks(module):
    """Names of the hooks of diffusers on a module that are not ours."""
    registry = vars(module).get("_diffusers_hook")
    return tuple(n for n in registry._hook_order if not n.startswith(PREFIX)) if registry else ()


def is_compiled(denoiser):
    """True if the denoiser as a whole was compiled: its parts then cannot be replaced."""
    return hasattr(denoiser, "_orig_mod") or getattr(denoiser, "_compiled_call_impl", None) is not None


def step_cache(denoiser):
    """True if a diffusers step cache (PAB, FirstBlockCache, ...) is enabled."""
    return bool(getattr(denoiser, "is_cache_enabled", False))
