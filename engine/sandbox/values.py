"""Values that cross the border of the sandbox, as JSON text: what a program returns leaves as data and is built anew from plain types outside.

Whatever a class of the program does in `__eq__` or `__repr__` stays inside.  JSON's own types stand for themselves; the others are objects with one
key: {"t": [...]} tuple, {"s": [...]} set, {"z": [...]} frozenset, {"d": [[key, value], ...]} dict, {"b": text} bytes, {"c": [re, im]} complex,
{"f": text} nan and infinities, {"i": hex} integers beyond 64 bits.  Subclasses travel as their base; numpy's arrays and numbers as lists and numbers.

This file also runs inside the sandbox, where it is joined to launcher.py: it imports nothing but the standard library.
"""

import json


def pack(value) -> str:
    """JSON text of a value.  Raises TypeError for a type that cannot travel, RecursionError for a cyclic or very deep value."""
    return json.dumps(_encode(value))


def unpack(text: str):
    """The value of a text that `pack` made.  Raises ValueError on any other text; never builds anything but plain types."""
    try:
        return _decode(json.loads(text))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a packed value: {type(error).__name__}: {error}") from None


def _encode(value):
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else {"i": hex(value)}
    if isinstance(value, float):
        return float(value) if value - value == 0 else {"f": repr(float(value))}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"d": [[_encode(key), _encode(item)] for key, item in value.items()]}
    for tag, kind in (("t", tuple), ("s", set), ("z", frozenset)):
        if isinstance(value, kind):
            return {tag: [_encode(item) for item in value]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).decode("latin-1")}
    if isinstance(value, complex):
        return {"c": [_encode(value.real), _encode(value.imag)]}
    if type(value).__module__ == "numpy":
        return _encode(value.tolist())
    raise TypeError(f"a value of type {type(value).__name__} cannot leave the sandbox")


def _decode(data):
    if isinstance(data, list):
        return [_decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("an object with one key was wanted")
    tag, body = next(iter(data.items()))
    if tag == "d":
        return {_decode(key): _decode(item) for key, item in body}
    if tag in ("t", "s", "z"):
        return {"t": tuple, "s": set, "z": frozenset}[tag](_decode(item) for item in body)
    if tag == "b":
        return body.encode("latin-1")
    if tag == "c":
        return complex(_decode(body[0]), _decode(body[1]))
    if tag == "f":
        return float(body)
    if tag == "i":
        return int(body, 16)
    raise ValueError(f"unknown tag {tag!r}")
