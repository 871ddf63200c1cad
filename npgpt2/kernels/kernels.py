"""The arithmetic of GPT-2, as functions on float32 arrays: each says its shapes and its formula, then is the formula.

Letters: B sequences, T new positions, S positions in all, C n_embd, H heads, D = C/H, V vocabulary; N rows of any kind.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from npgpt2.kernels.threads import is_sharing, multiplies_small_matrices, share

Array = npt.NDArray[np.float32]

# Multiplications that are worth a thread of their own: fewer are over before it has begun.
THREAD_WORTH = 2**20
# BLAS is slow at products of a few rows and a large matrix, since it copies the matrix into another layout first. A
# pass of 8 rows through 124M took twice as long that way as in tiles of its columns, of which each makes a product of
# at most so many multiplications: those OpenBLAS computes without a copy, where it has kernels for it.
SMALL_PRODUCT = 10**6
TILES = (64, 48, 32, 16)
# Where it hasn't, a tile that stays in the cache is multiplied row by row: the faster way for fewer rows than this.
FEW_ROWS = 8
TILE_BYTES = 2**20
# Rows that are worth a thread in a layer norm; in GELU, where they are four times as long, a quarter of them is. GELU
# takes ROWS at once, so that its nine passes over them run in the cache.
ROWS = 64
# Queries that attention takes at once: no (H, T, S) array of scores is made, and half of it needn't be computed.
# A prefill of 512 took 8 % longer with twice as many, and 5 % longer with half.
QUERY_BLOCK = 64


def linear(x: Array, w: Array, b: Array | None = None) -> Array:
    """Multiply each row by a matrix, and add a bias.

        y = x w + b

    x: (N, n_in) · w: (n_in, n_out), an array or `Quantized` · b: (n_out,), or None for none → (N, n_out). `conv1d` in
    OpenAI's model.py.

    >>> linear(np.float32([[1, 2]]), np.float32([[1, 0, 1], [0, 1, 1]]), np.float32([0, 0, 10]))
    array([[ 1.,  2., 13.]], dtype=float32)
    """
    if isinstance(w, np.ndarray) and not is_sharing() and not 1 < len(x) < FEW_ROWS:
        y: Array = x @ w
        if b is not None:
            y += b
        return y
    n_in, n_out = w.shape
    y = np.empty((len(x), n_out), np.float32)

    def columns(start: int, stop: int) -> None:
        part = y[:, start:stop]
        matmul(x, w[:, start:stop], part)
        if b is not None:
            part += b[start:stop]

    # A single row takes as long as two, in which fetching the matrix, or widening its int8, is most of the work.
    share(n_out, columns, THREAD_WORTH // (n_in * max(2, len(x))), TILES[0])
    return y


def matmul(x: Array, w: Array, y: Array) -> None:
    """Multiply each row by a matrix, on the calling thread.

        y = x w

    x: (N, n_in) · w: (n_in, n_out), in memory column by column if it is to be fast, or a `Quantized` · y: (N, n_out),
    which is overwritten: float32, each row in one piece.

    >>> y = np.empty((1, 3), np.float32)
    >>> matmul(np.float32([[1, 2]]), np.float32([[1, 0, 1], [0, 1, 1]]), y)
    >>> y
    array([[1., 2., 3.]], dtype=float32)
    """
    if not isinstance(w, np.ndarray):
        w.multiply(x, y)  # type: ignore[unreachable]
        return
    N, n_in = x.shape
    if N == 1:
        # np.matmul keeps Python's lock while it computes up to 500 numbers, so that other threads have to wait.
        np.dot(x[0], w, out=y[0])
        return
    done = 0
    if multiplies_small_matrices():
        tile = next((tile for tile in TILES if tile * x.size <= SMALL_PRODUCT), None)
        if tile and w.T.flags.c_contiguous:
            done = w.shape[1] // tile * tile
            tiles = w.T[:done].reshape(-1, tile, n_in)  # (n_tiles, tile, n_in) x (n_in, N)
            y[:, :done] = (tiles @ np.ascontiguousarray(x.T)).reshape(done, N).T
    elif N < FEW_ROWS:
        tile, done = max(1, TILE_BYTES // (4 * n_in)), w.shape[1]
        for start in range(0, done, tile):
            for row, out in zip(x, y, strict=True):
                np.dot(row, w[:, start : start + tile], out=out[start : start + tile])
    if done < w.shape[1]:
        np.matmul(x, w[:, done:], out=y[:, done:])


def layer_norm(x: Array, gain: Array, bias: Array, eps: float = 1e-5) -> Array:
    """Normalise each row to zero mean and unit variance, then scale and shift.

        y = gain * (x - mean) / sqrt(var + eps) + bias

    x: (N, C) · gain, bias: (C,) → (N, C). Ba et al. 2016, "Layer Normalization"; `norm` in OpenAI's model.py.

    >>> layer_norm(np.float32([[1, 3]]), gain=np.float32([1, 1]), bias=np.float32([0, 5])).round(3)
    array([[-1.,  6.]], dtype=float32)
    """
    # np.mean and np.var say the same, but take longer over one row than all the rest of this.
    C = np.float32(x.shape[-1])
    y = np.empty_like(x)

    def part(start: int, stop: int) -> None:
        rows = y[start:stop]
        np.subtract(x[start:stop], x[start:stop].sum(axis=-1, keepdims=True) / C, out=rows)
        var = np.einsum("nc,nc->n", rows, rows)[:, None] / C
        rows /= np.sqrt(var + np.float32(eps))
        rows *= gain
        rows += bias

    share(len(x), part, ROWS)
    return y


def gelu(x: Array) -> Array:
    """The Gaussian error linear unit, in the tanh form that GPT-2 was trained with; overwrites x.

        y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))

    x: (N, 4C) → (N, 4C). Hendrycks & Gimpel 2016, "Gaussian Error Linear Units"; `gelu` in OpenAI's model.py.

    >>> gelu(np.float32([[-1, 0, 1, 10]])).round(4)
    array([[-0.1588,  0.    ,  0.8412, 10.    ]], dtype=float32)
    """

    def part(start: int, stop: int) -> None:
        for first in range(start, stop, ROWS):
            rows = x[first : min(first + ROWS, stop)]
            inner = rows * rows
            inner *= np.float32(0.044715)
            inner += np.float32(1)
            inner *= rows
            inner *= np.float32(np.sqrt(2 / np.pi))
            np.tanh(inner, out=inner)
            inner += np.float32(1)
            rows *= np.float32(0.5)
            rows *= inner

    share(len(x), part, ROWS // 4)
    return x


def softmax(x: Array) -> Array:
    """Turn each row of scores into probabilities; overwrites x. Subtracting the largest keeps exp from overflowing.

        y = exp(x - max(x)) / sum(exp(x - max(x)))

    x: (..., N) → (..., N). `softmax` in OpenAI's model.py.

    >>> softmax(np.float32([[0, 0], [-1000, 0]]))
    array([[0.5, 0.5],
           [0. , 1. ]], dtype=float32)
    """
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)
    return x


def causal_attention(q: Array, k: Array, v: Array, watch: Callable[[Array], object] | None = None) -> Array:
    """Each of the last T positions gathers the values of those up to itself, weighted by how well keys fit its query.

        y = softmax(mask(q k^T / sqrt(D))) v

    q: (H, T, D) · k, v: (H, S, D) with S >= T · watch: called with the weights of some queries after the other, each
    time (H, block, seen), where the last of the block's queries sees `seen` positions → (T, C), the heads side by side.
    Vaswani et al. 2017, "Attention Is All You Need"; `multihead_attn` in OpenAI's model.py.

    >>> q = np.zeros((1, 2, 1), np.float32)                # indifferent queries take the mean of what they see
    >>> causal_attention(q, q, v=np.float32([[[2], [4]]]))
    array([[2.],
           [3.]], dtype=float32)
    """
    H, T, D = q.shape
    S = k.shape[1]
    y = np.empty((T, H, D), np.float32)
    q = q * np.float32(1 / np.sqrt(D))
    future = np.triu(np.ones((QUERY_BLOCK, QUERY_BLOCK), bool), k=1) if T > 1 else None
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        seen = S - T + stop
        scores = q[:, start:stop] @ k[:, :seen].transpose(0, 2, 1)  # (H, block, D) x (H, D, seen) -> (H, block, seen)
        if future is not None:  # among themselves, they see only those before
            among = scores[:, :, S - T + start :]
            np.copyto(among, -np.inf, where=future[: stop - start, : stop - start])
        weights = softmax(scores)
        if watch is not None:
            watch(weights)
        np.matmul(weights, v[:, :seen], out=y[start:stop].transpose(1, 0, 2))  # -> (H, block, D)
    return y.reshape(T, H * D)
