"""How long the parts of a call take on one device. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds, as measured or as counted work over speed.

    Args:
        call_s: of a call of the denoiser, whole batch and picture.
        units: {unit key: seconds} of the units of such a call; default: by the plan's costs.
        outside_share: of a call, outside all units; default: by the plan's costs where they are counted work, else 0.
        patch_s: of the call of each patch; default: by its rows.
        micro_s: of each micro-step's forward through all units; default: by its rows.
        half_s: of a call of half the batch; default: half of `call_s`.
        sampler_s: of a step outside the denoiser.
        block_s: of putting the sampler back and stepping anew, for each step of a block.
        fixed_s: of a picture outside its steps: text encoder, decoder.
    """

    call_s: float
    units: dict | None = None
    outside_share: float | None = None
    patch_s: tuple | None = None
    micro_s: tuple | None = None
    half_s: float | None = None
    sampler_s: float = 0.0
    block_s: float = 0.0
    fixed_s: float = 0.0

    def shares(self, graph, balance):
        """({unit key: share of a call}, the share outside units).

        Raises: ValueError where the plan's costs are no times and none were measured.
        """
        if self.units is not None:
            shares = {unit.key: self.units[unit.key] / self.call_s for unit in graph.units}
            return shares, max(0.0, 1.0 - sum(shares.values()))
        if balance == "memory":
            raise ValueError(
                'balance="memory" divides bytes, which tell no times: pass measured ones, or balance="flops"'
            )
        outside, inside = self.outside_share, sum(unit.cost for unit in graph.units) or 1.0
        if outside is None:
            outside = graph.glue_cost / (inside + graph.glue_cost) if balance == "flops" else 0.0
        return {unit.key: unit.cost / inside * (1 - outside) for unit in graph.units}, outside
