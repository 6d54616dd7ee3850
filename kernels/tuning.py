"""Launch settings of the kernels by shape class: data, no measuring. A class without a row takes the default beside it."""

from typing import NamedTuple


class Tile(NamedTuple):
    """Pixels × channels of one program's tile, and its warps."""

    block_p: int
    block_c: int
    num_warps: int


# By pass, and by whether channels (True) or pixels (False) are neighbours in memory. Tiles are wide along what is adjacent, so that
# loads and stores are 16 bytes a lane, and small enough for 8 programs on an sm_90 multiprocessor.
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

HALO_ROW_TILE = 1024
