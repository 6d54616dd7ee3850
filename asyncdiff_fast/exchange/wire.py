"""What ranks tell each other as text: plain data in JSON, of bounded size, and nothing that could run.

None, numbers, strings and lists are themselves; everything else is an object with one key, which says what it is:
{"t": [...]} a tuple, {"d": [[key, value], ...]} a dict, {"b": "..."} bytes in base64, {"y": "float32"} a dtype of torch
and {"c": [name, value, ...]} one of the dataclasses in `KNOWN`, by its fields. Where the variable ASYNCDIFF_FAST_SECRET
is set, to the same for all ranks, messages are signed with it, and others are refused.
"""

import base64
import binascii
import dataclasses
import hashlib
import hmac
import json
import os

import torch

SECRET_VARIABLE = "ASYNCDIFF_FAST_SECRET"
# The longest message; the plan of a large model has under one megabyte.
MOST_BYTES = 64 << 20
_DTYPES = {str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.dtype)}
# {name: dataclass} of what may travel beside plain data.
KNOWN = {}


class Malformed(ValueError):
    """A message that no rank of this run has written."""


def register(cls):
    """Let the instances of a dataclass travel by their fields. A decorator."""
    KNOWN[cls.__name__] = cls
    return cls


def dumps(value, place=""):
    """A value as bytes; `place` is where they will stand, and part of what is signed. Raises: TypeError, ValueError."""
    body = json.dumps(_packed(value), separators=(",", ":")).encode()
    if len(body) > MOST_BYTES:
        raise ValueError(f"ranks tell each other at most {MOST_BYTES} bytes at once: got {len(body)}")
    return _signature(body, place) + body


def loads(message, place=""):
    """The value of `dumps`. Raises: Malformed."""
    signed = len(_signature(b"", place))
    signature, body = message[:signed], message[signed:]
    if len(body) > MOST_BYTES:
        raise Malformed(f"a message of {len(body)} bytes, where {MOST_BYTES} are allowed")
    if not hmac.compare_digest(signature, _signature(body, place)):
        raise Malformed(f"a message that was not signed with this rank's {SECRET_VARIABLE}")
    try:
        return _unpacked(json.loads(body))
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error) as error:
        raise Malformed(f"a message that no rank of this run has written ({type(error).__name__})") from None


def _signature(body, place):
    secret = os.environ.get(SECRET_VARIABLE, "")
    if not secret:
        return b""
    return hmac.digest(secret.encode(), place.encode() + b"\0" + body, hashlib.sha256).hex().encode()


def _packed(x):
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, tuple):
        return {"t": [_packed(item) for item in x]}
    if isinstance(x, list):
        return [_packed(item) for item in x]
    if isinstance(x, dict):
        return {"d": [[_packed(key), _packed(item)] for key, item in x.items()]}
    if isinstance(x, bytes):
        return {"b": base64.b64encode(x).decode()}
    if isinstance(x, torch.dtype):
        return {"y": str(x).removeprefix("torch.")}
    if KNOWN.get(type(x).__name__) is type(x):
        return {"c": [type(x).__name__, *(_packed(getattr(x, f.name)) for f in dataclasses.fields(x))]}
    raise TypeError(f"ranks tell each other plain data: got {type(x).__name__}")


def _unpacked(x):
    if isinstance(x, list):
        return [_unpacked(item) for item in x]
    if not isinstance(x, dict):
        return x
    ((kind, content),) = x.items()
    if kind == "t":
        return tuple(_unpacked(item) for item in content)
    if kind == "d":
        return {_unpacked(key): _unpacked(item) for key, item in content}
    if kind == "b":
        return base64.b64decode(content, validate=True)
    if kind == "y":
        return _DTYPES[content]
    if kind == "c":
        return KNOWN[content[0]](*(_unpacked(item) for item in content[1:]))
    raise Malformed(f"a message with an unknown kind {kind!r:.20}")
