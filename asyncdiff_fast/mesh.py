"""Who is where among the ranks that share one denoiser. Pure."""

from dataclasses import dataclass

AXES = ("step", "half", "patch", "stage")


@dataclass(frozen=True)
class Mesh:
    """Ranks as a mesh of steps side by side, CFG halves, patches and stages, the stage innermost."""

    steps: int
    halves: int
    patches: int
    stages: int

    @property
    def size(self):
        """Ranks in all."""
        return self.steps * self.halves * self.patches * self.stages

    def place(self, rank):
        """(step, half, patch, stage) of a rank."""
        rank, stage = divmod(rank, self.stages)
        rank, patch = divmod(rank, self.patches)
        return (*divmod(rank, self.halves), patch, stage)

    def along(self, axis, rank):
        """The ranks that differ from `rank` in one axis only, of `AXES`, in order."""
        mine = self.place(rank)
        kept = [i for i, name in enumerate(AXES) if name != axis]
        return tuple(r for r in range(self.size) if all(self.place(r)[i] == mine[i] for i in kept))
