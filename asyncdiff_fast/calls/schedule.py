"""What a rank does at a step: compute exactly, compute from stale inputs, or repeat. Pure."""

import enum


class Mode(enum.Enum):
    """How one call of the denoiser is carried out."""

    EXACT = "every rank computes everything"
    COMPUTE = "each rank computes its stage from stale inputs"
    REPEAT = "nothing is computed; the prediction was made at the step before"


class PatchMode(enum.Enum):
    """From which call the other patches' rows, statistics, keys and values are."""

    LOCAL = "none: every patch works for itself"
    SYNC = "this call"
    DISPLACED = "the call before"
    FROZEN = "the last synchronous call"


def patch_mode(config, step):
    """`PatchMode` of a call at `step`."""
    if config.naive:
        return PatchMode.LOCAL
    if step < config.least_warmup or config.exchange == "sync":
        return PatchMode.SYNC
    return PatchMode.DISPLACED if config.exchange == "displaced" else PatchMode.FROZEN


def patch_axis(config, step):
    """Along which dimension of a picture patches are cut at `step`: -2 into rows, -1 into columns."""
    if config.patch_axis == "alternating":
        return -1 if step % 2 else -2
    return -1 if config.patch_axis == "columns" else -2


def has_state(config, tick, last_step):
    """True if a call may read what the latest call of its kind has made, at `last_step` (-1: none in this generation).

    That one was made at the step before; with steps side by side by the same ranks, as many steps ago as there are of
    them at most: ranks that were left out of a shorter block begin again with an exact call.
    """
    age = tick.step - last_step
    return not tick.exact and last_step >= 0 and 1 <= age <= config.parallel_steps


def mode(config, step, has_state=True):
    """Mode of a call at `step` (counted from 0 in each generation).

    Args:
        has_state: False if there is nothing that the call may read, see `has_state`; it is then exact.
    """
    if config.num_stages == 1 or not has_state or step < config.least_warmup:
        return Mode.EXACT
    if config.stride == 1:
        return Mode.COMPUTE
    since = step if config.stride_phase == "odd" else step - config.warmup_steps + 1
    return Mode.COMPUTE if since % 2 else Mode.REPEAT


def timestep_offset(config, rank, is_last_step):
    """Which timestep a computing rank uses at an asynchronous step: 0 the caller's, -1 the one before, +1 the next.

    With stride 2 the stages compute ahead for the next step, whose call repeats their result; the extra rank computes
    the last stage for the current one. At the last step there is no next.
    Source: AsyncDiff, section 3.4.
    """
    shift = -1 if config.time_shift else 0
    if config.stride == 1 or is_extra(config, rank) or is_last_step:
        return shift
    return shift + 1


def is_extra(config, rank):
    """True for the rank that repeats the last stage's work with stride 2."""
    return rank >= config.num_stages


def stage_of(config, rank):
    """Stage whose units a rank computes."""
    return min(rank, config.num_stages - 1)
