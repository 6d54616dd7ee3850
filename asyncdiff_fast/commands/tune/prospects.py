"""What ways to share would take, by plan and simulation, with times and links as measured."""

import os

# Steps of the sampler in the picture by which a call is timed.
SHORT = 6


class Prospects:
    """Plans each way once. A call of one device is timed when first asked.

    Args:
        pipe: a pipeline as yet unpatched; `artist` draws with it.
        link: (latency in seconds, GB/s), or None.
        place: the device.
    """

    def __init__(self, pipe, artist, prompt, num_processes, link, place):
        self._pipe, self._artist, self._prompt, self._n = pipe, artist, prompt, num_processes
        self._link, self._place, self._known, self._one = link or (0.0, 1e3), place, {}, None

    @property
    def is_guided(self):
        """True if the pipeline's calls have two halves, or it does not say."""
        return getattr(self._pipe, "do_classifier_free_guidance", True) is not False

    def of(self, one, num_steps):
        """(seconds of a picture, None) of a `Set`, or (None, why it cannot be had)."""
        if self._one is None:
            self._one = self._timed()
        if one.way not in self._known:
            self._known[one.way] = self._simulated(one)
        found = self._known[one.way]
        if isinstance(found, str):
            return None, found
        warmup = one.config.warmup_steps
        exact = 1 if warmup == "auto" else min(warmup, num_steps)
        return self._one[1] + exact * found.exact_s + (num_steps - exact) * found.step_s, None

    def _timed(self):
        """(seconds of a step, and of the rest of a picture) on one device."""
        self._artist.steps = SHORT
        drawn = self._artist.draw(self._prompt, 0, 1)
        return drawn.step_s, max(0.0, drawn.seconds - SHORT * drawn.step_s)

    def _simulated(self, one):
        from ...patching import plan
        from ...simulation.cluster import Cluster, Link
        from ...simulation.simulate import simulate
        from ...simulation.times import Times

        latency_s, gbs = self._link
        # Processors copy themselves.
        link = Link(latency_s, gbs, steals=1.0 if self._place.type == "cpu" else 0.0)
        try:
            made = plan(self._pipe, {"prompt": self._prompt}, **one.as_planned())
            found = simulate(made, Times(self._one[0]), Cluster(1, self._n, link, link))
        except (ValueError, TypeError) as error:
            return str(error)
        needed, free = max(found.buffer_bytes), _free_bytes(self._place, self._n)
        if free is not None and needed > free:
            return f"needs {needed / 1e6:.0f} MB of buffers on each device, {free / 1e6:.0f} MB are free"
        return found


def _free_bytes(place, num_processes):
    """Memory that is left for each process, or None."""
    import torch

    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // num_processes
    except (ValueError, OSError):
        return None
