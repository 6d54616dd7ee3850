"""One patch in a region of its denoiser: what goes into its modules is cut, and what comes out is put together."""

import contextlib

from .way import lost


class Within:
    """`region`: the `Region`. `made`: what its last module gives, of the whole picture and of this patch, as a first
    look finds them.
    """

    def __init__(self, region, patch):
        self.region, self.made = region, None
        self._patch, self._known, self._together = patch, {}, False

    def begin(self):
        """A call begins."""
        self._known, self._together = {}, False

    def ended(self):
        """A call is over. Raises: Lost if its results were not put together."""
        if not self._together:
            lost(f"{self.region.end[0]} was not called")

    def entering(self, args, kwargs):
        """(args, kwargs) of the module entered last: this patch's, if it is one of the region."""
        patch = self._patch
        if patch.way.key not in self.region.given:
            return args, kwargs
        following = None if patch.look is None else patch.look.following
        with contextlib.nullcontext() if following is None else following.paused():
            args, kwargs = self.region.cut(patch.way.key, patch.cutter, args, kwargs, self._known)
        if following is not None:
            following.instead(self._known.values())
        return args, kwargs

    def leaving(self, result):
        """The result of the module entered last: of all patches, where the region ends. Collective there."""
        patch = self._patch
        if patch.way.key != self.region.end:
            return result
        self._known = {}
        if not patch.bound:
            return self._learn(result)
        self._together = True
        joints = self.region.joints(patch.cutter, result)
        return self.region.together(joints, patch.share(self.region.apart(patch.cutter, joints, result)), result)

    def _learn(self, result):
        """Look at a result; gives one of the whole picture's shape."""
        patch = self._patch
        with patch.look.following.paused():
            whole, pairs = self.region.whole_like(result)
            joints = self.region.joints(patch.cutter, result)
            self.made = tuple(self.region.apart(patch.cutter, joints, x) for x in (whole, result))
        patch.look.following.instead(pairs)
        return whole
