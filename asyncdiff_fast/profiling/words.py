"""The names of ranges in a trace: their kind, what it is, and facts, as `text` writes and `parsed` reads them."""

PREFIX = "asyncdiff_fast"
# Kinds of ranges. A mark has no length: it says how the call or step around it is made.
CALL, SAMPLER, UNIT, SITE, MICRO, REPLAY = "call", "sampler", "unit", "site", "micro-step", "replay"
POST, WAIT, AGREE = "post", "wait", "agree"
STALE, BLOCK = "stale", "block"
MARKS = (STALE, BLOCK)
# What is kept out of names: the signs that part a name, and what JSON would escape.
_FORBIDDEN = str.maketrans({"|": "/", '"': "'", "\\": "/"})


def text(kind, what="", **facts):
    """The name of a range."""
    words = [str(what), *(f"{name}={value}" for name, value in facts.items())]
    return "|".join([PREFIX, kind, *(word.translate(_FORBIDDEN) for word in words)])


def parsed(name):
    """(kind, what, {fact: text}) of a range's name; None of another name."""
    words = name.split("|")
    if words[0] != PREFIX or len(words) < 3:
        return None
    return words[1], words[2], dict(word.split("=", 1) for word in words[3:])
