"""What is said, once, where several ranks run and none of them has been spared anything."""

import logging

from .calls.schedule import Mode

log = logging.getLogger(__name__)


class Advice:
    """Watches one denoiser's generations, and warns on the first rank alone.

    Args:
        name: of the denoiser's class.
        rank: this one's place in the mesh.
    """

    def __init__(self, config, name, rank):
        # Exact calls too are shared by halves of guidance, by patches, and by patches that pass through stages.
        exact_alone = not (config.cfg_parallel or config.num_patches > 1 or config.pipelined)
        self._config, self._name = config, name
        self._ends_unsaid = rank == 0 and config.world_size > 1 and exact_alone
        self._gradients_unsaid = rank == 0 and config.world_size > 1
        self._steps = self._shared = 0

    def gradients(self):
        """A call needs gradients: every rank evaluates the whole of it."""
        if self._gradients_unsaid:
            self._gradients_unsaid = False
            log.warning(
                "gradients are enabled, so every rank evaluates all of %s and nothing is shared: call it within "
                "torch.no_grad()",
                self._name,
            )

    def call(self, step):
        """A call of a step, from 0, begins."""
        self._steps = step + 1

    def counts_anew(self):
        """What is counted begins at 0 again."""
        self._shared = 0

    def generation_over(self, calls, steps, whole):
        """The generation is over.

        Args:
            calls: how many there were since `counts_anew`, by `Mode`.
            steps: the `StepStats` of steps side by side, or None.
            whole: False if an exception has ended it.
        """
        number = sum(n for mode, n in calls.items() if mode is not Mode.EXACT) if steps is None else steps.blocks
        made, self._steps = self._steps, 0
        before, self._shared = self._shared, number
        if not (made and whole) or number != before or not self._ends_unsaid:
            return
        self._ends_unsaid = False
        least = self._config.least_warmup
        if made <= least:
            why = (
                f"all were warm-up, with warmup_steps={least}: pass a smaller one, or cfg_parallel or num_patches, "
                "which share exact steps too"
            )
        else:
            why = f"all were exact: {next(reversed(steps.exact_because), 'see stats()') if steps else 'see stats()'}"
        log.warning("no rank was spared anything in %d steps of %s; %s", made, self._name, why)
