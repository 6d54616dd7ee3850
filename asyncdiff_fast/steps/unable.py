"""Schedulers whose steps cannot run side by side, and why."""

# One evaluation a call of `step`, but several calls make one step of the solver.
_SEVERAL = {"DPMSolverSinglestepScheduler"}


def why_not(scheduler):
    """Why a scheduler's steps must be exact, or None."""
    name, kinds = type(scheduler).__name__, {cls.__name__ for cls in type(scheduler).__mro__}
    if getattr(scheduler, "order", 1) != 1 or kinds & _SEVERAL:
        return f"{name} makes more than one evaluation a step"
    prk = getattr(scheduler, "prk_timesteps", None)
    if prk is not None and getattr(scheduler, "counter", len(prk)) < len(prk):
        return f"{name} begins with Runge-Kutta steps of four evaluations each; pass skip_prk_steps=True"
    return None
