"""Hooks on the modules of one denoiser that hand what happens in them to the patch under way."""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn

from ..fused.attending import attended
from ..hooks import Attachment, Watch
from ..modules import is_plain
from .sites import JOINS, KINDS, SUMS


def _convolved(module, meet, args, kwargs):
    (x,), how = args, (module.stride, module.padding, module.dilation, module.groups)
    return meet(torch.conv2d, (x, module.weight, module.bias, *how), kwargs)


def _normed(module, meet, args, kwargs):
    return meet(F.group_norm, (*args, module.num_groups, module.weight, module.bias, module.eps), kwargs)


# Forwards that are known call one watched function: no mode, which sees all that torch does, need be entered for it.
_WRITTEN_OUT = {nn.Conv2d: _convolved, nn.GroupNorm: _normed}


class Hooks:
    """`active` is the `Patch` whose call is under way, or None: then every module runs as it is.

    `names`: {module: its name in the denoiser}.
    """

    def __init__(self, denoiser):
        self.active, self.names = None, {}
        self._denoiser, self._attached = denoiser, {}
        # Whether the denoiser's own forward has sites outside its modules.
        self._at_root = False
        self._watch = Watch({*KINDS, *JOINS, *SUMS}, self._meet)

    def counted(self, forward):
        """The denoiser's forward, such that the calls of its modules are counted from its beginning."""

        def begun(*args, **kwargs):
            if self.active is None:
                return forward(*args, **kwargs)
            self.active.way.restart()
            return self._in_module("", None, forward, args, kwargs) if self._at_root else forward(*args, **kwargs)

        return begun

    def on_patch(self, patch, signature, mode, run, args, kwargs, exact=False, through=None):
        """The denoiser's result for the whole picture, of one call on a patch. Collective over the patches.

        Args:
            run: `run(args, kwargs)` is the call on the patch; the forward in it is `counted`.
            exact: see `Patch.begin`.
            through: `through(made, args, kwargs)` gives what `made(*args, **kwargs)` would; None: it is called.
        """

        def made(*args, **kwargs):
            cut_args, cut_kwargs = patch.cut(signature, args, kwargs)
            self.active = patch
            try:
                with patch.following(signature.latent(cut_args, cut_kwargs)):
                    result = run(cut_args, cut_kwargs)
            finally:
                self.active = None
            patch.complete()
            return result

        patch.begin(mode, exact)
        result = made(*args, **kwargs) if through is None else through(made, args, kwargs)
        return patch.end(result) if patch.bound else result

    def attach(self, recorder, patch):
        """Put hooks on the modules in which a patch will meet something, as a recorded forward tells."""
        modules = dict(self._denoiser.named_modules())
        wanted = {name for name, _ in recorder.sites} | patch.positions.constant_modules
        if patch.within is not None:
            wanted |= patch.within.region.modules
        # What the modules inside a joining one do must not be taken for its own.
        wanted |= {
            n for outer in patch.positions.joining_modules for n in modules if n == outer or n.startswith(f"{outer}.")
        }
        self.attach_all(wanted)

    def attach_all(self, wanted):
        """Put hooks on modules by name; "" is the denoiser itself."""
        modules = dict(self._denoiser.named_modules())
        self.names = {module: name for name, module in modules.items()}
        self._at_root |= "" in wanted
        for name in sorted(set(wanted) - {"", *self._attached}):
            handler = functools.partial(self._in_module, name, _written_out(modules[name]))
            self._attached[name] = Attachment(modules[name], handler)

    def remove(self):
        """Take all hooks off."""
        for attachment in self._attached.values():
            attachment.remove()
        self._attached.clear()

    def _in_module(self, name, written_out, forward, args, kwargs):
        patch = self.active
        if patch is None:
            return forward(*args, **kwargs)
        outermost = patch.way.enter(name)
        try:
            known = patch.constant()
            if known is not None:
                return known
            if patch.within is not None:
                args, kwargs = patch.within.entering(args, kwargs)
            result = self._run(written_out if outermost else None, outermost, forward, args, kwargs)
            return result if patch.within is None else patch.within.leaving(result)
        finally:
            patch.way.leave()

    def _run(self, written_out, watched, forward, args, kwargs):
        if written_out is not None:
            result = written_out(self._meet, args, kwargs)
            if result is not NotImplemented:
                return result
        with self._watch if watched else contextlib.nullcontext():
            return forward(*args, **kwargs)

    def _meet(self, func, args, kwargs):
        return self.active.meet(func, args, kwargs)


def _written_out(module):
    """The forward of a module as `written_out(meet, args, kwargs)`, if it is known and the module's own; else None."""
    if not is_plain(module, type(module)) or getattr(module, "padding_mode", "zeros") != "zeros":
        return None
    return functools.partial(_WRITTEN_OUT.get(type(module), attended), module)
