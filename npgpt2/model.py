"""GPT-2, from token ids to logits: embedding, blocks, head. This file and `formulas.py` are all of it.

Rows are positions: a text's tokens one behind the other, or those of several texts, since only attention looks from one
row at another. Who looks where is up to a `Memory`; for a text by itself, `Text` is all that it takes.

    >>> logits = forward(weights, hparams, tokens=np.array([10, 20, 30]))  # of the tests' small model
    >>> logits.shape                                                       # after each token, one score for each of V
    (3, 520)

Names are those of OpenAI's `src/model.py` and of its checkpoints. Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners".
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from npgpt2 import formulas
from npgpt2.formulas import Array

Ids = npt.NDArray[np.int64]


class HParams(NamedTuple):
    """A model's sizes, under the names that OpenAI's `hparams.json` gives them.

    n_vocab: entries of the vocabulary, V · n_ctx: positions that the model can see · n_embd: width of the residual
    stream, C · n_head: attention heads of a layer, H · n_layer: layers

    >>> HParams(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12).n_head
    12
    """

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int


def variable_shapes(hparams: HParams) -> dict[str, tuple[int, ...]]:
    """Every variable of a model of these sizes: its name in the checkpoint, without `model/`, and its shape.

    >>> variable_shapes(HParams(50257, 1024, 768, 12, 12))["h11/attn/c_attn/w"]
    (768, 2304)
    """
    C = hparams.n_embd
    shapes: dict[str, tuple[int, ...]] = {"wte": (hparams.n_vocab, C), "wpe": (hparams.n_ctx, C)}
    for layer in range(hparams.n_layer):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h{layer}/{norm}/g": (C,), f"h{layer}/{norm}/b": (C,)}
        for linear, n_in, n_out in (
            ("attn/c_attn", C, 3 * C),
            ("attn/c_proj", C, C),
            ("mlp/c_fc", C, 4 * C),
            ("mlp/c_proj", 4 * C, C),
        ):
            shapes |= {f"h{layer}/{linear}/w": (n_in, n_out), f"h{layer}/{linear}/b": (n_out,)}
    return shapes | {"ln_f/g": (C,), "ln_f/b": (C,)}


class Weights(Protocol):
    """A model's variables by name, as any mapping has them: arrays, or what `Kernels.linear` takes for them."""

    def __getitem__(self, name: str, /) -> Any: ...


class Kernels(Protocol):
    """What computes: `formulas`, or whatever has the same functions."""

    def linear(self, x: Array, w: Any, b: Any = 0.0, /) -> Array: ...
    def layer_norm(self, x: Array, gain: Array, bias: Array, /) -> Array: ...
    def gelu(self, x: Array, /) -> Array: ...
    def causal_attention(self, q: Array, k: Array, v: Array, /) -> Array: ...


class Memory(Protocol):
    """Lets each row look at what came before it: at other rows, and at what it remembers of rows before those."""

    def attend(self, layer: int, q: Array, k: Array, v: Array, /) -> Array:
        """Attention in a layer. q, k, v: (H, N, D), the new rows' → (N, C), what each gathered."""


class Text(NamedTuple):
    """The memory of a text that is read by itself, from its beginning: nothing but its own rows."""

    kernels: Kernels = formulas

    def attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Attention among the rows, in every layer alike. q, k, v: (H, N, D) → (N, C)."""
        return self.kernels.causal_attention(q, k, v)


def embed(tokens: Ids, positions: Ids, weights: Weights) -> Array:
    """What a token means, plus where it stands. tokens, positions: (N,) → (N, C)."""
    return weights["wte"][tokens] + weights["wpe"][positions]


def attention(x: Array, weights: Weights, layer: int, n_head: int, memory: Memory, kernels: Kernels) -> Array:
    """Multi-head self-attention: `attn` in OpenAI's model.py. x: (N, C) → (N, C)."""
    at, (N, C) = f"h{layer}/attn", x.shape
    qkv = kernels.linear(x, weights[f"{at}/c_attn/w"], weights[f"{at}/c_attn/b"])  # (N, C) -> (N, 3C)
    q, k, v = qkv.reshape(N, 3, n_head, C // n_head).transpose(1, 2, 0, 3)  # -> 3 x (H, N, D)
    y = memory.attend(layer, q, k, v)  # -> (N, C)
    return kernels.linear(y, weights[f"{at}/c_proj/w"], weights[f"{at}/c_proj/b"])


def mlp(x: Array, weights: Weights, layer: int, kernels: Kernels) -> Array:
    """The feed-forward half of a layer: `mlp` in OpenAI's model.py. x: (N, C) → (N, C)."""
    at = f"h{layer}/mlp"
    h = kernels.gelu(kernels.linear(x, weights[f"{at}/c_fc/w"], weights[f"{at}/c_fc/b"]))  # (N, C) -> (N, 4C)
    return kernels.linear(h, weights[f"{at}/c_proj/w"], weights[f"{at}/c_proj/b"])


def block(x: Array, weights: Weights, layer: int, n_head: int, memory: Memory, kernels: Kernels = formulas) -> Array:
    """A layer: what attention collects from other rows is added to each, then what the MLP makes of it.

    x: the residual stream (N, C) → the same array. `block` in OpenAI's model.py.
    """
    h = kernels.layer_norm(x, weights[f"h{layer}/ln_1/g"], weights[f"h{layer}/ln_1/b"])
    x += attention(h, weights, layer, n_head, memory, kernels)
    h = kernels.layer_norm(x, weights[f"h{layer}/ln_2/g"], weights[f"h{layer}/ln_2/b"])
    x += mlp(h, weights, layer, kernels)
    return x


def head(x: Array, weights: Weights, kernels: Kernels = formulas) -> Array:
    """How well each token of the vocabulary would fit next: x: (N, C), the residual stream → logits (N, V)."""
    x = kernels.layer_norm(x, weights["ln_f/g"], weights["ln_f/b"])
    return kernels.linear(x, weights["wte"].T)


def forward(
    weights: Weights,
    hparams: HParams,
    tokens: Ids,
    positions: Ids | None = None,
    memory: Memory | None = None,
    wanted: Ids | slice = slice(None),
    kernels: Kernels = formulas,
) -> Array:
    """Read tokens; return the logits of what comes next. `model` in OpenAI's model.py.

    weights: a model's variables, see `variable_shapes` · tokens: (N,) ids · positions: (N,), where each stands in its
    text; by default one text's, from its beginning · memory: what rows can look at; by default each other · wanted: the
    rows whose logits are needed, (M,); by default all · kernels: what has the functions of `formulas` → (M, V)
    """
    positions = np.arange(len(tokens)) if positions is None else positions
    memory = Text(kernels) if memory is None else memory
    x = embed(tokens, positions, weights)  # (N,) -> (N, C)
    for layer in range(hparams.n_layer):
        x = block(x, weights, layer, hparams.n_head, memory, kernels)
    return head(x[wanted], weights, kernels)  # -> (M, V)
