"""The generations of one patched denoiser on one rank: whose calls they are, whether ranks agree, how they end."""

import logging

from .alike import Alike
from .calls.turns import Turns
from .exchange import fingerprint
from .exchange.engine import described
from .exchange.errors import ExchangeError

log = logging.getLogger(__name__)
# How long a thread with the first rank's inputs is waited for, where only one has been seen and where there are more.
ALONE_S, SHARED_S = 1.0, 10.0


class Generations:
    """One thread's at a time, the first rank says which; a rank that ends one tells the others, and one that fails.

    Where nothing tells of a generation's end, the first rank waits until all is quiet, and the others until that one
    begins another. A thread whose inputs are not those of the first rank's thread lets one go first whose inputs they
    are, and all ranks report once more.

    Args:
        world: all ranks of the mesh.
        pipeline: returns the pipeline, None where there is none.
        scheduler: the caller's, if it is not one of diffusers'.
        alike_to_the_end: False if ranks are given latents of their own expectations after the first steps.
    """

    def __init__(self, world, denoiser, pipeline, scheduler, alike_to_the_end=True):
        self._world, self._pipeline, self._alike_to_the_end = world, pipeline, alike_to_the_end
        self._alike = Alike(world, denoiser, pipeline, scheduler)
        self._turns = Turns(world.timeout_s, world.may_begin)
        # This rank has reported other inputs than the first one, or another rank has, and all report once more.
        self._again = False
        # An exception has ended the last one: messages may be left half-way.
        self.interrupted = False
        # Calls in the one under way or last ended; whether the others know how many.
        self._made, self._told = 0, True

    @property
    def is_inside(self):
        """True within a call of this thread."""
        return self._turns.is_inside

    @property
    def structure(self):
        """`modules.structure` of the denoiser, as it was when the last generation began."""
        return self._alike.structure

    @property
    def is_taken(self):
        """True if another thread's goes on."""
        return self._turns.is_taken

    def tick(self, timestep, key, named):
        """Place the next call, see `Turns.tick`; `leave` follows. `named` gives its arguments by name."""
        return self._turns.tick(timestep, key, lambda: fingerprint.input_digests(named()))

    def leave(self):
        """The call is over."""
        self._turns.leave()

    def begin(self, named, state):
        """What every rank reports at the first call, with arguments `named`. Collective.

        Args:
            state: gives what else this rank tells of itself: {"interrupted": whether the last generation ended in the
                middle of something, "moved": whether its weights lie on another device than exchanges were opened for}.
        """
        if self._pipeline() is not None:
            # It says when it ends.
            self.abandon("its pipeline was left before its end, by an exception outside of the denoiser; see its log")
        while True:
            self._tell()
            again, self._again = self._again, False
            mine = self._alike.report(named) | state()
            mine |= {"made": self._made, "again": again, "shared": self._turns.is_shared}
            mine["interrupted"] |= self.interrupted
            reports = self._world.begin(mine, "the start of a generation")
            first = reports[0]["inputs"]
            if any(r["again"] for r in reports) or all(r["inputs"] == first for r in reports):
                self._made, self._told = 0, False
                return reports
            self._again = True
            if mine["inputs"] != first:
                # The first rank waits meanwhile, until `timeout_s`.
                alone_s, shared_s = (min(x, self._world.timeout_s / 2) for x in (ALONE_S, SHARED_S))
                shared = any(r["shared"] for r in reports)
                self._turns.hand_over(mine["inputs"], first, shared_s if shared else alone_s, shared_s)

    @staticmethod
    def is_whole(reports):
        """False if exchanges must begin anew: one rank was interrupted, or has made another number of calls, and so of
        exchanges, whose numbers would never fit again.
        """
        return not any(r["interrupted"] or r["made"] != reports[0]["made"] for r in reports)

    def check(self, reports):
        """Raises: ValueError on all ranks if one is to draw another picture. Collective."""
        try:
            self._alike.check(reports)
        except ValueError as error:
            if not self._turns.is_shared:
                raise
            raise ValueError(
                f"{error}; several threads share this denoiser: on every rank there must be the same, each with the "
                "same inputs"
            ) from None

    def check_hooks(self, reports, run):
        """See `AlikeModel.check_hooks`. Collective."""
        self._alike.check_hooks(reports, run)

    def count(self, tick, latent):
        """One more call; the first of a step is compared with the others'. Collective at the second and last step."""
        self._made += 1
        self._world.calls += 1
        if tick.step == 0 or tick.call > 0 or self._world.size == 1:
            return
        self._alike.check_draws(tick.step)
        if tick.step == 1:
            self._alike.check_step(latent)
        elif self._alike_to_the_end and tick.step + 1 == getattr(self._pipeline(), "_num_timesteps", None):
            # A callback may have changed the latents of one rank alone.
            self._alike.check_step(latent, "last")

    def fail(self, error, has_result):
        """An exception has come out of a call: tell the others. Raises it, with what they know of it.

        Returns if another rank has ended this generation and the pipeline stops in diffusers' own way: then any result
        of the call will do, if there is one.
        """
        if not self._turns.is_inside:
            # The thread waited for its turn in vain: nothing of another's generation ends by that.
            self._turns.end()
            raise error
        self.interrupted = True
        if has_result and isinstance(error, ExchangeError) and error.ended and self.stop(error):
            return
        self._turns.end()
        self._told = True
        self._world.leave(described(error))
        raise self._world.explained(error) if isinstance(error, ExchangeError) else error

    def stop(self, why):
        """Another rank has stopped: let the pipeline here stop, too. False if there is none that can."""
        pipe = self._pipeline()
        if not hasattr(pipe, "_interrupt"):
            return False
        log.warning("%s; this rank stops too", why)
        pipe._interrupt = True
        return True

    def end(self):
        """The generation is over."""
        self._turns.end()
        self._tell()

    def abandon(self, why):
        """The pipeline was left in the middle, by what none of its calls of the denoiser has raised."""
        if not self._told:
            self._told = True
            self._world.leave(why, after_calls=True)

    def _tell(self):
        """Who still waits for another call of what is over here hears how many there were."""
        if not self._told:
            self._told = True
            self._world.leave()
