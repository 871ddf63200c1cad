"""Linear layers: the one switch between matrices in float32 and in int8, and how a product is cut into parts."""

from __future__ import annotations

import numpy as np

from npgpt2.formulas import Array
from npgpt2.kernels.int8 import Quantized
from npgpt2.kernels.matmul import TILES, matmul
from npgpt2.kernels.threads import THREAD_WORTH, is_sharing, share


def linear(x: Array, w: Array | Quantized, b: Array | float = 0.0) -> Array:
    """Multiply each row by a matrix, and add a bias: see `formulas.linear`.

    x: (N, n_in) · w: (n_in, n_out) · b: (n_out,), or 0 for none → (N, n_out)

    >>> linear(np.float32([[1, 2]]), np.float32([[1, 0, 1], [0, 1, 1]]), np.float32([0, 0, 10]))
    array([[ 1.,  2., 13.]], dtype=float32)
    """
    N, (n_in, n_out) = len(x), w.shape
    if not N:  # as where no logits are wanted
        return np.empty((0, n_out), np.float32)
    if not isinstance(w, Quantized) and not is_sharing() and N == 1:
        y: Array = x @ w  # most of a text is written so, in as few calls as can be
        if isinstance(b, np.ndarray):
            y += b
        return y
    y = np.empty((N, n_out), np.float32)

    def columns(start: int, stop: int) -> None:
        part = y[:, start:stop]
        if isinstance(w, Quantized):
            w[:, start:stop].multiply(x, part)
        else:
            matmul(x, w[:, start:stop], part)
        if isinstance(b, np.ndarray):
            part += b[start:stop]

    # A single row takes as long as two, in which fetching the matrix, or widening its int8, is most of the work.
    share(n_out, columns, THREAD_WORTH // (n_in * max(2, N)), TILES[0])
    return y
