"""The arithmetic of GPT-2: each function says its shapes and its formula, then is the formula, and nothing else.

They compute in the type that they are given, float32 or float64. `npgpt2.kernels` has the same functions again, as fast
as NumPy can be made to go; the tests hold the two together.

Letters: B sequences, T new positions, S positions in all, C n_embd, H heads, D = C/H, V vocabulary; N rows of any kind.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def linear(x: Array, w: Array, b: Array | float = 0.0) -> Array:
    """Multiply each row by a matrix, and add a bias.

        y = x w + b

    x: (N, n_in) · w: (n_in, n_out) · b: (n_out,), or 0 for none → (N, n_out). `conv1d` in OpenAI's model.py.

    >>> linear(np.float32([[1, 2]]), np.float32([[1, 0, 1], [0, 1, 1]]), np.float32([0, 0, 10]))
    array([[ 1.,  2., 13.]], dtype=float32)
    """
    return x @ w + b


def layer_norm(x: Array, gain: Array, bias: Array, eps: float = 1e-5) -> Array:
    """Normalise each row to zero mean and unit variance, then scale and shift.

        y = gain * (x - mean) / sqrt(var + eps) + bias

    x: (N, C) · gain, bias: (C,) → (N, C). Ba et al. 2016, "Layer Normalization"; `norm` in OpenAI's model.py.

    >>> layer_norm(np.float32([[1, 3]]), gain=np.float32([1, 1]), bias=np.float32([0, 5])).round(3)
    array([[-1.,  6.]], dtype=float32)
    """
    mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return gain * (x - mean) / np.sqrt(var + eps) + bias


def gelu(x: Array) -> Array:
    """The Gaussian error linear unit, in the tanh form that GPT-2 was trained with.

        y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))

    x: (N, 4C) → (N, 4C). Hendrycks & Gimpel 2016, "Gaussian Error Linear Units"; `gelu` in OpenAI's model.py.

    >>> gelu(np.float32([[-1, 0, 1, 10]])).round(4)
    array([[-0.1588,  0.    ,  0.8412, 10.    ]], dtype=float32)
    """
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    """Turn each row of scores into shares that add up to 1. Subtracting the largest keeps exp from overflowing.

        y = exp(x - max(x)) / sum(exp(x - max(x)))

    x: (..., N) → (..., N). `softmax` in OpenAI's model.py.

    >>> softmax(np.float32([[0, 0], [-1000, 0]]))
    array([[0.5, 0.5],
           [0. , 1. ]], dtype=float32)
    """
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """Each of the last T positions gathers the values of those up to itself, weighted by how well keys fit its query.

        y = softmax(mask(q k^T / sqrt(D))) v

    q: (H, T, D) · k, v: (H, S, D) with S >= T → (T, C), the heads side by side. Vaswani et al. 2017, "Attention Is All
    You Need"; `multihead_attn` in OpenAI's model.py.

    >>> q = np.zeros((1, 2, 1), np.float32)                # indifferent queries take the mean of what they see
    >>> causal_attention(q, q, v=np.float32([[[2], [4]]]))
    array([[2.],
           [3.]], dtype=float32)
    """
    (H, T, D), S = q.shape, k.shape[1]
    scores = q @ k.transpose(0, 2, 1) / D**0.5  # (H, T, D) x (H, D, S) -> (H, T, S)
    future = np.triu(np.ones((T, S), bool), k=1 + S - T)  # what comes later than each of the last T
    weights = softmax(np.where(future, np.float32(-np.inf), scores))
    y = weights @ v  # (H, T, S) x (H, S, D) -> (H, T, D)
    return y.transpose(1, 0, 2).reshape(T, H * D)
