"""Matrices in int8: a quarter of the memory, and of the bytes that decoding has to fetch for each token.

A row of numbers is stored as whole numbers from -127 to 127 and one float32, its scale, by which they are to be
multiplied. The rows are those that belong to one output each, so that this factor can be applied to the result instead
of the weights. Activations stay float32. Dettmers et al. 2022, "LLM.int8()", section 2, calls this symmetric row-wise
quantization. `prepare` makes matrices of what a model file stores in this way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from npgpt2.formulas import Array
from npgpt2.kernels.matmul import matmul
from npgpt2.kernels.scratch import scratch

Int8 = npt.NDArray[np.int8]

# Rows of int8 are widened into a float32 buffer of so many bytes, which stays in the third cache while it is multiplied
# by: enough for half of any layer's matrix of 124M. With smaller ones, threads wait for Python's lock more often: a
# token took 4 % longer with three fifths of this, and 8 % with a third, where memory is fast; where it is slow, half
# is better: `python tools/tune.py int8`.
TILE_BYTES = 5 * 2**20
# What is added to a matrix's name for that of its scales.
SCALES = "/scales"


class Quantized:
    """A matrix whose columns are outputs, in int8.

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
        step = max(1, TILE_BYTES // (4 * n_in))
        for start in range(0, n_out, step):
            part = slice(start, min(start + step, n_out))
            wide = scratch(part.stop - start, n_in)
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


def prepare(weights: Mapping[str, npt.NDArray[Any]], threads: int | None = None) -> Matrices:
    """What the forward pass multiplies by, made of a model's variables as they are stored.

    weights: arrays by name, as `Weights` has them or any other mapping, which must not change meanwhile; int8 matrices
    (n_in, n_out), and `wte` (V, C), with float32 scales (n_out,) or (V,) beside them under their name and `/scales` →
    the same names without those of scales: `Quantized` for what is int8, `QuantizedRows` for `wte`, else the array
    itself · threads: how many a pass over them takes; see `sharing_work`. Like `weights`, it reads an array when it is
    first asked for, and raises what that raises.

    >>> matrices = prepare({"h0/mlp/c_fc/w": np.int8([[3, 4]]), "h0/mlp/c_fc/w/scales": np.float32([0.5, 2])})
    >>> list(matrices)
    ['h0/mlp/c_fc/w']
    >>> y = np.empty((1, 2), np.float32)
    >>> matrices["h0/mlp/c_fc/w"].multiply(np.float32([[10]]), y)
    >>> y
    array([[15., 80.]], dtype=float32)
    """
    return Matrices(weights, threads)


class Matrices(Mapping[str, Array]):
    """What `prepare` makes. threads: how many a pass over them takes, None for the usual number"""

    def __init__(self, weights: Mapping[str, npt.NDArray[Any]], threads: int | None) -> None:
        self.threads = threads
        self._weights = weights
        self._kept: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        matrix = self._kept.get(name)
        if matrix is None:  # two threads may both come here, and agree on one
            matrix = self._kept.setdefault(name, self._made(name))
        return matrix

    def _made(self, name: str) -> Array:
        if name not in self:
            raise KeyError(name)
        array = self._weights[name]
        if array.dtype != np.int8:
            return array
        scales = self._weights[name + SCALES]
        matrix = QuantizedRows(array, scales) if name == "wte" else Quantized(array.T, scales)
        return cast(Array, matrix)  # the model does with it what it does with an array, and need not know

    @property
    def width(self) -> int:
        """C, the width of the residual stream."""
        return int(self["wte"].shape[1])

    @property
    def in_int8(self) -> bool:
        """Whether the products are with matrices in int8."""
        return isinstance(self["wte"], QuantizedRows)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._weights if not name.endswith(SCALES))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._weights and not str(name).endswith(SCALES)
