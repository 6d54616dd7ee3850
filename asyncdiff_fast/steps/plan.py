"""The plan of steps side by side: how many calls a picture waits for, and what travels. Pure."""

from dataclasses import dataclass

from ..config import Config

EXAMPLES = (50, 25, 12)


@dataclass(frozen=True)
class StepPlan:
    """Steps side by side with `output_bytes` for each step; `each` is the plan of one call, or None."""

    config: Config
    output_bytes: int
    each: object = None

    def calls(self, num_steps):
        """Calls of the denoiser, one after the other, that a picture of so many steps waits for, at least."""
        exact = min(self.config.least_warmup, num_steps)
        return exact + -(-(num_steps - exact) // self.config.parallel_steps)

    @property
    def bytes_per_block(self):
        """Bytes that all ranks together send once a block."""
        return self.config.parallel_steps * (self.config.parallel_steps - 1) * self.output_bytes

    @property
    def bytes_per_call(self):
        """Bytes that all ranks together send for each step, where blocks are as long as can be."""
        inside = 0 if self.each is None else self.each.bytes_per_call
        return inside + self.bytes_per_block // self.config.parallel_steps

    def __str__(self):
        n = self.config.parallel_steps
        examples = ", ".join(f"{self.calls(steps)} calls for {steps} steps" for steps in EXAMPLES)
        lines = [
            f"{n} steps side by side after {self.config.warmup_steps} exact ones",
            f"a picture waits for at least {examples},",
            f"and for more where predicted latents are off by more than {self.config.tolerance:g}",
            f"each rank sends {(n - 1) * self.output_bytes / 1e6:.3f} MB once a block of up to {n} steps",
        ]
        return "\n".join(lines if self.each is None else [*lines, "each call in", str(self.each)])
