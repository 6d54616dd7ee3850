"""What `patch` does on one device, left out thing by thing, to measure what each gains."""

import contextlib
import functools
import os
import tempfile
from unittest import mock

from asyncdiff_fast.fused import device_layers, registry

# Classes that are kept inactive, and ops that run by torch's implementation.
CLASSES = {"text": "Projections", "channels_last": "ChannelsLast", "joined": "Joined"}
OPS = ("add_layer_norm", "geglu", "group_norm", "residual_add", "whole_attention")
NAMES = (*CLASSES, *OPS)


@contextlib.contextmanager
def without(name):
    """Within it denoisers are patched without one of `NAMES`, or None; choices are kept apart from the usual ones."""
    with contextlib.ExitStack() as stack:
        if name in CLASSES:
            inactive = functools.partial(_inactive, getattr(device_layers, CLASSES[name]))
            stack.enter_context(mock.patch.object(device_layers, CLASSES[name], inactive))
        elif name is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(mock.patch.dict(os.environ, ASYNCDIFF_FAST_CACHE=folder))
            stack.enter_context(mock.patch.dict(registry.KERNELS, {name: registry.KERNELS[name][:1]}))
        yield


def _inactive(kind, denoiser, active, *args):
    return kind(denoiser, False, *args)
