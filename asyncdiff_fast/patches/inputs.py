"""What a `Cutter` does with the inputs of a call: in words, where sizes leave it open, and what patches cannot take."""

import torch
from torch.utils._pytree import keystr

from ..calls.containers import flattened


def told(cutter, named, joined=()):
    """In words, what is cut by what; `joined`: (name, rest of the path) of those that are cut where they are used."""
    found = []
    for name, path, x in tensors(named):
        mine = cutter.cut_input(name, x)
        by = [str(d) for d, (m, n) in enumerate(zip(x.shape, mine.shape, strict=True)) if m != n]
        if by:
            found.append(f"{name}{path} in dimension {' and '.join(by)}")
    return (*found, *(f"{name}{path} where it meets the picture" for name, path in joined))


def doubtful(cutter, named, joining):
    """Names of inputs of which sizes alone do not tell whether they run along the picture's tokens.

    Args:
        joining: names of those that are brought to the picture's rows within: they may be as large by chance.
    """
    others = [(name, x) for name, _, x in tensors(named) if name != cutter.latent_name and name not in cutter.given]
    return list(
        dict.fromkeys(
            name
            for name, x in others
            if cutter.candidates(x)
            or cutter.usual_dims(name, x)
            or (name in joining and cutter.cut_input(name, x) is not x)
        )
    )


def left_whole(cutter, named):
    """In words, the inputs that are not cut though they may run along the picture's tokens; "" without."""
    found = []
    for name, path, x in tensors(named):
        whole = name != cutter.latent_name and x.dim() > 1 and cutter.cut_input(name, x) is x
        if whole and ("mask" in name or set(x.shape[:-1]) & set(cutter.starts)):
            found.append(f"{name}{path} {list(x.shape)}")
    return f" (left whole: {', '.join(found)}; cut= says otherwise)" if found else ""


def whole(cutter, named):
    """{(name, rest of the path)} of those that are not cut."""
    return {(name, path) for name, path, x in tensors(named) if cutter.cut_input(name, x) is x}


def check_masks(cutter, named):
    """Raises: ValueError if a mask tells the picture's tokens apart: patches have one buffer of all their keys."""
    for name, _, x in tensors(named):
        if "mask" not in name or name == cutter.latent_name or x.is_meta:
            continue
        for dim in cutter.token_dims(name, x):
            picture = x.narrow(dim, cutter.starts[x.shape[dim]], cutter.grid.size)
            if not bool((picture == picture.narrow(dim, 0, 1)).all()):
                raise ValueError(
                    f"{name} masks some of the picture's tokens, which patches cannot share: use num_stages or "
                    "parallel_steps instead"
                )


def tensors(named):
    """(name, rest of the path, tensor) of all of a call's inputs."""
    leaves = flattened(named)[0]
    return [(path[0].key, keystr(path[1:]), x) for path, x in leaves if isinstance(x, torch.Tensor)]
