"""Latents in a list, one tensor for each picture: patches see them as one tensor, the denoiser gets its list."""

import torch


def stacked(signature, forward, run, args, kwargs):
    """(forward, run, args, kwargs) with one tensor for a latent that is a list of pictures of one size, else as given.

    Args:
        forward, run: `forward(*args, **kwargs)` and `run(args, kwargs)` take what the caller gave.
    """
    latent = signature.latent(args, kwargs)
    pictures = list(latent) if isinstance(latent, list | tuple) else []
    alike = {(x.shape, x.dtype) if isinstance(x, torch.Tensor) else None for x in pictures}
    if len(alike) != 1 or None in alike:
        return forward, run, args, kwargs

    def in_a_list(args, kwargs):
        return signature.with_latent(args, kwargs, type(latent)(signature.latent(args, kwargs).unbind()))

    def forward_list(*args, **kwargs):
        args, kwargs = in_a_list(args, kwargs)
        return forward(*args, **kwargs)

    def run_list(args, kwargs):
        return run(*in_a_list(args, kwargs))

    return forward_list, run_list, *signature.with_latent(args, kwargs, torch.stack(pictures))
