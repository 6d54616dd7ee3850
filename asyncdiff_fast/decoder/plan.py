"""What all ranks exchange in one decode, beside the denoiser's plan. Pure."""

from dataclasses import dataclass

from ..patches.sites import ATTENTION, CONV, NORM, PAD, SUM


@dataclass(frozen=True)
class DecoderPlan:
    """`each`: the plan of the denoiser; `patches`: `PatchPlan` of the decoder, of `name`."""

    each: object
    name: str
    patches: object

    @property
    def bytes_per_decode(self):
        """Bytes that all ranks together send in one decode, with the picture that all of them get."""
        return self.patches.bytes_per_call

    def __str__(self):
        patches = self.patches
        lines = [
            *(() if self.each is None else (str(self.each),)),
            f"decoder {self.name}, {len(patches.rows.held)} ranks, {patches.rows.size} rows of the latent; MB sent per "
            "decode:",
            "rank       rows  keys, values     halos  statistics  picture     buffers",
        ]
        for patch, (start, stop) in enumerate(patches.rows.held):
            halos = sum(patches.sent_bytes(patch, kind) for kind in (CONV, PAD)) / 1e6
            told = sum(patches.sent_bytes(patch, kind) for kind in (NORM, SUM)) / 1e6
            lines.append(
                f"{patch:>4}  {f'{start}-{stop}':>9}  {patches.sent_bytes(patch, ATTENTION) / 1e6:>12.2f}  "
                f"{halos:>8.2f}  {told:>10.3f}  {patches.sent_result_bytes(patch) / 1e6:>7.2f}  "
                f"{patches.memory_bytes(patch) / 1e6:>7.1f} MB"
            )
        return "\n".join(lines)
