"""What `unpatch` leaves of a denoiser that was shared in every way at once: nothing."""

import ranks
from bare import Bare, loop

import asyncdiff_fast

WAYS = (dict(num_stages=2, num_patches=2), dict(num_patches=2, cfg_parallel=True))


def _state(model):
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def _left(rank, ways):
    """Names of modules that are not as before, for each way."""
    found = []
    for options in ways:
        model = Bare()
        before = _state(model)
        asyncdiff_fast.patch(model, warmup_steps=2, timeout_s=30, **options)
        # Two sizes: two plans, and hooks of both.
        for size in (16, 24):
            loop(model, size=size, calls=2 if "cfg_parallel" in options else 1)
        asyncdiff_fast.unpatch(model)
        found.append([name for name, attributes in _state(model).items() if attributes != before[name]])
    return found


def test_no_hook_is_left():
    assert ranks.run(4, _left, WAYS) == [[[], []]] * 4
