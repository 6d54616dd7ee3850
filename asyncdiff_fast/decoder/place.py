"""What of an autoencoder is shared: its decoder, or all of `_decode` where the decoder is given what frames leave."""

import inspect
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights

from ..calls.signature import CallSignature
from ..hooks import Attachment

# What pipelines call their autoencoders.
NAMES = ("vae", "movq", "vqgan", "vqvae")
# Arguments in which a decoder of clips is given what earlier frames have left.
_CACHES = {"feat_cache", "conv_cache"}
# Rows and columns of the latent that a decoder is tried with beforehand, and its frames.
_EXAMPLE, _FRAMES = 8, 3


def autoencoder(pipe):
    """The autoencoder of a pipeline. Raises: ValueError if it has none."""
    components = getattr(pipe, "components", None)
    parts = components if isinstance(components, dict) else {}
    found = next((parts[name] for name in NAMES if isinstance(parts.get(name), torch.nn.Module)), None)
    if found is None:
        raise ValueError(
            f"vae=True shares the decoder of a pipeline's autoencoder: got {type(pipe).__name__}, which has none "
            f"({', '.join(NAMES)}); pass the pipeline, or vae=False"
        )
    return found


def autoencoders(target):
    """The autoencoder of a pipeline in a list, if it has one."""
    try:
        return [autoencoder(target)]
    except ValueError:
        return []


class _Signature(CallSignature):
    """Of a function that takes a latent first, and no timestep."""

    def __init__(self, function):
        parameters = list(inspect.signature(function).parameters.values())[1:]
        self.positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.timestep_name, self.latent_name = None, self.positional[0]


@dataclass(frozen=True)
class Place:
    """A function of an autoencoder that is shared, and the `module` in which its modules have their names."""

    vae: torch.nn.Module
    whole: bool

    @classmethod
    def of(cls, vae):
        """Raises: ValueError if an autoencoder has no decoder that is known."""
        decoder = getattr(vae, "decoder", None)
        if not isinstance(decoder, torch.nn.Module) or not hasattr(type(vae), "from_config"):
            raise ValueError(
                f"vae=True knows autoencoders of diffusers with a module `decoder`: got {type(vae).__name__}; pass "
                "vae=False"
            )
        keeps = not _CACHES.isdisjoint(inspect.signature(type(decoder).forward).parameters)
        if keeps and not hasattr(vae, "_decode"):
            raise ValueError(f"{type(vae).__name__} has no _decode around its frames: pass vae=False")
        return cls(vae, keeps)

    @property
    def module(self):
        """The module whose function is shared."""
        return self.vae if self.whole else self.vae.decoder

    @property
    def forward(self):
        """The function."""
        return self.vae._decode if self.whole else self.vae.decoder.forward

    def attach(self, handler):
        """Have `handler(forward, args, kwargs)` called in its place; returns what undoes it."""
        if not self.whole:
            return Attachment(self.module, handler, beneath=True).remove
        vae, forward = self.vae, self.forward

        def decode(*args, **kwargs):
            return handler(forward, args, kwargs)

        vae._decode = decode
        return lambda: vars(vae).pop("_decode", None)

    @property
    def signature(self):
        """`CallSignature` of the function."""
        return _Signature(type(self.vae)._decode if self.whole else type(self.vae.decoder).forward)

    def ghost(self):
        """The same place of an autoencoder without weights, on the meta device, with this one's settings.

        Raises: ValueError if this one is not as its config says.
        """
        vae = self.vae
        with torch.inference_mode(False), init_empty_weights(include_buffers=True):
            ghost = type(vae).from_config(vae.config).eval()
        # What its constructors made of lists of numbers.
        ghost.to("meta")
        mine, theirs = dict(vae.named_parameters()), dict(ghost.named_parameters())
        if mine.keys() != theirs.keys():
            different = sorted(mine.keys() ^ theirs.keys())
            raise ValueError(
                f"vae=True needs an autoencoder with the modules of its config: {type(vae).__name__} was changed in "
                f"{', '.join(different[:3])}; pass vae=False"
            )
        for name, parameter in theirs.items():
            parameter.data = torch.empty(parameter.shape, dtype=mine[name].dtype, device="meta")
        for name, value in vars(vae).items():
            if isinstance(value, bool | int | float) and name in vars(ghost):
                setattr(ghost, name, value)
        if hasattr(vae, "attn_processors"):
            ghost.set_attn_processor(dict(vae.attn_processors))
        return Place(ghost, self.whole)

    def example(self, num_patches):
        """(args, kwargs) of a small call on the meta device; None where it cannot be told how to make one."""
        ghost = self.ghost()
        first = next(m for m in ghost.vae.decoder.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
        frames = () if isinstance(first, torch.nn.Conv2d) else (_FRAMES,)
        rows = max(_EXAMPLE, 2 * num_patches)
        latent = torch.zeros(1, first.in_channels, *frames, rows, _EXAMPLE, dtype=first.weight.dtype, device="meta")
        clip = "num_frames" in inspect.signature(type(ghost.vae).decode).parameters
        given = []

        def note(forward, args, kwargs):
            given.append((args, kwargs))
            raise _Noted

        ghost.attach(note)
        try:
            with torch.no_grad():
                ghost.vae.decode(latent, **({"num_frames": 1} if clip else {}))
        except Exception:
            # Called in a way of its own: then the first call tells.
            pass
        return given[0] if given else None

    @property
    def tiles(self):
        """True if the autoencoder decodes tiles now."""
        return bool(getattr(self.vae, "use_tiling", False))


class _Noted(Exception):
    """The function was called."""
