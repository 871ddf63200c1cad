"""Products with a matrix, in whichever way BLAS does them fastest for so many rows.

For each product, BLAS copies the matrix into the layout that it computes with, which takes longer than the product
itself where there are few rows. Two ways get around that: to multiply row by row by a tile of the matrix that stays in
the cache; and to make one small product of each of many tiles, which OpenBLAS computes without a copy where it has
kernels for that (with AVX-512), and elsewhere copies within the cache. `ways` says which is for how many rows.
"""

from __future__ import annotations

import numpy as np

from npgpt2.formulas import Array
from npgpt2.kernels.ways import way_for

# Small tiles are the widest of these that make products of at most so many multiplications, since larger ones are
# copied.
TILES, SMALL_PRODUCT = (64, 48, 32, 16), 10**6


def matmul(x: Array, w: Array, y: Array) -> None:
    """Multiply each row by a matrix.

        y = x w

    x: (N, n_in) · w: (n_in, n_out), in memory column by column if it is to be fast · y: (N, n_out), which is
    overwritten: float32, each row in one piece.

    >>> y = np.empty((1, 3), np.float32)
    >>> matmul(np.float32([[1, 2]]), np.float32([[1, 0, 1], [0, 1, 1]]), y)
    >>> y
    array([[1., 2., 3.]], dtype=float32)
    """
    N, n_in = x.shape
    if N == 1:
        np.dot(x[0], w, out=y[0])  # which always lets go of Python's lock
    elif (way := way_for(N)) is None:
        np.matmul(x, w, out=y)
    elif way.way == "small tiles":
        _by_tiles(x, w, y, next((tile for tile in TILES if tile * x.size <= SMALL_PRODUCT), 0))
    else:
        multiply = _by_rows if way.way == "rows" else _by_tiles
        multiply(x, w, y, max(1, way.tile_bytes // (4 * n_in)))


def _by_rows(x: Array, w: Array, y: Array, tile: int) -> None:
    """Each row by a tile of so many columns, before the next tile, in one call; and what is left likewise."""
    N, n_in = x.shape
    done = w.shape[1] // tile * tile if w.T.flags.c_contiguous else 0
    for start, stop, size in ((0, done, tile), (done, w.shape[1], w.shape[1] - done)):
        if start < stop:
            tiles = w.T[start:stop].reshape(-1, 1, size, n_in)
            # (n_tiles, 1, size, n_in) x (N, n_in, 1). Into y, NumPy would go by all tiles for each row.
            product = tiles @ x[:, :, None]  # -> (n_tiles, N, size, 1)
            y[:, start:stop].reshape(N, -1, size)[...] = product[..., 0].transpose(1, 0, 2)


def _by_tiles(x: Array, w: Array, y: Array, tile: int) -> None:
    """All rows by each tile of so many columns, and what is left as a whole; 0 makes no tiles."""
    N, n_in = x.shape
    done = 0
    if tile and w.T.flags.c_contiguous:
        done = w.shape[1] // tile * tile
        tiles = w.T[:done].reshape(-1, tile, n_in)  # (n_tiles, tile, n_in) x (n_in, N)
        y[:, :done] = (tiles @ np.ascontiguousarray(x.T)).reshape(done, N).T
    if done < w.shape[1]:
        np.matmul(x, w[:, done:], out=y[:, done:])
