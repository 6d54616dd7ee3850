"""Keys and values of all patches in one buffer, as `RingState` keeps them, for tests of the kernels that read it."""


def key_value(tokens):
    """(key, value), each a (b, s, h, d) view of tokens (s, b, 2, h, d): of a part of the ring, or of the whole."""
    return tuple(x.transpose(0, 1) for x in tokens.unbind(2))
