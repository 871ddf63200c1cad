"""The slow and obvious versions: what the fast ones in npgpt2 have to equal. float64, no cache, no blocks."""

import numpy as np


def dequantized(weights):
    """A model's variables as arrays, where some are in int8: each value times the scale of its output."""
    arrays = {name: weights[name] for name in weights.shapes}
    for name, array in arrays.items():
        if array.dtype == np.int8:
            scales = weights[f"{name}/scales"].astype(np.float64)
            arrays[name] = (array * (scales[:, None] if name == "wte" else scales)).astype(np.float32)
    return arrays


def linear(x, w, b):
    return np.array(
        [[sum(x[n, i] * w[i, j] for i in range(len(w))) + b[j] for j in range(len(b))] for n in range(len(x))]
    )


def layer_norm(x, gain, bias):
    mean = x.mean(axis=-1, keepdims=True)
    var = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return gain * (x - mean) / np.sqrt(var + 1e-5) + bias


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention_weights(q, k):
    """One position and one head at a time. q: (H, T, D) · k: (H, S, D) → (H, T, S)."""
    H, T, D = q.shape
    S = k.shape[1]
    weights = np.zeros((H, T, S))
    for h in range(H):
        for t in range(T):
            seen = S - T + t + 1
            weights[h, t, :seen] = softmax(np.array([q[h, t] @ k[h, s] / np.sqrt(D) for s in range(seen)]))
    return weights


def causal_attention(q, k, v):
    """q: (H, T, D) · k, v: (H, S, D) → (T, C)."""
    H, T, D = q.shape
    weights, y = attention_weights(q, k), np.zeros((T, H, D))
    for h in range(H):
        for t in range(T):
            seen = v.shape[1] - T + t + 1  # what comes later may be anything, even NaN
            y[t, h] = sum(weights[h, t, s] * v[h, s] for s in range(seen))
    return y.reshape(T, H * D)


def trace(weights, hparams, tokens):
    """The whole model on one sequence but for its head, every position from scratch, in float64.

    tokens: (T,) → the attention weights of each layer (L, H, T, T), and the residual stream after it (L, T, C).
    """
    w = {name: array.astype(np.float64) for name, array in dequantized(weights).items()}
    T, C, H = len(tokens), hparams.n_embd, hparams.n_head
    x = w["wte"][tokens] + w["wpe"][:T]
    attention, residual = [], []
    for layer in range(hparams.n_layer):
        at = f"h{layer}/"
        h = layer_norm(x, w[at + "ln_1/g"], w[at + "ln_1/b"])
        qkv = h @ w[at + "attn/c_attn/w"] + w[at + "attn/c_attn/b"]
        q, k, v = (part.reshape(T, H, C // H).transpose(1, 0, 2) for part in np.split(qkv, 3, axis=-1))
        attention.append(attention_weights(q, k))
        x = x + causal_attention(q, k, v) @ w[at + "attn/c_proj/w"] + w[at + "attn/c_proj/b"]
        h = layer_norm(x, w[at + "ln_2/g"], w[at + "ln_2/b"])
        h = gelu(h @ w[at + "mlp/c_fc/w"] + w[at + "mlp/c_fc/b"])
        x = x + h @ w[at + "mlp/c_proj/w"] + w[at + "mlp/c_proj/b"]
        residual.append(x)
    return np.array(attention), np.array(residual)


def logits(weights, hparams, tokens):
    """The whole model on one sequence, every position from scratch. tokens: (T,) → (T, V) float64."""
    w = {name: array.astype(np.float64) for name, array in dequantized(weights).items()}
    x = trace(weights, hparams, tokens)[1][-1]
    return layer_norm(x, w["ln_f/g"], w["ln_f/b"]) @ w["wte"].T
