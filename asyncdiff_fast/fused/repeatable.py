"""Whether a denoiser does the same at each call, so that one call may be captured for all, as far as one can tell."""

import functools

# Packages whose modules do.
_KNOWN = {"asyncdiff_fast", "builtins", "diffusers", "peft", "torch", "torchao", "transformers"}


def stranger(denoiser):
    """Which module or attention processor might do something else at each call, or is compiled; None if none."""
    for name, module in denoiser.named_modules():
        name = name or "the denoiser"
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            return f"{name} is compiled"
        forward = vars(module).get("forward")
        while isinstance(forward, functools.partial):
            forward = forward.func
        for part in (type(module), type(getattr(module, "processor", None)), forward):
            package = (getattr(part, "__module__", None) or "").partition(".")[0]
            if part is not None and package not in _KNOWN:
                return f"{name} is of {package or 'unknown origin'}, and might do something else at each call"
    return None
