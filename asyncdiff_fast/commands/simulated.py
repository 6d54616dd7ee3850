"""`plan --simulate`: what a plan would take on a cluster, from how fast one device is."""

import dataclasses
import time


def as_asked(pipe, inputs, made, request, num_steps):
    """The `Simulated` of a plan. Where the request says nothing of a device's speed, a call is timed here.

    Raises: ValueError if the cluster is too small, or the plan tells no times.
    """
    from ..simulation.simulate import simulate
    from ..simulation.times import Times

    seconds = request.call_s
    if seconds is None:
        seconds = _seconds_of_a_call(pipe, inputs, request.tflops)
    return simulate(made, Times(seconds), request.cluster, num_steps)


def as_dict(found):
    """A `Simulated`, fit for JSON."""
    names = [field.name for field in dataclasses.fields(found) if field.name not in ("config", "cluster")]
    return {"cluster": dataclasses.asdict(found.cluster), "speed_up": found.speed_up} | {
        name: getattr(found, name) for name in names
    }


def _seconds_of_a_call(pipe, inputs, tflops):
    """Of the first call of a pipeline's denoiser: by counted work and TFLOP/s, or the faster of two here."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ..denoisers import denoisers
    from ..first_call import first_call

    denoiser = denoisers(pipe)[0]
    args, kwargs = first_call(pipe, denoiser, inputs)
    with torch.no_grad():
        if tflops is not None:
            with FlopCounterMode(display=False) as counter:
                denoiser(*args, **kwargs)
            return counter.get_total_flops() / (tflops * 1e12)
        took = []
        for _ in range(2):
            began = time.perf_counter()
            denoiser(*args, **kwargs)
            took.append(time.perf_counter() - began)
    return min(took)
