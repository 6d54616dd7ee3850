"""Schedulers whose steps cannot run side by side, and why."""

# One evaluation a call of `step`, but several calls make one step of the solver.
_SEVERAL = {"DPMSolverSinglestepScheduler"}


def why_not(scheduler):
    """Why a scheduler's steps must be exact, or None."""
    name, kinds = type(scheduler).__name__, {cls.__name__ for cls in type(scheduler).__mro__}
    if getattr(scheduler, "order", 1) != 1 or kinds & _SEVERAL:
        return f"{name} makes more than one evaluation a step"
    return None


def starts_slowly(scheduler):
    """True while a scheduler makes first steps of several evaluations (Runge-Kutta, of `PNDMScheduler`)."""
    prk = getattr(scheduler, "prk_timesteps", None)
    return prk is not None and getattr(scheduler, "counter", len(prk)) < len(prk)
