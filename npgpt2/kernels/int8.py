"""Matrices in int8: a quarter of the memory, and of the bytes that decoding has to fetch for each token.

A row of numbers is stored as whole numbers from -127 to 127 and one float32, by which they are to be multiplied. The
rows are those that belong to one output each, so that this factor can be applied to the result instead of the weights.
Activations stay float32. Dettmers et al. 2022, "LLM.int8()", section 2, calls this symmetric row-wise quantization.
"""

from __future__ import annotations

from threading import local

import numpy as np
import numpy.typing as npt

from npgpt2.kernels.kernels import Array, matmul

Int8 = npt.NDArray[np.int8]

# Rows of int8 are widened into a float32 buffer of so many bytes, which stays in the third cache while it is multiplied
# by: enough for half of any layer's matrix of 124M. With smaller ones, threads wait for Python's lock more often: a
# token took 4 % longer with three fifths of this, and 8 % with a third.
TILE_BYTES = 5 * 2**20
# Numbers that are quantized at once, to keep memory small.
CHUNK = 2**20


class _Buffer(local):
    """What a thread widens into, and keeps until it ends.

    Where the system takes memory back in between, and gives it anew page after page, widening took up to ten times as
    long.
    """

    tile = np.empty(0, np.float32)


_buffer = _Buffer()


class Quantized:
    """A matrix whose columns are outputs, in int8. See `quantize`.

    values: (n_out, n_in) int8 · scales: (n_out,) float32. It stands for the (n_in, n_out) float32 matrix
    `(values * scales[:, None]).T`, and does of an array's ways what the model needs.
    """

    def __init__(self, values: Int8, scales: Array) -> None:
        self.values, self.scales = values, scales
        self.shape = values.shape[::-1]

    def __getitem__(self, columns: tuple[slice, slice]) -> Quantized:
        """Some of the columns, as `matrix[:, start:stop]`."""
        return Quantized(self.values[columns[1]], self.scales[columns[1]])

    def multiply(self, x: Array, y: Array) -> None:
        """y[:] = x @ matrix; x: (N, n_in), y: (N, n_out)."""
        n_out, n_in = self.values.shape
        size = max(TILE_BYTES // 4, n_in)
        if _buffer.tile.size != size:
            _buffer.tile = np.empty(size, np.float32)
        step = size // n_in
        for start in range(0, n_out, step):
            part = slice(start, min(start + step, n_out))
            wide = _buffer.tile[: (part.stop - start) * n_in].reshape(-1, n_in)
            wide[...] = self.values[part]
            matmul(x, wide.T, y[:, part])
        y *= self.scales


class QuantizedRows:
    """`wte` in int8: rows can be looked up, and `.T` is what the last hidden state is multiplied by. (V, C)"""

    def __init__(self, values: Int8, scales: Array) -> None:
        self.T = Quantized(values, scales)
        self.shape = values.shape

    def __getitem__(self, rows: npt.NDArray[np.intp]) -> Array:
        chosen: Array = self.T.values[rows].astype(np.float32)
        chosen *= self.T.scales[rows][:, None]
        return chosen


def quantize(rows: Array) -> tuple[Int8, Array]:
    """Round each row to int8. rows: (N, n) → values (N, n) int8 and scales (N,), with rows ≈ values * scales[:, None].

    >>> values, scales = quantize(np.float32([[1, -2, 0.5], [0, 0, 0]]))
    >>> values
    array([[  64, -127,   32],
           [   0,    0,    0]], dtype=int8)
    >>> scales * 127
    array([  2., 127.], dtype=float32)
    """
    values, scales = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        scale = np.maximum(piece.max(1), -piece.min(1)) / np.float32(127)
        scale[scale < np.finfo(np.float32).tiny] = 1  # a row of zeros, or of numbers so small that they round to them
        scales[start : start + step] = scale
        values[start : start + step] = np.rint(piece / scale[:, None])
    return values, scales
