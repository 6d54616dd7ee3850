"""Launch settings of the kernels by shape class: data, no measuring."""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Pixels × channels of one program's tile, and its warps."""

    block_p: int
    block_c: int
    num_warps: int


def statistics_tile(channels_inner, wide, chunk):
    """The `Tile` that reads chunks of `chunk` pixels, a power of two from 128: 64 elements of a thread.

    Those are eight loads in flight of 16 bytes in half precision, of 64 bytes and more that are adjacent. Pixels that
    are adjacent but no multiple of 16 bytes, not `wide`, are loaded one by one: there a thread has 16.
    """
    if channels_inner:
        num_warps = min(4, chunk // 64)
        return Tile(64 * num_warps, 32, num_warps)
    if not wide:
        return Tile(128, 16, 4)
    block_p = min(1024, chunk)
    return Tile(block_p, 8192 // block_p, 4)


# Tiles that write, by whether channels (True) or pixels (False) are neighbours in memory: wide along what is adjacent,
# so that loads and stores are 16 bytes a lane, and small enough for 8 programs on an sm_90 multiprocessor.
GROUP_NORM_APPLY = {True: Tile(32, 64, 4), False: Tile(512, 8, 8)}

# Elements of the tile of chunks and channels that one program merges at once, and its warps: most groups are one tile.
GROUP_NORM_MERGE_TILE, GROUP_NORM_MERGE_WARPS = 8192, 8

# A group up to this size is normalised in one launch by one program, which reads it twice, the second time from cache.
# Where channels are adjacent a group is a narrow stripe of every pixel, and the program waits for many small pieces.
GROUP_NORM_SMALL_BYTES = {True: 8 * 1024, False: 64 * 1024}


def small_tile(channels_inner, wide, group_channels, pixels):
    """The `Tile` that reads a group: its channels, rounded up, by a frame's pixels; of a thread as much as above."""
    block_c = 1 << (group_channels - 1).bit_length()
    # Of channels_last, 64 spill on sm_90.
    elements = 32 if channels_inner else 64 if wide else 16
    block_p = max(16, min(1 << (pixels - 1).bit_length(), 512 * elements // block_c))
    return Tile(block_p, block_c, max(1, min(16, block_p * block_c // (32 * elements))))


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
