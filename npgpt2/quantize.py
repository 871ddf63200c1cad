"""Matrices in int8: a quarter of the memory, and of the bytes that decoding has to fetch for each token.

A row of numbers is stored as whole numbers from -127 to 127 and one float32, by which they are to be multiplied. The
rows are those that belong to one output each, so that this factor can be applied to the result instead of the weights.
Activations stay float32. Dettmers et al. 2022, "LLM.int8()", section 2, calls this symmetric row-wise quantization.
"""

from __future__ import annotations

import os
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from npgpt2.kernels import Array

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

Int8 = npt.NDArray[np.int8]

# Rows of int8 are widened into a float32 buffer of so many bytes, which stays in the cache while it is multiplied by.
TILE_BYTES = 3 * 2**19
# Numbers that are quantized at once, to keep memory small.
CHUNK = 2**20


@lru_cache(maxsize=1)
def count_threads() -> int:
    """How many threads to use: as many as BLAS does, which $OPENBLAS_NUM_THREADS or $OMP_NUM_THREADS can limit.

    >>> count_threads() >= 1
    True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        if (text := os.environ.get(name, "").split(",")[0]).isdecimal() and int(text) > 0:
            return min(int(text), cores)
    return cores


@lru_cache(maxsize=1)
def _helpers(process: int) -> ThreadPoolExecutor:
    """Threads that compute beside the calling one. After a fork they are gone, so that each process has its own."""
    from concurrent.futures import ThreadPoolExecutor  # which takes 18 ms that float32 needn't spend

    return ThreadPoolExecutor(max(1, count_threads() - 1), "npgpt2")


class Quantized:
    """A matrix whose columns are outputs, in int8; `x @ matrix` multiplies by it. See `quantize`.

    values: (n_out, n_in) int8 · scales: (n_out,) float32. It stands for the (n_in, n_out) float32 matrix
    `(values * scales[:, None]).T`, and does of an array's ways what the model needs.
    """

    __array_ufunc__ = None  # so that NumPy leaves `x @ matrix` to this class

    def __init__(self, values: Int8, scales: Array) -> None:
        self.values, self.scales = values, scales
        self.shape = values.shape[::-1]

    def __rmatmul__(self, x: Array) -> Array:
        n_out = len(self.values)
        y = np.empty((len(x), n_out), np.float32)
        # BLAS multiplies a single row on one thread, so that it takes several of ours; more rows it shares among its
        # own. NumPy lets go of Python's lock while it widens and multiplies.
        parts = min(count_threads(), n_out) if len(x) == 1 else 1
        bounds = [n_out * part // parts for part in range(parts + 1)]
        others = [
            _helpers(os.getpid()).submit(self._multiply, x, y, start, stop) for start, stop in pairwise(bounds[1:])
        ]
        self._multiply(x, y, 0, bounds[1])
        for other in others:
            other.result()
        return y

    @np.errstate(over="ignore", invalid="ignore")  # as in `forward`, whose setting other threads don't have
    def _multiply(self, x: Array, y: Array, start: int, stop: int) -> None:
        n_in = self.values.shape[1]
        step = max(1, min(stop - start, TILE_BYTES // (4 * n_in)))
        tile = np.empty((step, n_in), np.float32)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            wide = tile[: last - first]
            wide[...] = self.values[first:last]
            np.matmul(x, wide.T, out=y[:, first:last])
        y[:, start:stop] *= self.scales[start:stop]


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
