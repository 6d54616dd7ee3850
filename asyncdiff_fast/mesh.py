"""Who is where among the ranks that share one denoiser. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """Ranks as a mesh of CFG halves, patches and stages, the stage innermost."""

    halves: int
    patches: int
    stages: int

    @property
    def size(self):
        """Ranks in all."""
        return self.halves * self.patches * self.stages

    def place(self, rank):
        """(half, patch, stage) of a rank."""
        return rank // (self.patches * self.stages), rank // self.stages % self.patches, rank % self.stages

    def along(self, axis, rank):
        """The ranks that differ from `rank` in one axis only ("half", "patch" or "stage"), in order."""
        mine = self.place(rank)
        kept = [i for i, name in enumerate(("half", "patch", "stage")) if name != axis]
        return tuple(r for r in range(self.size) if all(self.place(r)[i] == mine[i] for i in kept))
