"""The weights of one denoiser where every rank holds only its own stage's and the glue's."""

import math

import torch
import torch.distributed as dist

from ..exchange.fingerprint import input_digests

# Where a denoiser says that its weights are still in a folder.
CHECKPOINT = "_asyncdiff_fast_checkpoint"


class Shards:
    """Which stages hold which weights. `owners`: {(unit, call): stage}, None until weights are divided.

    What a rank does not hold keeps shape and type in one number, NaN where there is one: it is a part of no result, and
    would be seen if it were.
    """

    def __init__(self, denoiser, world):
        self.denoiser, self.world, self.owners = denoiser, world, None
        self._checkpoint = getattr(denoiser, CHECKPOINT, None)

    @property
    def complete(self):
        """True while every rank holds all weights."""
        return self.owners is None and self._checkpoint is None

    def divide(self, whole, division):
        """Let go of what other stages' units alone need, or read what this rank needs from the folder. Collective.

        The division stays from here on; later calls let go of what was added since, such as adapters.

        Raises: ValueError on weights that are no plain tensors, before any is let go; if ranks read different ones.
        """
        owners = self.owners
        if owners is None:
            owners = {unit.key: stage for unit, stage in zip(whole.units, division.owner, strict=True)}
        holders, parameters = _holders(self.denoiser, owners), dict(self.denoiser.named_parameters())
        odd = [name for name in holders if type(parameters[name].data) is not torch.Tensor]
        if odd:
            raise ValueError(
                f"shard_weights needs weights that are plain tensors: got {type(parameters[odd[0]].data).__name__} in "
                f"{odd[0]}; pass shard_weights=False, or load the weights unquantised"
            )
        if self._checkpoint is not None and self.owners is None:
            self._read(parameters, holders)
        for name, stages in holders.items():
            p = parameters[name]
            if self.world.rank not in stages and p.untyped_storage().nbytes() > p.element_size():
                p.data = stand_in(p.shape, p.dtype, p.device)
        self.owners = owners

    def gather(self):
        """Bring all weights back to every rank. Collective.

        Raises: ValueError if they were read by stages, so that no rank is meant to hold them all.
        """
        if self._checkpoint is not None:
            raise ValueError(
                f"{type(self.denoiser).__name__} was loaded by its stages, and no rank has room for all of it: it "
                "stays patched; drop the pipeline, or load it by from_pretrained"
            )
        if self.owners is None:
            return
        parameters, group = dict(self.denoiser.named_parameters()), self.world.new_group()
        try:
            for name, stages in _holders(self.denoiser, self.owners).items():
                p = parameters[name]
                whole = p.data if self.world.rank in stages else torch.empty(p.shape, dtype=p.dtype, device=p.device)
                dist.broadcast(whole, self.world.ranks[min(stages)], group=group)
                p.data = whole
        finally:
            dist.destroy_process_group(group)
        self.owners = None

    def _read(self, parameters, holders):
        """Read what this rank holds. Collective: where one rank cannot, none goes on."""
        problem = None
        try:
            for name, p in parameters.items():
                if self.world.rank in holders.get(name, (self.world.rank,)):
                    p.data = self._checkpoint.read(name).to(p.device, p.dtype)
        except (ValueError, OSError) as error:
            problem = str(error)
        # Of what all hold; of the rest there is one copy.
        mine = input_digests({name: p.data for name, p in parameters.items() if name not in holders})
        everyone = self.world.gather((problem, mine), "the weights that all ranks hold")
        for rank, (refusal, _) in zip(self.world.ranks, everyone, strict=True):
            if refusal is not None:
                raise ValueError(f"rank {rank} cannot read its weights: {refusal}")
        first = self.world.ranks[0]
        for rank, (_, theirs) in zip(self.world.ranks, everyone, strict=True):
            different = [name for name in everyone[0][1] if everyone[0][1][name] != theirs.get(name)]
            if different:
                raise ValueError(
                    f"every rank must read the same weights: rank {first} and rank {rank} have different "
                    f"{different[0]}; copy the folder anew"
                )


def _holders(denoiser, owners):
    """{name of a parameter: stages that hold it} of those that some stages hold, and not all ranks."""
    found, shared = {}, set()
    inside = {}
    for (name, _), stage in owners.items():
        inside.setdefault(name, set()).add(stage)
    modules = dict(denoiser.named_modules())
    for module_name, stages in inside.items():
        for p in modules[module_name].parameters():
            found.setdefault(id(p), set()).update(stages)
    for name, module in modules.items():
        within = any(name == unit or name.startswith(f"{unit}.") for unit in inside)
        if not within:
            shared.update(id(p) for p in module.parameters(recurse=False))
    named = denoiser.named_parameters()
    return {name: found[id(p)] for name, p in named if id(p) in found and id(p) not in shared}


def stand_in(shape, dtype, device):
    """A tensor of one number, NaN if its type has one, that looks like one of this shape."""
    value = math.nan if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), value, dtype=dtype, device=device).expand(shape)
