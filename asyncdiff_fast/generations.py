"""The generations of one patched denoiser on one rank: whose calls they are, whether ranks agree, how they end."""

import logging

from .alike import Alike
from .calls.turns import Turns
from .exchange.engine import described
from .exchange.errors import ExchangeError

log = logging.getLogger(__name__)


class Generations:
    """One thread's at a time; a rank that ends one tells the others, and one that fails.

    Args:
        world: all ranks of the mesh.
        pipeline: returns the pipeline, None where there is none.
        scheduler: the caller's, if it is not one of diffusers'.
    """

    def __init__(self, world, denoiser, pipeline, scheduler):
        self._world, self._pipeline = world, pipeline
        self._alike = Alike(world, denoiser, pipeline, scheduler)
        self._turns = Turns(world.timeout_s)
        # An exception has ended the last one: messages may be left half-way.
        self.interrupted = False
        # Calls in the one under way or last ended; whether the others know how many.
        self._made, self._told = 0, True

    @property
    def is_inside(self):
        """True within a call of this thread."""
        return self._turns.is_inside

    @property
    def is_taken(self):
        """True if another thread's goes on."""
        return self._turns.is_taken

    def tick(self, timestep, key):
        """Place the next call, see `Turns.tick`; `leave` follows."""
        return self._turns.tick(timestep, key)

    def leave(self):
        """The call is over."""
        self._turns.leave()

    def begin(self, named, interrupted, moved):
        """What every rank reports at the first call, with arguments `named`. Collective.

        Args:
            interrupted: whether the last generation ended in the middle of something.
            moved: whether this rank's weights lie on another device than exchanges were opened for.
        """
        self._tell()
        mine = self._alike.report(named) | {
            "interrupted": self.interrupted or interrupted,
            "made": self._made,
            "moved": moved,
        }
        reports = self._world.begin(mine, "the start of a generation")
        self._made, self._told = 0, False
        return reports

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
                f"{error}; several threads share this denoiser: on every rank they must begin in the same order, one "
                "after the other"
            ) from None

    def count(self, tick, latent):
        """One more call; the first of a step is compared with the others'. Collective at the second step."""
        self._made += 1
        self._world.calls += 1
        if tick.step == 0 or tick.call > 0 or self._world.size == 1:
            return
        self._alike.check_draws(tick.step)
        if tick.step == 1:
            self._alike.check_step(latent)

    def fail(self, error, has_result):
        """An exception has come out of a call: tell the others. Raises it, with what they know of it.

        Returns if another rank has ended this generation and the pipeline stops in diffusers' own way: then any result
        of the call will do, if there is one.
        """
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

    def _tell(self):
        """Who still waits for another call of what is over here hears how many there were."""
        if not self._told:
            self._told = True
            self._world.leave()
