"""What ranks tell each other is plain data: it comes back as it was, and nothing else is read."""

import json
import math
import pickle

import pytest
import torch

from asyncdiff_fast.exchange import wire
from asyncdiff_fast.patches.sites import Seen

VALUES = {
    "nothing": None,
    "numbers": [1, -(2**62), 0.5, math.inf, True, False],
    "text of any language": ["größe", "日本", "no file caf\udce9.png", ""],
    "tuples": ((1, (2,)), [3, ()]),
    "keys that are tuples": {("blocks.0", 1): [1], 3: "x", None: ()},
    "bytes": bytes(range(256)),
    "dtypes": [torch.float16, torch.bfloat16],
    "a dataclass": Seen("convolution", (1, 4, 8, 8), (1, 4, 8, 8), ((3, 1, 1, 1),), torch.float32),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("secret", ["", "of this run"])
def test_plain_data_comes_back(name, secret, monkeypatch):
    monkeypatch.setenv(wire.SECRET_VARIABLE, secret)
    found = wire.loads(wire.dumps(VALUES[name], "3/0"), "3/0")
    assert found == VALUES[name] and type(found) is type(VALUES[name])


class Payload:
    def __reduce__(self):
        return print, ("run",)


BAD = {
    "pickle": pickle.dumps(Payload()),
    "no text": b"\xff\xfe",
    "empty": b"",
    "deep": b"[" * 100_000,
    "unknown kind": b'{"x": 1}',
    "two kinds": b'{"t": [], "d": []}',
    "no kind": b"{}",
    "unknown class": b'{"c": ["Popen", "id"]}',
    "class of no name": b'{"c": [{"t": []}]}',
    "fields missing": b'{"c": ["Seen"]}',
    "unknown dtype": b'{"y": "system"}',
    "key that is no key": b'{"d": [[[], 1]]}',
    "no base64": b'{"b": "=x"}',
    "long number": b"1" * 5000,
}


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused(name, monkeypatch):
    monkeypatch.delenv(wire.SECRET_VARIABLE, raising=False)
    with pytest.raises(wire.Malformed):
        wire.loads(BAD[name])


def test_what_is_not_plain_is_not_told():
    for value in (object(), {1, 2}, torch.zeros(1), Payload()):
        with pytest.raises(TypeError, match="plain data"):
            wire.dumps([value])


def test_what_is_too_long_is_neither_told_nor_read(monkeypatch):
    monkeypatch.setattr(wire, "MOST_BYTES", 100)
    monkeypatch.delenv(wire.SECRET_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="at most 100 bytes"):
        wire.dumps("x" * 200)
    with pytest.raises(wire.Malformed, match="202 bytes"):
        wire.loads(json.dumps("x" * 200).encode())


@pytest.mark.parametrize("theirs, place", [("", "1/0"), ("another", "1/0"), ("ours", "2/0")])
def test_with_a_secret_only_what_is_signed_for_its_place_is_read(theirs, place, monkeypatch):
    monkeypatch.setenv(wire.SECRET_VARIABLE, theirs)
    message = wire.dumps([1], place)
    monkeypatch.setenv(wire.SECRET_VARIABLE, "ours")
    with pytest.raises(wire.Malformed, match=wire.SECRET_VARIABLE):
        wire.loads(message, "1/0")
