"""Attention: of many new positions of one sequence, block by block, and of one new position of many sequences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from npgpt2.formulas import Array
from npgpt2.kernels.rows import softmax
from npgpt2.kernels.threads import THREAD_WORTH, share

# Queries that are taken at once: no (H, T, S) array of scores is made, and half of it needn't be computed. A prefill of
# 512 took 8 % longer with twice as many, and 5 % longer with half: `python tools/tune.py attention`.
QUERY_BLOCK = 64
# Bytes of keys and values that are worth a thread where there is one query for each: fetching them takes longer than
# computing with them.
BYTES_WORTH = 2**20


def causal_attention(q: Array, k: Array, v: Array, watch: Callable[[Array], object] | None = None) -> Array:
    """Each of the last T positions gathers the values of those up to itself: see `formulas.causal_attention`.

    q: (H, T, D) · k, v: (H, S, D) with S >= T · watch: called with the weights of some queries after the other, each
    time (H, block, seen), where the last of the block's queries sees `seen` positions → (T, C)

    >>> q = np.zeros((1, 2, 1), np.float32)                # indifferent queries take the mean of what they see
    >>> causal_attention(q, q, v=np.float32([[[2], [4]]]))
    array([[2.],
           [3.]], dtype=float32)
    """
    H, T, D = q.shape
    S = k.shape[1]
    y = np.empty((T, H * D), np.float32)

    def some_heads(first: int, last: int) -> None:
        heads = slice(first, last)
        _attend(q[heads], k[heads], v[heads], y[:, first * D : last * D].reshape(T, last - first, D), watch)

    # Whoever watches wants to see all heads together.
    share(H, some_heads, H if watch else max(1, THREAD_WORTH // (T * S * D)))
    return y


def _attend(q: Array, k: Array, v: Array, y: Array, watch: Callable[[Array], object] | None) -> None:
    """The same for some heads, on one thread. y: (T, H, D), which is overwritten."""
    T, S = q.shape[1], k.shape[1]
    q = q * np.float32(q.shape[2] ** -0.5)
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


def decode_attention(q: Array, k: Array, v: Array, y: Array, hidden: npt.NDArray[np.bool_] | None = None) -> None:
    """Attention of one new position of each of B sequences, whose keys and values lie in one array.

    q: (B, H, D) · k, v: (B, H, S, D), where S is the longest sequence's length · y: (B, C), which is overwritten:
    float32, in one piece · hidden: (B, S), the positions that are not a sequence's own, whose values have to be finite
    all the same; None where all S are
    """
    B, H, D = q.shape
    q = q * np.float32(D**-0.5)
    scores = q[:, :, None] @ k.transpose(0, 1, 3, 2)  # (B, H, 1, D) x (B, H, D, S)
    if hidden is not None:
        np.copyto(scores, -np.inf, where=hidden[:, None, None])
    np.matmul(softmax(scores), v, out=y.reshape(B, H, 1, D))  # (B, H, 1, S) x (B, H, S, D) -> (B, H, 1, D)
