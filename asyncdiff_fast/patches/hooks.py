"""Hooks on the modules of one denoiser that hand what happens in them to the patch under way."""

from ..modules import Attachment, Watch
from .sites import JOINS, KINDS, SUMS


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
            return self._in_module("", forward, args, kwargs) if self._at_root else forward(*args, **kwargs)

        return begun

    def on_patch(self, patch, signature, mode, run, args, kwargs, exact=False):
        """The denoiser's result for the whole picture, of one call on a patch. Collective over the patches.

        Args:
            run: `run(args, kwargs)` is the call on the patch; the forward in it is `counted`.
            exact: see `Patch.begin`.
        """
        cut_args, cut_kwargs = patch.begin(signature, mode, args, kwargs, exact)
        self.active = patch
        try:
            with patch.following(signature.latent(cut_args, cut_kwargs)):
                result = run(cut_args, cut_kwargs)
        finally:
            self.active = None
        return patch.end(result) if patch.bound else result

    def attach(self, recorder, patch):
        """Put hooks on the modules in which a patch will meet something, as a recorded forward tells."""
        modules = dict(self._denoiser.named_modules())
        wanted = {name for name, _ in recorder.sites} | patch.constant_modules
        # What the modules inside a joining one do must not be taken for its own.
        wanted |= {n for outer in patch.joining_modules for n in modules if n == outer or n.startswith(f"{outer}.")}
        self.attach_all(wanted)

    def attach_all(self, wanted):
        """Put hooks on modules by name; "" is the denoiser itself."""
        modules = dict(self._denoiser.named_modules())
        self.names = {module: name for name, module in modules.items()}
        self._at_root |= "" in wanted
        for name in sorted(set(wanted) - {"", *self._attached}):

            def handler(forward, args, kwargs, name=name):
                return self._in_module(name, forward, args, kwargs)

            self._attached[name] = Attachment(modules[name], handler)

    def remove(self):
        """Take all hooks off."""
        for attachment in self._attached.values():
            attachment.remove()
        self._attached.clear()

    def _in_module(self, name, forward, args, kwargs):
        patch = self.active
        if patch is None:
            return forward(*args, **kwargs)
        outermost = patch.way.enter(name)
        try:
            known = patch.constant()
            if known is not None:
                return known
            if not outermost:
                return forward(*args, **kwargs)
            with self._watch:
                return forward(*args, **kwargs)
        finally:
            patch.way.leave()

    def _meet(self, func, args, kwargs):
        return self.active.meet(func, args, kwargs)
