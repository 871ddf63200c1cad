"""What happens inside the forward pass, as the formulas have it."""

import numpy as np

from npgpt2 import formulas
from npgpt2.model import block, embed


def attention_weights(q, k):
    """The part of `formulas.causal_attention` that it doesn't return. q: (H, T, D), k: (H, S, D) → (H, T, S)"""
    T, S = q.shape[1], k.shape[1]
    scores = q @ k.transpose(0, 2, 1) / q.shape[2] ** 0.5
    return formulas.softmax(np.where(np.arange(S) > np.arange(S - T, S)[:, None], -np.inf, scores))


class Watching:
    """The memory of a text by itself, which keeps the attention weights of each layer."""

    def __init__(self):
        self.weights = []

    def attend(self, layer, q, k, v):
        self.weights.append(attention_weights(q, k))
        return formulas.causal_attention(q, k, v)


def traced(weights, hparams, tokens):
    """Each layer's attention weights (L, H, T, T), and the residual stream after it (L, T, C), in float64."""
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    memory, residual = Watching(), []
    x = embed(tokens, np.arange(len(tokens)), weights)
    for layer in range(hparams.n_layer):
        x = block(x, weights, layer, hparams.n_head, memory)
        residual.append(x.copy())
    return np.array(memory.weights), np.array(residual)
