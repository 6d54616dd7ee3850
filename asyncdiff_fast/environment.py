"""What the environment says: the variables of this package, and options as text.

`ASYNCDIFF_FAST`: options of `patch` for `import asyncdiff_fast.auto`. `ASYNCDIFF_FAST_EXCHANGE`: "torch" exchanges by
torch.distributed; "engine" by the engine, or fails; "nccl-puts" CUDA tensors by one-sided puts where they work; by
default the engine where it is built and fits. `ASYNCDIFF_FAST_CACHE`: where measured choices of kernels are kept.
"""

import os

EXCHANGE_VARIABLE = "ASYNCDIFF_FAST_EXCHANGE"
ENGINE_CHOICES = ("", "engine", "nccl-puts", "torch")


def environment_options():
    """The options in the variable ASYNCDIFF_FAST, a list such as `num_stages=2,warmup_steps=3`."""
    return parse_options(os.environ.get("ASYNCDIFF_FAST", ""))


def parse_options(text):
    """`a=1,b=x` as a dict of options: integers, floats and booleans are recognised, other values stay text.

    Raises: ValueError if an item is not NAME=VALUE.
    """
    options = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"options must be NAME=VALUE, separated by commas: got {item!r} in {text!r}")
        options[name.strip()] = _parsed(value.strip())
    return options


def _parsed(text):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
