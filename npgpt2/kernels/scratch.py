"""Memory for what is computed on the way, and isn't kept."""

from __future__ import annotations

from math import prod
from threading import local

import numpy as np

from npgpt2.formulas import Array


class _Kept(local):
    array = np.empty(0, np.float32)


_kept = _Kept()


def scratch(*shape: int) -> Array:
    """An array to write to, until the same thread asks for the next one. Memory for the largest of them is kept.

    Where the system takes memory back in between, and gives it anew page after page, computing in it took from half as
    long again to ten times as long.

    >>> scratch(2, 3).shape
    (2, 3)
    """
    size = prod(shape)
    if _kept.array.size < size:
        _kept.array = np.empty(size, np.float32)
    return _kept.array[:size].reshape(shape)
