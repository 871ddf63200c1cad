"""The arithmetic of GPT-2, as functions on float32 arrays: each says its shapes and its formula, then is the formula.

Letters: B sequences, T new positions, S positions in all, C n_embd, H heads, D = C/H, V vocabulary; N rows of any kind.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

# BLAS is slow at products of a few rows and a large matrix: a forward pass of 124M took 3 to 4 times as long with two
# rows as with one. In blocks of the matrix's columns that stay in the cache, row by row, it takes 1.5 times as long;
# that is the faster way for fewer rows than this.
FEW_ROWS = 8
BLOCK_BYTES = 2 * 2**20
# Rows of a (N, 4C) array that GELU takes at once, so that its six passes over them run in the cache.
GELU_ROWS = 64
# Queries that attention takes at once: no (H, T, S) array of scores is made, and half of it needn't be computed.
# A prefill of 512 took 8 % longer with twice as many, and 5 % longer with half.
QUERY_BLOCK = 64


def matmul(x: Array, w: Array) -> Array:
    """Multiply each row by a matrix.

        y = x w

    x: (N, n_in) · w: (n_in, n_out) → (N, n_out).

    >>> matmul(np.float32([[1, 2]]), np.float32([[1, 0, 1], [0, 1, 1]]))
    array([[1., 2., 3.]], dtype=float32)
    """
    if not 1 < len(x) < FEW_ROWS or type(w) is not np.ndarray:  # a matrix in int8 goes through its tiles by itself
        return x @ w
    y = np.empty((len(x), w.shape[1]), np.float32)
    columns = max(1, BLOCK_BYTES // w[:, :1].nbytes)
    for start in range(0, w.shape[1], columns):
        block = slice(start, start + columns)
        for row, out in zip(x, y, strict=True):
            np.dot(row, w[:, block], out=out[block])
    return y


def linear(x: Array, w: Array, b: Array) -> Array:
    """Multiply each row by a matrix and add a bias.

        y = x w + b

    x: (N, n_in) · w: (n_in, n_out) · b: (n_out,) → (N, n_out). `conv1d` in OpenAI's model.py.

    >>> linear(np.float32([[1, 2]]), np.float32([[1, 0, 1], [0, 1, 1]]), np.float32([0, 0, 10]))
    array([[ 1.,  2., 13.]], dtype=float32)
    """
    y = matmul(x, w)
    y += b
    return y


def layer_norm(x: Array, gain: Array, bias: Array, eps: float = 1e-5) -> Array:
    """Normalise each row to zero mean and unit variance, then scale and shift.

        y = gain * (x - mean) / sqrt(var + eps) + bias

    x: (N, C) · gain, bias: (C,) → (N, C). Ba et al. 2016, "Layer Normalization"; `norm` in OpenAI's model.py.

    >>> layer_norm(np.float32([[1, 3]]), gain=np.float32([1, 1]), bias=np.float32([0, 5])).round(3)
    array([[-1.,  6.]], dtype=float32)
    """
    # np.mean and np.var say the same, but take longer over one row than all the rest of this.
    C = np.float32(x.shape[-1])
    y: Array = x - x.sum(axis=-1, keepdims=True) / C
    var = np.einsum("nc,nc->n", y, y)[:, None] / C
    y /= np.sqrt(var + np.float32(eps))
    y *= gain
    y += bias
    return y


def gelu(x: Array) -> Array:
    """The Gaussian error linear unit, in the tanh form that GPT-2 was trained with; overwrites x.

        y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))

    x: (N, 4C) → (N, 4C). Hendrycks & Gimpel 2016, "Gaussian Error Linear Units"; `gelu` in OpenAI's model.py.

    >>> gelu(np.float32([[-1, 0, 1, 10]])).round(4)
    array([[-0.1588,  0.    ,  0.8412, 10.    ]], dtype=float32)
    """
    for start in range(0, len(x), GELU_ROWS):
        rows = x[start : start + GELU_ROWS]
        inner = rows * rows
        inner *= np.float32(0.044715)
        inner += np.float32(1)
        inner *= rows
        inner *= np.float32(np.sqrt(2 / np.pi))
        np.tanh(inner, out=inner)
        inner += np.float32(1)
        rows *= np.float32(0.5)
        rows *= inner
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
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        seen = S - T + stop
        scores = q[:, start:stop] @ k[:, :seen].transpose(0, 2, 1)  # (H, block, D) x (H, D, seen) -> (H, block, seen)
        if stop - start > 1:  # among themselves, they see only those before
            future = np.triu(np.ones((stop - start, stop - start), bool), k=1)
            scores[:, :, S - T + start :][:, future] = -np.inf
        weights = softmax(scores)
        if watch is not None:
            watch(weights)
        np.matmul(weights, v[:, :seen], out=y[start:stop].transpose(1, 0, 2))  # -> (H, block, D)
    return y.reshape(T, H * D)
