"""What a call on a patch costs the host beside the model's own work: how much passes through a mode of torch."""

import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import real_models
from patch_compute import Mirror

from asyncdiff_fast.calls.schedule import PatchMode
from asyncdiff_fast.calls.signature import CallSignature
from asyncdiff_fast.config import Config
from asyncdiff_fast.fused.packed import PackedWeights
from asyncdiff_fast.patches.alone import LonePlanner
from asyncdiff_fast.patches.calls import Patches
from asyncdiff_fast.shared import Shared


def test_usual_modules_are_watched_without_a_mode():
    """A mode sees every function that torch runs within it, at a microsecond each; an attention module runs fifty."""
    unet, inputs = real_models.tiny()
    shared = Shared(unet, Config(num_patches=2), CallSignature(unet), PackedWeights(unet, active=False))
    patches, seen = Patches(shared, None, Mirror()), []
    _, call = LonePlanner(shared, patches.hooks).emulate(0, unet.forward, (), inputs, patches.exchange)
    watch = patches.hooks._watch

    class Counting(type(watch)):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    watch.__class__ = Counting
    want = call(PatchMode.SYNC)[0].clone()
    # What is left is one module that resizes.
    few = len(seen)
    assert 0 < few < 30, seen
    for attachment in patches.hooks._attached.values():
        attachment.hook.handler = functools.partial(patches.hooks._in_module, attachment.hook.handler.args[0], None)
    assert torch.equal(call(PatchMode.SYNC)[0], want), "written out they give the same bits"
    assert len(seen) > 5 * few
    patches.forget(released=True)
