"""Products with a matrix on one thread, in whichever way BLAS does them fastest for so many rows.

For each product, BLAS copies the matrix into the layout that it computes with, which takes longer than the product
itself where there are few rows. Two ways get around that: to multiply row by row by a tile of the matrix that stays in
the cache; and to make one small product of each of many tiles, which OpenBLAS computes without a copy where it has
kernels for that (with AVX-512), and elsewhere copies within the cache. `python tools/tune.py matmul` shows all of them
for every number of rows.
"""

from __future__ import annotations

import numpy as np

from npgpt2.formulas import Array
from npgpt2.kernels.threads import count_threads, is_sharing, multiplies_small_matrices

# Where small products are copied too: up to so many rows go one by one through tiles of so many bytes for each thread,
# and up to so many together through tiles of so many columns.
FEW_ROWS, TILE_BYTES = 6, 2**20
SOME_ROWS, TILE = 24, 256
# Where they aren't: the widest of these tiles that makes products of at most so many multiplications, since larger ones
# are copied.
TILES, SMALL_PRODUCT = (64, 48, 32, 16), 10**6
# Numbers that np.matmul has to compute to let go of Python's lock meanwhile, for which other threads have to wait.
UNLOCKED = 512


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
    N = len(x)
    if N == 1:
        np.dot(x[0], w, out=y[0])  # which always lets go of the lock
        return
    if multiplies_small_matrices():
        _by_tiles(x, w, y, next((tile for tile in TILES if tile * x.size <= SMALL_PRODUCT), 0))
    elif N <= FEW_ROWS:
        _by_rows(x, w, y, (1 if is_sharing() else count_threads()) * TILE_BYTES)
    else:
        _by_tiles(x, w, y, TILE if N <= SOME_ROWS else 0)


def _by_rows(x: Array, w: Array, y: Array, tile_bytes: int) -> None:
    """Each row by a tile of so many bytes, before the next tile; BLAS's threads, where they work, share each tile."""
    N, n_in = x.shape
    tile = max(tile_bytes // (4 * n_in), -(-UNLOCKED // N))
    for start in range(0, w.shape[1], tile):
        part = slice(start, start + tile)
        y[:, part] = (w[:, part].T @ x[:, :, None])[:, :, 0]  # (tile, n_in) x (N, n_in, 1) -> (N, tile, 1)


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
