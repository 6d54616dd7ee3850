"""What `asyncdiff-fast profile` does on each rank: one picture to plan and warm up, one that is looked at."""

import os
import sys

from . import folder


def draw(path, options, inputs, out):
    """Patch the pipeline in a folder, call it twice, and write and print what the second call shows. Collective.

    Args:
        options: of `patch`.
        inputs: of the pipeline's call.
        out: folder for what is found.
    Returns: exit code, 2 on all ranks where the pipeline cannot be shared so, or `out` cannot be written.
    """
    import torch

    from ..patching import device, patch, unpatch
    from ..profiling.session import profile

    place = device()
    if place.type == "cpu":
        torch.set_num_threads(1)
    pipe = folder.load(path, place, torch.float32 if place.type == "cpu" else torch.float16)
    try:
        patch(pipe, **options)
        pipe(**inputs, generator=torch.Generator().manual_seed(0))
        with profile(out) as found:
            pipe(**inputs, generator=torch.Generator().manual_seed(0))
        unpatch(pipe)
    except (ValueError, TypeError, OSError) as error:
        # All ranks refuse alike.
        if os.environ["RANK"] == "0":
            print(f"asyncdiff-fast: no profile: {error}", file=sys.stderr, flush=True)
        return 2
    if found.text:
        print(f"{found.text}\n\nsee {out / 'step.png'}, and open {out / 'trace.json'} in https://ui.perfetto.dev")
    return 0
