"""The attention launches that are compiled for every target: each row of the settings, and what a launch may ask."""

from functools import partial

import torch
from asyncdiff_fast.kernels.attention import attention
from compile_kernels import TARGETS, Variant

KERNEL = ("_attention_kernel",)


def launch(head_size, dtype=torch.bfloat16, queries=(1024,), keys=(4096,), heads=10, num_splits=1, **options):
    def tensor(size):
        return torch.empty(1, size, heads, head_size, dtype=dtype)

    queries = tuple(map(tensor, queries))
    segments = [(tensor(size), tensor(size)) for size in keys]
    attention(queries if len(queries) > 1 else queries[0], segments, num_splits=num_splits, **options)


# On gfx942 a head of 128 spills registers and one of 160 needs too much shared memory: these stay with the library.
NO_GFX942 = tuple(target for target in TARGETS if target != "gfx942")
# Where products read tiles by descriptors.
BY_DESCRIPTORS = ("sm_90", "sm_100")
# Text and ring with left-overs, a split with its merge, both outputs of joint attention.
JOINT = {"queries": (333, 512), "keys": (333, 4096), "num_splits": 4, "return_lse": True}
EIGHT = {"keys": (333, *[512] * 7)}
# A token's text of one key, one query: sizes that Triton makes constants of.
ONE = {"queries": (1, 1), "keys": (1, 1, 77), "num_splits": 2, "heads": 1}
VARIANTS = [
    *(
        Variant(f"head {d}", partial(launch, d), KERNEL, KERNEL, NO_GFX942 if d > 96 else tuple(TARGETS))
        for d in (32, 40, 64, 80, 96, 128)
    ),
    # On sm_80 three values spill, unless keys are divided.
    Variant("head 160", partial(launch, 160), KERNEL, KERNEL, BY_DESCRIPTORS),
    Variant("head 160, divided", partial(launch, 160, num_splits=3), KERNEL, KERNEL, NO_GFX942),
    Variant("head 64, float16", partial(launch, 64, torch.float16), KERNEL, KERNEL),
    Variant("head 64, joint", partial(launch, 64, **JOINT), KERNEL, KERNEL),
    Variant("head 128, joint", partial(launch, 128, **JOINT), KERNEL, KERNEL, NO_GFX942),
    Variant("head 64, four segments", partial(launch, 64, keys=(333, 1024, 2048, 1024)), KERNEL, KERNEL),
    Variant("head 64, eight segments, joint", partial(launch, 64, **JOINT | EIGHT), KERNEL, KERNEL),
    # Left-overs of two and three segments, where a head is in two pieces: of these descriptors were mixed up.
    *(
        Variant(f"head {d}, left-overs of {len(keys)}", partial(launch, d, keys=keys), (), KERNEL, BY_DESCRIPTORS)
        for d in (40, 80, 96, 160)
        for keys in ((77, 200), (333, 129, 77))
    ),
    # The next block's scores beside this one's probabilities; on sm_80 heads of 128 spill, on sm_100 of 64.
    Variant("head 64, ahead", partial(launch, 64, ahead=True), KERNEL, KERNEL, ("sm_80", "sm_90", "gfx942")),
    Variant("head 128, ahead", partial(launch, 128, ahead=True), KERNEL, KERNEL, BY_DESCRIPTORS, beside=KERNEL),
    # So many segments take the registers that would be needed beside.
    Variant(
        "head 128, ahead, joint, eight segments",
        partial(launch, 128, ahead=True, **JOINT | EIGHT),
        KERNEL,
        KERNEL,
        BY_DESCRIPTORS,
    ),
    # On sm_100 four values spill, of a query that has three keys.
    Variant("head 40, ones", partial(launch, 40, **ONE), (), KERNEL, ("sm_80", "sm_90", "gfx942")),
    Variant("head 64, float32", partial(launch, 64, torch.float32), KERNEL, (), NO_GFX942),
]
