"""Rounding matrices to int8, which takes a quarter of the space.

A row of numbers is stored as whole numbers from -127 to 127 and one float32, its scale, by which they are to be
multiplied. The rows are those that belong to one output each, so that this factor can be applied to the result instead
of the weights. Dettmers et al. 2022, "LLM.int8()", section 2, calls this symmetric row-wise quantization.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# What is added to a matrix's name for that of its scales.
SCALES = "/scales"
# Numbers that are rounded at once, to keep memory small.
CHUNK = 2**20


def is_quantizable(name: str) -> bool:
    """Whether a variable is a matrix that activations are multiplied by.

    >>> is_quantizable("wte"), is_quantizable("h0/attn/c_attn/w"), is_quantizable("wpe")
    (True, True, False)
    """
    return name == "wte" or name.endswith("/w")


def by_output(name: str, matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A view of such a matrix with a row for each output; or, of one that is so already, as it is in the file.

    >>> by_output("h0/attn/c_attn/w", np.empty((8, 24))).shape, by_output("wte", np.empty((50, 8))).shape
    ((24, 8), (50, 8))
    """
    return matrix if name == "wte" else matrix.T


def quantize(
    rows: npt.NDArray[np.float32] | npt.NDArray[np.float16],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round each row to int8. rows: (N, n) float32 or float16 → values (N, n) int8, scales (N,) float32.

        rows ≈ values * scales[:, None]

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
        piece = rows[start : start + step].astype(np.float32, copy=False)
        scale = np.maximum(piece.max(1), -piece.min(1)) / np.float32(127)
        scale[scale < np.finfo(np.float32).tiny] = 1  # a row of zeros, or of numbers so small that they round to them
        scales[start : start + step] = scale
        values[start : start + step] = np.rint(piece / scale[:, None])
    return values, scales
