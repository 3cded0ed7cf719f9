"""Plain data as JSON and back, exactly: what passes between the program under test and its tests.

Nothing but data crosses. An object with an `__eq__` of its own arrives as an `object()`, which
equals nothing.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any) -> Any:
    """Turn a value into what JSON can hold: [kind, content], or a bool, a str or None as it is.

    A subclass of a plain type is sent as that type, as it would compare; a NumPy scalar as the
    Python number it holds.
    """
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["int", format(int(value), "x")]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", [float.hex(value.real), float.hex(value.imag)]]
    if isinstance(value, Fraction):
        return ["fraction", [format(value.numerator, "x"), format(value.denominator, "x")]]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    for kind, container in _CONTAINERS.items():
        if isinstance(value, container):
            return [kind, [encode(item) for item in value]]
    if isinstance(value, Iterator):
        return ["iterator", [encode(item) for item in value]]
    return ["object", type(value).__name__]


def decode(data: Any) -> Any:
    """Undo `encode`.

    Raises:
        ValueError: If `data` is nothing that `encode` makes.
        TypeError: The same.
    """
    if data is None or isinstance(data, bool | str):
        return data
    kind, content = data
    match kind:
        case "int":
            return int(content, 16)
        case "float":
            return float.fromhex(content)
        case "complex":
            return complex(*map(float.fromhex, content))
        case "fraction":
            return Fraction(*(int(part, 16) for part in content))
        case "bytes":
            return bytes.fromhex(content)
        case "dict":
            return {decode(key): decode(item) for key, item in content}
        case "range":
            return range(*content)
        case "iterator":
            return iter([decode(item) for item in content])
        case "object":
            return object()
        case _ if kind in _CONTAINERS:
            return _CONTAINERS[kind](decode(item) for item in content)
    raise ValueError(f"unknown kind of value {kind!r:.40}")
