"""What one patch meets as it first runs, for itself alone: there is no plan yet, and its numbers mean nothing."""

from .following import Following
from .sites import CONV, SUMS, kind_of, seen


class FirstLook:
    """`found`: {(module, call): [Seen]}. `following`: the `Following` of its forward, None before it.

    `sees_latent`: whether the first convolution reads the latent where it lies.
    """

    def __init__(self, cutter):
        self.found, self.sees_latent, self.following = {}, False, None
        self._cutter, self._latent = cutter, None

    def follow(self, whole, latent):
        """A context within which the calls on a patch's latent, cut from the `whole` one, are noted."""
        self._latent, self.following = whole, Following(latent)
        return self.following

    def meet(self, key, func, args, kwargs, run):
        """The result of a watched call in a module's call, `run()` on this patch."""
        with self.following.paused():
            result = run()
        self.following.note(func, args, kwargs, result)
        if func in SUMS:
            return result
        first, kind = not self.found, kind_of(func, args, kwargs)
        self.found.setdefault(key, []).append(seen(kind, args, kwargs, result, sampled=False))
        if first and kind == CONV:
            self.sees_latent = self._cutter.lies_in(args[0] if args else kwargs["input"], self._latent)
        return result
