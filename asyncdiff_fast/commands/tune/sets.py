"""The sets of options that may be worth trying with a number of processes. Pure."""

from dataclasses import dataclass

from ...config import Config
from ..launch import as_text

# Beside the default ones.
STAGES_WARMUP, PATCHES_WARMUP, TOLERANCES = (2, 8), (2,), (0.005, 0.04)


@dataclass(frozen=True)
class Set:
    """Options of `patch`; sets of one `way` differ in what no plan tells apart: exact steps, tolerance."""

    options: tuple
    way: str

    @property
    def name(self):
        """The options as one writes them."""
        return as_text(dict(self.options)).replace(",", ", ")

    @property
    def config(self):
        """Their `Config`."""
        return Config.from_options(dict(self.options))

    def as_planned(self):
        """The options that plans depend on."""
        return {name: x for name, x in self.options if name not in ("warmup_steps", "tolerance")}


def option_sets(num_processes, guided):
    """[`Set`] for all processes together, the default of each way first.

    Args:
        guided: the pipeline uses guidance, so that its halves can be shared.
    """
    found = []
    for halves in (1, 2) if guided and num_processes % 2 == 0 else (1,):
        base = {"cfg_parallel": True} if halves == 2 else {}
        ranks = num_processes // halves
        for options, variants in _ways(ranks) if ranks > 1 else [({}, [{}])] if base else []:
            found += [base | options | more for more in variants]
    return [Set(tuple(o.items()), _way(o)) for o in found if _fits(o, num_processes)]


def _ways(n):
    """[(options, their variants)] for n ranks."""
    yield {"parallel_steps": n}, [{}, *({"tolerance": t} for t in TOLERANCES)]
    yield {"num_stages": n}, [{}, *({"warmup_steps": w} for w in STAGES_WARMUP)]
    if n > 2:
        yield {"num_stages": n - 1, "stride": 2}, [{}, {"warmup_steps": 8}]
    yield {"num_patches": n}, [{}, *({"warmup_steps": w} for w in PATCHES_WARMUP)]
    yield {"num_patches": n, "exchange": "sync"}, [{}]
    yield {"num_stages": n, "pipeline_patches": 2 * n}, [{}]
    for a in range(2, n // 2 + 1):
        if n % a == 0:
            yield {"num_patches": a, "num_stages": n // a}, [{}]
            yield {"parallel_steps": a, "num_patches": n // a, "exchange": "sync"}, [{}]


def _way(options):
    return as_text({name: x for name, x in options.items() if name not in ("warmup_steps", "tolerance")})


def _fits(options, num_processes):
    """False where options do not go together."""
    try:
        return Config.from_options(options).world_size == num_processes
    except ValueError:
        return False
