"""What is computed for each row by itself: layer norm, GELU, softmax. In few passes, and over rows that stay cached."""

from __future__ import annotations

from math import sqrt

import numpy as np

from npgpt2.formulas import Array
from npgpt2.kernels.scratch import scratch
from npgpt2.kernels.threads import share

# Rows that are worth a thread in a layer norm; in GELU, where they are four times as long, a quarter of them is. GELU
# takes ROWS at once, so that its seven passes over them run in the cache; fewer would mean more calls, between which
# threads wait for Python's lock. `python tools/tune.py rows` measures both.
ROWS = 64
# Half of 1 + tanh u is 1 / (1 + exp -2u), which takes two passes fewer; -2u has these two terms in x.
LINEAR = np.float32(-2 * np.sqrt(2 / np.pi))
CUBIC = np.float32(-2 * np.sqrt(2 / np.pi) * 0.044715)


def layer_norm(x: Array, gain: Array, bias: Array, eps: float = 1e-5) -> Array:
    """Normalise each row to zero mean and unit variance, then scale and shift: see `formulas.layer_norm`.

    x: (N, C) · gain, bias: (C,) → (N, C)

    >>> layer_norm(np.float32([[1, 3]]), gain=np.float32([1, 1]), bias=np.float32([0, 5])).round(3)
    array([[-1.,  6.]], dtype=float32)
    """
    # np.mean and np.var say the same, but take longer over one row than all the rest of this.
    C = np.float32(x.shape[-1])
    if len(x) == 1:  # most of a text is written so: in as few calls as can be
        row: Array = x[0] - np.add.reduce(x[0]) / C
        row *= 1 / sqrt(np.dot(row, row) / C + eps)
        row *= gain
        row += bias
        return row[None]
    y = np.empty_like(x)

    def part(start: int, stop: int) -> None:
        rows = y[start:stop]
        np.subtract(x[start:stop], np.add.reduce(x[start:stop], axis=-1, keepdims=True) / C, out=rows)
        var = np.einsum("nc,nc->n", rows, rows)[:, None] / C
        rows /= np.sqrt(var + np.float32(eps))
        rows *= gain
        rows += bias

    share(len(x), part, ROWS)
    return y


def gelu(x: Array) -> Array:
    """The Gaussian error linear unit: see `formulas.gelu`. Overwrites x, which is returned. x: (N, 4C) → (N, 4C).

    >>> gelu(np.float32([[-1, 0, 1, 10]])).round(4)
    array([[-0.1588,  0.    ,  0.8412, 10.    ]], dtype=float32)
    """

    def part(start: int, stop: int) -> None:
        for first in range(start, stop, ROWS):
            rows = x[first : min(first + ROWS, stop)]
            inner = np.multiply(rows, rows, out=scratch(*rows.shape))
            inner *= CUBIC
            inner += LINEAR
            inner *= rows
            np.exp(inner, out=inner)  # inf where it is too large, for which x / inf = 0 is right
            inner += np.float32(1)
            rows /= inner

    with np.errstate(over="ignore"):
        share(len(x), part, ROWS // 4)
    return x


def softmax(x: Array) -> Array:
    """Turn each row of scores into shares: see `formulas.softmax`. Overwrites x, which is returned.

    x: (..., N) → (..., N)

    >>> softmax(np.float32([[0, 0], [-1000, 0]]))
    array([[0.5, 0.5],
           [0. , 1. ]], dtype=float32)
    """
    x -= np.maximum.reduce(x, axis=-1, keepdims=True)  # as x.max, which is Python's on its way to the same
    np.exp(x, out=x)
    x /= np.add.reduce(x, axis=-1, keepdims=True)
    return x
