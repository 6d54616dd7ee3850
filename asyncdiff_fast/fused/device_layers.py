"""All that one device makes faster in one denoiser, whichever parts of a call fall to it."""

from . import graphs
from .choice import KernelChoice
from .fusion import Fusion
from .joined import Joined
from .memory_format import ChannelsLast
from .packed import PackedWeights, packs
from .projections import Projections


class DeviceLayers:
    """The layers of one denoiser whose forwards are replaced on this rank. Collective to make; `remove` undoes it all.

    To be made before anything of ours hooks the denoiser: they lie beneath. `packed`, `choice`: what patches call too.
    """

    def __init__(self, denoiser, config, world, device_type, signature):
        patches = config.num_patches > 1
        # All that ranks tell each other comes before anything is replaced.
        self.choice = KernelChoice(config.kernels, world)
        # Packed weights are a second copy, and weights are divided where memory is short.
        self.packed = PackedWeights(denoiser, active=packs(config.kernels, device_type) and not config.shard_weights)
        self._fusion = Fusion(denoiser, self.choice, patches)
        whole = self.choice.alone and self.choice.active and device_type == "cuda"
        captured = graphs.wanted(denoiser, config, device_type)
        self._format = ChannelsLast(denoiser, whole and captured)
        self.choice.joined = self._joined = Joined(denoiser, whole and config.kernels == "auto")
        # Patches that pass through a rank would make them one after another. Replayed, they cost the device's time;
        # launched on one device, as much of the host's as finding out that they are the same.
        replayed = captured and config.kernels != "torch"
        again = patches or config.pipeline_count > 1 or replayed
        self.projections = Projections(
            denoiser, again, self._fusion.taken_over | self._joined.layers, self.packed.forwards
        )
        self.graphs = None
        if captured:
            first, cautious = self.choice.as_captured, config.graphs == "auto"
            self.graphs = graphs.Graphs(denoiser, signature, self.projections, first, cautious)

    @property
    def keeps(self):
        """Whether anything is kept from call to call, so that `begin` must come at each generation."""
        return self.packed.active or self.graphs is not None

    def begin(self):
        """A generation begins: weights may have changed since the last."""
        self.packed.begin()
        self.projections.begin()
        if self.graphs is not None:
            self.graphs.begin()

    def launched(self, forward, latent):
        """`forward` of the denoiser with what is kept, see `Projections.during`: what graphs capture, too."""
        return self.projections.during(forward, latent)

    def whole(self, launched):
        """What `launched` gave, of calls that no other rank has a part in: they are captured whole."""
        if self.graphs is None:
            return launched
        return lambda *args, **kwargs: self.graphs.call(launched, args, kwargs)

    def learning(self):
        """See `KernelChoice.learning`."""
        return self.choice.learning()

    def summary(self):
        """Dict, fit for JSON: which layers are replaced, what was chosen for them, and what was captured."""
        captured = {} if self.graphs is None else {"graphs": self.graphs.summary()}
        return self._fusion.summary() | captured | self.packed.summary()

    def remove(self):
        """Restore every forward, once the hooks above are off."""
        if self.graphs is not None:
            self.graphs.forget()
        self.projections.remove()
        self._joined.remove()
        self._format.remove()
        self._fusion.remove()
        self.packed.remove()
