"""Memory of one layer's keys and values: every part of the sequence is one block, all parts together are one view.

Layout (depth, tokens, batch, 2, heads, head size). Tokens come first, so the part that one rank makes is contiguous
whatever the batch, and travels as it is. `key()` and `value()` of all parts are plain strided views, which
scaled_dot_product_attention and `attention.attention` read in place: nothing is packed, unpacked or concatenated.
"""

import torch


class KVRing:
    """Keys and values in parts, by token offsets.

    Tokens that every rank computes itself, such as a DiT's text, can be a part that is never sent: joint attention then
    reads one view too. With `depth` > 1 there are as many rings, chosen by `buffer`.

    Args:
        bounds: first token of each part and, last, the number of tokens: (0, 1024, 2048) has two parts.
        batch, heads, head_size: the other sizes.
        dtype, device: of the memory, which begins as zeros.
        depth: number of rings.
    Raises: ValueError if the bounds are not 0 and then rising, or there is no ring.
    """

    def __init__(self, bounds, batch, heads, head_size, dtype, device, depth=1):
        self.bounds = tuple(bounds)
        rising = all(first <= last for first, last in zip(self.bounds, self.bounds[1:], strict=False))
        if len(self.bounds) < 2 or self.bounds[0] != 0 or not rising or depth < 1:
            raise ValueError(f"bounds must be 0 and then rising, depth at least 1: got {self.bounds} and {depth}")
        shape = (depth, self.bounds[-1], batch, 2, heads, head_size)
        # An ordinary tensor, whatever mode the first call runs in: it is written in later ones too.
        with torch.inference_mode(False):
            self._memory = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def num_parts(self):
        """Number of parts."""
        return len(self.bounds) - 1

    def part(self, part, buffer=0):
        """(s_i, b, 2, h, d), contiguous: what a rank sends, and where its peers receive it."""
        return self._tokens(part, part + 1, buffer)

    def slot(self, part, buffer=0):
        """(key, value) of one part, (b, s_i, h, d) each: views for a projection or a kernel to write to."""
        return self.key(part, part + 1, buffer), self.value(part, part + 1, buffer)

    def write(self, part, key, value, buffer=0):
        """Copy key and value, (b, s_i, h, d) each, into one part."""
        for mine, other in zip(self.slot(part, buffer), (key, value), strict=True):
            if mine.shape != other.shape:
                raise ValueError(f"part {part} takes (b, s, h, d) = {tuple(mine.shape)}: got {tuple(other.shape)}")
            mine.copy_(other)

    def key(self, first=0, last=None, buffer=0):
        """(b, s, h, d), a view of the keys of parts first to last − 1."""
        return self._tokens(first, last, buffer)[:, :, 0].transpose(0, 1)

    def value(self, first=0, last=None, buffer=0):
        """(b, s, h, d), a view of the values of parts first to last − 1."""
        return self._tokens(first, last, buffer)[:, :, 1].transpose(0, 1)

    def _tokens(self, first, last, buffer):
        last = self.num_parts if last is None else last
        if not 0 <= first < last <= self.num_parts:
            raise IndexError(f"parts must be among the ring's {self.num_parts}: got {first} to {last - 1}")
        return self._memory[buffer, self.bounds[first] : self.bounds[last]]
