"""What callers hand over is looked at when they do, so that what is wrong is named by the argument that it is in.

NumPy's whole numbers and floats are numbers as Python's are; True and False are none, though Python counts with them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt


def wrong_type(name: str, value: object, expected: str) -> TypeError:
    """What to raise where an argument is of another type than it can be.

    >>> wrong_type("prompt", None, "a text")
    TypeError('prompt is None, where a text is expected')
    """
    return TypeError(f"{name} is {shortened(value)}, where {expected} is expected")


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_whole(name: str, value: object, least: int, more: str = "") -> None:
    """Raise an error where a setting is no whole number (TypeError), or is below `least` (ValueError).

    >>> check_whole("length", 2.5, 1)
    Traceback (most recent call last):
    ...
    TypeError: length is 2.5, where a whole number of at least 1 is expected
    """
    expected = f"a whole number of at least {least}"
    if not is_whole(value):
        raise TypeError(f"{name} is {shortened(value)}, where {expected} is expected{more}")
    if value < least:
        raise ValueError(f"{name} is {shortened(value)}, where {expected} is expected{more}")


def check_number(name: str, value: object) -> None:
    """Raise an error where a setting is no number (TypeError), or is too large for a float (ValueError)."""
    if not is_whole(value) and not isinstance(value, float | np.floating):
        raise wrong_type(name, value, "a number")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} is {shortened(value)}, which is too large") from None


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool | np.bool_):
        raise wrong_type(name, value, "True or False")


def check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise wrong_type(name, value, "a function")


def as_path(name: str, value: object) -> Path:
    """A path, of a string or of what is a path."""
    if not isinstance(value, str | os.PathLike):
        raise wrong_type(name, value, "a path")
    return Path(value)


def is_bytes(value: object) -> bool:
    """Whether it is bytes, which are numbers too when one goes through them."""
    return isinstance(value, bytes | bytearray | memoryview)


def check_iterable(name: str, value: object, expected: str) -> None:
    """Raise TypeError where an argument is nothing that one can go through, or bytes or a mapping."""
    if is_bytes(value) or isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise wrong_type(name, value, expected)


def is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    """Whether it is a list, a tuple, an array or the like, of anything but characters and bytes.

    >>> [is_sequence(value) for value in ([1], np.array([1]), range(3), "1", b"1", {1}, {1: 1}, 1, np.array(1), None)]
    [True, True, True, False, False, False, False, False, False, False]
    """
    if isinstance(value, str | Mapping | Set) or is_bytes(value):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0


def as_ids(name: str, tokens: object, expected: str) -> npt.NDArray[np.integer]:
    """An array of whole numbers, (T,) or (B, T), none of which is looked at; TypeError or ValueError where it is none.

    >>> as_ids("tokens", [[1, 2], [3]], "token ids")
    Traceback (most recent call last):
    ...
    TypeError: tokens is [[1, 2], [3]], whose lists differ in length; `generate` takes a list of prompts
    """
    if not is_sequence(tokens):
        raise wrong_type(name, tokens, expected)
    try:
        ids: npt.NDArray[Any] = np.asarray(tokens)
    except ValueError:
        what = "whose lists differ in length; `generate` takes a list of prompts"
        raise TypeError(f"{name} is {shortened(tokens)}, {what}") from None
    if ids.ndim not in (1, 2) or ids.size == 0:
        raise ValueError(f"{name} of shape {ids.shape}, where (T,) or (B, T) with at least one token is expected")
    if not np.issubdtype(ids.dtype, np.integer) or _has_flags(tokens):
        raise TypeError(f"{name} is {shortened(tokens)}, of type {ids.dtype}, where integers are expected")
    return ids


def _has_flags(tokens: object) -> bool:
    """Whether True or False is among lists of numbers, which NumPy takes for 1 and 0."""
    return isinstance(tokens, list | tuple) and any(isinstance(one, bool) or _has_flags(one) for one in tokens)
