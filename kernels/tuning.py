"""Launch settings of the kernels by shape class: data, no measuring."""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Pixels × channels of one program's tile, and its warps."""

    block_p: int
    block_c: int
    num_warps: int


# By pass, and by whether channels (True) or pixels (False) are neighbours in memory. Tiles are wide along what is
# adjacent, so that loads and stores are 16 bytes a lane, and small enough for 8 programs on an sm_90 multiprocessor.
GROUP_NORM = {
    ("stats", True): Tile(32, 64, 4),
    ("stats", False): Tile(256, 16, 8),
    ("apply", True): Tile(32, 64, 4),
    ("apply", False): Tile(512, 8, 8),
}

# A group up to this size is normalised in one launch by one program, which reads it twice, the second time from cache.
GROUP_NORM_SMALL_BYTES = 64 * 1024
# Elements of a tile of that kernel, whose other side is the channels of a group, rounded up; and its warps.
GROUP_NORM_SMALL_TILE = 4096
GROUP_NORM_SMALL_WARPS = 8

# Elements that one program of `pack_rows` copies.
HALO_BLOCK = 1024


class AttentionSettings(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of its pipeline, programs that share a multiprocessor."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    per_sm: int


# By the largest head size of a class, fp16 and bf16.
ATTENTION = {
    32: AttentionSettings(128, 64, 4, 3, 2),
    48: AttentionSettings(128, 64, 8, 2, 2),
    64: AttentionSettings(128, 64, 8, 3, 2),
    80: AttentionSettings(128, 64, 8, 2, 2),
    128: AttentionSettings(128, 64, 8, 2, 1),
    160: AttentionSettings(128, 32, 8, 2, 1),
}
# Above a head size of 64 fp32 does not fit into registers: right, but slow.
ATTENTION_FP32 = AttentionSettings(64, 16, 4, 2, 1)

# The multiprocessors of an H100 or H200, whatever the device is: how keys are split must not depend on where it runs.
ATTENTION_SMS = 132
ATTENTION_SPLIT_KEYS = 256
ATTENTION_SPLITS = 16


def attention_settings(head_size, dtype, num_segments=1):
    """The `AttentionSettings` of a head size up to 160, a dtype and a number of segments."""
    if dtype == torch.float32:
        return ATTENTION_FP32
    found = next(settings for largest, settings in ATTENTION.items() if head_size <= largest)
    # Where many segments lie takes registers, which with a third stage do not suffice on sm_100.
    return found._replace(num_stages=2) if num_segments > 2 else found


def attention_splits(num_tiles, num_keys, settings):
    """Programs among which the keys of one row are divided.

    The fewest that keep nine tenths of the device busy, else the number that keeps most of it busy; 256 keys at least.
    """
    slots = ATTENTION_SMS * settings.per_sm
    best, best_share = 1, 0.0
    for splits in range(1, max(1, min(ATTENTION_SPLITS, num_keys // ATTENTION_SPLIT_KEYS)) + 1):
        programs = num_tiles * splits
        share = programs / (-(-programs // slots) * slots)
        if share > best_share:
            best, best_share = splits, share
        if share >= 0.9:
            break
    return best


# Elements of a tile of GELU and GEGLU, and its warps; 16 elements a lane are two loads of 16 bytes in half precision.
GELU_TILE, GELU_WARPS = 2048, 4
# Elements of a tile of tokens × heads × head size, and its warps.
QK_NORM_ROPE_TILE, QK_NORM_ROPE_WARPS = 2048, 4


def columns_block(columns):
    """Columns of a GELU tile: the largest power of two from 128 to 2048 that divides them, else one that pads."""
    for block in (2048, 1024, 512, 256, 128):
        if columns % block == 0:
            return block
    return min(512, 1 << (columns - 1).bit_length())


def row_warps(block):
    """Warps for one row of `block` elements, a power of two: 16 elements a lane, at most 16 warps."""
    return max(1, min(16, block // 512))


def qk_norm_rope_block(num_heads, block_d):
    """(tokens, heads) of a tile: heads by the power of two up to 8 that divides them best."""
    heads = next(block for block in (8, 4, 2, 1) if num_heads % block == 0 or block == 4)
    return max(1, QK_NORM_ROPE_TILE // (heads * block_d)), heads
