"""The way of one call of a denoiser: through the halves of guidance, patches and stages, to its forward."""

import contextlib
import functools

from .calls.containers import Given
from .calls.schedule import Mode, PatchMode
from .calls.signature import copied, inputs_key
from .halves.calls import Unguided
from .modules import own


class Route:
    """The way of each call on this rank; `calls` counts by `Mode` what was computed at its end.

    Args:
        parts: the `Parts` that share it out.
        layers: the `DeviceLayers` that run on this device.
        pipeline: () -> the pipeline whose denoiser this is, or None.
    """

    def __init__(self, denoiser, parts, layers, signature, pipeline):
        self._name = type(own(denoiser)).__name__
        self._parts, self._layers, self._signature, self._pipeline = parts, layers, signature, pipeline
        # What undoes the patch where a denoiser turns out not to be shared, or None.
        self.on_refused = self._forward_error = None
        self.calls = dict.fromkeys(Mode, 0)

    def call(self, tick, key, forward, args, kwargs):
        """The result of one call, whose `tick` and inputs' `key` are known: of all steps, or of this rank's."""
        if self._parts.halves is None:
            return self._on_patches(tick, key, forward, args, kwargs)

        def run(tick, args, kwargs):
            return self._on_patches(tick, inputs_key(args, kwargs), forward, args, kwargs)

        with self._planning(forward, parts=True) as quiet:
            return self._parts.halves.call(tick, key, quiet, run, args, kwargs, self._guided())

    def _guided(self):
        """Whether the pipeline uses guidance, where it tells."""
        return getattr(self._pipeline(), "do_classifier_free_guidance", True)

    def _on_patches(self, tick, key, forward, args, kwargs):
        """This call, shared by the patches: of the whole batch, or of this rank's half of the guidance."""
        if self._parts.patches is None:
            return self._on_stages(tick, key, forward, args, kwargs)
        with self._planning(forward, parts=True) as quiet:
            counted = self._parts.patches.hooks.counted(quiet)

            def run(args, kwargs):
                return self._on_stages(tick, inputs_key(args, kwargs), counted, args, kwargs)

            result = self._parts.patches.call(tick, key, quiet, run, args, kwargs)
        if self._parts.stages is None:
            # A call that is replayed comes no further.
            self.calls[Mode.EXACT if self._parts.patches.mode is PatchMode.SYNC else Mode.COMPUTE] += 1
        return result

    def _on_stages(self, tick, key, forward, args, kwargs):
        """This call, shared by the stages: of the whole picture, or of this rank's patch."""
        sharing = self._parts.stages or self._parts.pipeline
        kept = self._layers.launched(forward, self._signature.latent)
        if sharing is None and self._parts.patches is not None:
            return kept(*args, **kwargs)
        if sharing is None:
            result, mode = self._layers.whole(kept)(*args, **kwargs), Mode.EXACT
        else:
            others = (self._parts.steps, self._parts.patches, self._parts.halves, self._parts.pipeline)
            alone = all(other is None for other in others)
            planning = functools.partial(self._planning, forward, learning=alone)
            result, mode = sharing.call(tick, key, planning, kept, args, kwargs)
        self.calls[mode] += 1
        return result

    @contextlib.contextmanager
    def _planning(self, forward, learning=False, parts=False):
        """What this denoiser cannot be patched with shows at its first call at the latest: then leave it as it was.

        Yields the forward, such that an error of its own is told from one of ours. With `learning` all ranks run the
        same forward in it, so that kernels can be chosen for it.
        """

        def quiet(*args, **kwargs):
            args, kwargs = copied(args, kwargs)
            named = self._signature.named(args, kwargs)
            given = Given(named)
            try:
                result = forward(*args, **kwargs)
                written = given.written(named) if parts else ()
            except Exception as error:
                self._forward_error = error
                raise
            finally:
                given.restore()
            if written:
                raise ValueError(
                    f"{self._name} puts something into its arguments ({', '.join(written)}), of "
                    "which each rank would have its own part only: make it a result, or use num_stages or "
                    "parallel_steps instead"
                )
            return result

        try:
            with self._layers.learning() if learning else contextlib.nullcontext():
                yield quiet
        except (ValueError, TypeError) as error:
            refused = error is not self._forward_error and not isinstance(error, Unguided)
            # Without its weights a denoiser cannot be left as it was.
            if self.on_refused is not None and refused and not self._parts.is_sharded:
                self.on_refused()
            raise
