"""What schedulers do, seen at class level, since users swap and copy instances: counted, and handed to who asks for it.

The wrappers are there while at least one denoiser is patched. What was seen is kept by thread: the pipelines of two
threads do not see each other. That, and who listens, is the only state that all patched denoisers of a process share.
"""

import contextlib
import functools
import itertools
import threading
import weakref
import zlib

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

_wrapped = []
_users = 0
# Two threads may patch at once: neither goes on before every class is watched.
_changing = threading.Lock()
_threads = itertools.count()
# Who may carry out a step in a scheduler's stead, see `listen`; and who is told of each.
_listeners, _observers = [], []


class _Seen(threading.local):
    """Counts of one thread, and the scheduler that it used last."""

    def __init__(self):
        # Numbers of threads come again, this does not.
        self.thread = next(_threads)
        self.restarts = self.steps = 0
        self.scheduler = self.timestep = None
        # Numbers that its last step was given by name, such as eta.
        self.numbers = {}
        # Digests of torch's own generators after the last step that has drawn from one of them.
        self.drawn = None
        # A scheduler's step may call that of the class it is made from.
        self.inside = False


_seen = _Seen()


def seen():
    """(restarts, steps) of this thread until now; other threads have others."""
    return (_seen.thread, _seen.restarts), (_seen.thread, _seen.steps)


def this_thread():
    """A number of this thread, which no other has had before."""
    return _seen.thread


def last_scheduler():
    """The scheduler that this thread used last, or None."""
    return _seen.scheduler() if _seen.scheduler is not None else None


def names_once():
    """True if the list of the scheduler used last names the timestep of its last step only once.

    Another step at it is then none of the list, but of another view. Waits for a device on which they are.
    """
    listed, timestep = getattr(last_scheduler(), "timesteps", None), _seen.timestep
    if not isinstance(listed, torch.Tensor) or timestep is None:
        return False
    return int((listed == float(timestep)).sum()) == 1


def last_drawn():
    """Digests of torch's own generators after this thread's last step that drew from them; None before any has."""
    return _seen.drawn


def random_states():
    """The states of torch's own generators, of the CPU and of the current CUDA device, as bytes."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])
    return [bytes(state.numpy()) for state in states]


def last_numbers():
    """{name: text} of the numbers that this thread's last step was given by name."""
    return _seen.numbers


def listen(listener):
    """Have `listener.step(scheduler, method, args, kwargs)` called in place of a step while `listener.expects_step`."""
    _listeners.append(listener)


def unlisten(listener):
    """Undo `listen`."""
    _listeners.remove(listener)


def observe(observer):
    """Have `observer.stepping(scheduler, method, args, kwargs)` called before each step, `stepped(result)` after it."""
    _observers.append(observer)


def unobserve(observer):
    """Undo `observe`."""
    _observers.remove(observer)


@contextlib.contextmanager
def aside():
    """Steps made within are no part of any generation."""
    was, _seen.inside = _seen.inside, True
    try:
        yield
    finally:
        _seen.inside = was


def watch_schedulers():
    """Begin to watch every scheduler class, also those defined later. Calls are counted; `unwatch` undoes one."""
    global _users
    with _changing:
        _users += 1
        if _users == 1:
            for cls in set(subclasses(SchedulerMixin)):
                _wrap(cls)
            SchedulerMixin.__init_subclass__ = classmethod(_wrap_later)


def unwatch_schedulers():
    """Undo one `watch_schedulers`; the last one restores every class."""
    global _users
    with _changing:
        _users -= 1
        if _users == 0:
            for cls, name, method in _wrapped:
                setattr(cls, name, method)
            _wrapped.clear()
            del SchedulerMixin.__init_subclass__
            _seen.scheduler = _seen.timestep = None


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
    _seen.scheduler = weakref.ref(scheduler)
    return method(scheduler, *args, **kwargs)


def _stepped(method, scheduler, *args, **kwargs):
    if _seen.inside:
        return method(scheduler, *args, **kwargs)
    _seen.steps += 1
    _seen.numbers = {name: repr(x) for name, x in kwargs.items() if isinstance(x, bool | int | float | str)}
    _seen.scheduler = weakref.ref(scheduler)
    _seen.timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    _seen.inside, before = True, random_states()
    observers = tuple(_observers)
    try:
        for observer in observers:
            observer.stepping(scheduler, method, args, kwargs)
        result = _carried_out(method, scheduler, args, kwargs)
        for observer in observers:
            observer.stepped(result)
        return result
    finally:
        _seen.inside, after = False, random_states()
        if after != before:
            _seen.drawn = [zlib.crc32(state) for state in after]


def _carried_out(method, scheduler, args, kwargs):
    for listener in tuple(_listeners):
        if listener.expects_step:
            return listener.step(scheduler, method, args, kwargs)
    return method(scheduler, *args, **kwargs)


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


def subclasses(cls):
    """All classes made from a class, some perhaps more than once."""
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def _wrap_later(cls, **kwargs):
    super(SchedulerMixin, cls).__init_subclass__(**kwargs)
    _wrap(cls)
