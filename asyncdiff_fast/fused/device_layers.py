"""All that one device makes faster in one denoiser, whichever parts of a call fall to it."""

from .choice import KernelChoice
from .fusion import Fusion
from .packed import PackedWeights, packs
from .projections import Projections


class DeviceLayers:
    """The layers of one denoiser whose forwards are replaced on this rank. Collective to make; `remove` undoes it all.

    To be made before anything of ours hooks the denoiser: they lie beneath. `packed`, `choice`: what patches call too.
    """

    def __init__(self, denoiser, config, world, device_type):
        patches = config.num_patches > 1
        # Packed weights are a second copy, and weights are divided where memory is short.
        self.packed = PackedWeights(denoiser, active=packs(config.kernels, device_type) and not config.shard_weights)
        self.choice = KernelChoice(config.kernels, world)
        self._fusion = Fusion(denoiser, self.choice, patches)
        # Patches that pass through a rank would make them one after another.
        again = patches or config.pipeline_count > 1
        self.projections = Projections(denoiser, again, self._fusion.taken_over, self.packed.forwards)

    @property
    def keeps_weights(self):
        """Whether copies of weights are kept, so that `begin` must come at each generation."""
        return self.packed.active

    def begin(self):
        """A generation begins: weights may have changed since the last."""
        self.packed.begin()
        self.projections.begin()

    def during(self, forward, latent):
        """See `Projections.during`."""
        return self.projections.during(forward, latent)

    def learning(self):
        """See `KernelChoice.learning`."""
        return self.choice.learning()

    def summary(self):
        """Dict, fit for JSON: which layers are replaced, and what was chosen for them."""
        return self._fusion.summary()

    def remove(self):
        """Restore every forward, once the hooks above are off."""
        self.projections.remove()
        self._fusion.remove()
        self.packed.remove()
