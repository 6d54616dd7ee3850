"""What schedulers do, seen at class level, since users swap and copy instances: counted, and handed to who asks for it.

The wrappers are there while at least one denoiser is patched. What was seen is kept by thread: the pipelines of two
threads do not see each other. That, and who listens, is the only state that all patched denoisers of a process share.
"""

import functools
import itertools
import threading
import weakref

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..versions import version

_wrapped = []
_users = 0
_threads = itertools.count()
# Who may carry out a step in a scheduler's stead, see `listen`.
_listeners = []


class _Seen(threading.local):
    """Counts of one thread, and the scheduler that it used last."""

    def __init__(self):
        # Numbers of threads come again, this does not.
        self.thread = next(_threads)
        self.restarts = self.steps = 0
        self.scheduler = None
        # A scheduler's step may call that of the class it is made from.
        self.inside = False
        # The timestep of the latest step, its version, and how many steps in a row had it.
        self.timestep, self.version, self.repeats = None, None, 0


_seen = _Seen()


def seen():
    """(restarts, steps) of this thread until now; other threads have others."""
    return (_seen.thread, _seen.restarts), (_seen.thread, _seen.steps)


def last_scheduler():
    """The scheduler that this thread used last, or None."""
    return _seen.scheduler() if _seen.scheduler is not None else None


def listen(listener):
    """Have `listener.step(scheduler, method, args, kwargs)` called in place of a step while `listener.expects_step`."""
    _listeners.append(listener)


def unlisten(listener):
    """Undo `listen`."""
    _listeners.remove(listener)


def watch_schedulers():
    """Begin to watch every scheduler class, also those defined later. Calls are counted; `unwatch` undoes one."""
    global _users
    _users += 1
    if _users == 1:
        for cls in set(_subclasses(SchedulerMixin)):
            _wrap(cls)
        SchedulerMixin.__init_subclass__ = classmethod(_wrap_later)


def unwatch_schedulers():
    """Undo one `watch_schedulers`; the last one restores every class."""
    global _users
    _users -= 1
    if _users == 0:
        for cls, name, method in _wrapped:
            setattr(cls, name, method)
        _wrapped.clear()
        del SchedulerMixin.__init_subclass__
        _seen.scheduler = None


def watch_instance(scheduler):
    """Watch one scheduler that is not diffusers'. Returns a function that undoes it."""
    if scheduler is None or isinstance(scheduler, SchedulerMixin):
        return lambda: None
    put = {}
    for name, watched in (("set_timesteps", _restarted), ("step", _stepped)):
        method = getattr(type(scheduler), name, None)
        if callable(method) and name not in vars(scheduler):
            put[name] = functools.wraps(method)(functools.partial(watched, method, scheduler))
            setattr(scheduler, name, put[name])

    def undo():
        for name, ours in put.items():
            if vars(scheduler).get(name) is ours:
                delattr(scheduler, name)

    return undo


def _restarted(method, scheduler, *args, **kwargs):
    _seen.restarts += 1
    _seen.timestep = None
    _seen.scheduler = weakref.ref(scheduler)
    return method(scheduler, *args, **kwargs)


def _stepped(method, scheduler, *args, **kwargs):
    if _seen.inside:
        return method(scheduler, *args, **kwargs)
    if not _is_again(scheduler, _timestep(args, kwargs)):
        _seen.steps += 1
    _seen.scheduler = weakref.ref(scheduler)
    _seen.inside = True
    try:
        for listener in _listeners:
            if listener.expects_step:
                return listener.step(scheduler, method, args, kwargs)
        return method(scheduler, *args, **kwargs)
    finally:
        _seen.inside = False


def _timestep(args, kwargs):
    return kwargs["timestep"] if "timestep" in kwargs else args[1] if len(args) > 1 else None


def _is_again(scheduler, timestep):
    """True if a step was made with this very timestep before: of another view of the picture, and no new step.

    A list may name a timestep twice, as those of second order do: those are tensors of their own.
    """
    last, before, repeats = _seen.timestep, _seen.version, _seen.repeats
    _seen.timestep, _seen.version = timestep, version(timestep)
    if timestep is None or last is None:
        again = False
    elif isinstance(timestep, torch.Tensor) and isinstance(last, torch.Tensor):
        same = timestep.data_ptr() == last.data_ptr() and _seen.version == before
        again = same and timestep.shape == last.shape
        if not again and timestep.device.type == "cpu" and timestep.numel() == 1:
            again = timestep.shape == last.shape and bool(timestep == last) and _is_spent(scheduler, timestep, repeats)
    else:
        again = not isinstance(timestep, torch.Tensor) and timestep == last and _is_spent(scheduler, timestep, repeats)
    _seen.repeats = repeats if again else repeats + 1 if _is_equal(timestep, last) else 1
    return again


def _is_equal(timestep, last):
    """True if two timesteps are the same number, as far as that is known without waiting for a device."""
    kinds = (isinstance(timestep, torch.Tensor), isinstance(last, torch.Tensor))
    if timestep is None or last is None or any(kinds):
        ready = all(kinds) and timestep.device.type == last.device.type == "cpu" and timestep.shape == last.shape
        return ready and torch.equal(timestep, last)
    return timestep == last


def _is_spent(scheduler, timestep, times):
    """True if a scheduler's list names a timestep no more than `times` times."""
    listed = getattr(scheduler, "timesteps", None)
    if not isinstance(listed, torch.Tensor) or listed.device.type != "cpu":
        return False
    number = int((listed == float(timestep)).sum())
    return 0 < number <= times


def _wrap(cls):
    for name, watched in (("set_timesteps", _restarted), ("step", _stepped)):
        method = cls.__dict__.get(name)
        if callable(method):
            setattr(cls, name, _bound(method, watched))
            _wrapped.append((cls, name, method))


def _bound(method, watched):
    @functools.wraps(method)
    def run(self, *args, **kwargs):
        return watched(method, self, *args, **kwargs)

    return run


def _subclasses(cls):
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _wrap_later(cls, **kwargs):
    super(SchedulerMixin, cls).__init_subclass__(**kwargs)
    _wrap(cls)
