"""What happens inside the model: a forward pass that somebody watches.

There is no forward pass here: it is the blocks of `model.py`, one after the other. What they pass by is only kept here,
and read with the model's own head: the "logit lens" of "interpreting GPT: the logit lens", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np

from npgpt2 import kernels
from npgpt2.engine import Model
from npgpt2.forks import whole
from npgpt2.formulas import Array
from npgpt2.kernels import Matrices
from npgpt2.model import HParams, Ids, Text, block, embed, head


@dataclass(frozen=True, eq=False)
class Trace:
    """A forward pass, and what happened in it; `GPT2.trace` makes one. L is n_layer.

    tokens: (T,) int64, what was read · logits: (T, V) float32, for the token after each position, bit for bit those of
    `GPT2.logits` · attention: (L, H, T, T) float32, how much of what each position gathered came from which: row t adds
    up to 1 and is 0 behind t · residual: (L, T, C) float32, the residual stream after each layer. The last two are None
    if they were not asked for. A notebook shows one that has both as `npgpt2 inspect` does, up to 256 tokens.

    >>> trace = model.trace(model.tokenizer.encode("A language model"), attention=True, residual=True)
    >>> trace.attention[0, 0].round(2)                                # the first head of the first layer
    array([[1.  , 0.  , 0.  ],
           [0.75, 0.25, 0.  ],
           [0.24, 0.43, 0.33]], dtype=float32)
    """

    tokens: Ids
    logits: Array
    attention: Array | None
    residual: Array | None
    matrices: Matrices
    model: Model | None = None  # whose it is, and what that is called
    name: str = "a model"

    def __repr__(self) -> str:
        kept = {"logits": self.logits, "attention": self.attention, "residual": self.residual}
        shapes = (f"{name} {array.shape}" for name, array in kept.items() if array is not None)
        return f"<Trace of {len(self.tokens)} tokens: {', '.join(shapes)}>"

    def _repr_html_(self) -> str:
        """The views of `npgpt2 inspect`, or why they can't be shown."""
        with whole("import"):
            from npgpt2.study.report import make_frame  # which a trace that nobody shows doesn't need
        try:
            return make_frame(self)
        except ValueError as error:
            return f"<p><code>{escape(repr(self))}</code></p><p>{escape(str(error))}</p>"

    def lens(self, layer: int) -> Array:
        """What the model would say after each position if this layer were its last: the logit lens.

        layer: 0 to L - 1, or from the end as in a list → (T, V) float32, computed by each call. The last layer's are
        the logits. A trace without `residual` raises ValueError.

        >>> trace = model.trace(model.tokenizer.encode("A language model"), residual=True)
        >>> [model.tokenizer.decode([trace.lens(layer)[-1].argmax()]) for layer in range(2)]
        [' model', ' plays']
        """
        if self.residual is None:
            raise ValueError("the trace has no residual stream to look at; ask for it: trace(tokens, residual=True)")
        with kernels.sharing_work(self.matrices, len(self.tokens)):  # as in the pass itself, to the last bit
            return head(self.residual[layer], self.matrices, kernels)


class Watched:
    """The memory of a text by itself, as `model.Text`, which keeps every layer's attention weights: (L, H, T, T)."""

    def __init__(self, weights: Array) -> None:
        self.weights = weights

    def attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Attention among the rows. q, k, v: (H, T, D) → (T, C)."""

        def keep(block: Array) -> None:
            _, queries, seen = block.shape
            self.weights[layer, :, seen - queries : seen, :seen] = block

        return kernels.causal_attention(q, k, v, keep)


def trace(matrices: Matrices, hparams: HParams, tokens: Ids, attention: bool = False, residual: bool = False) -> Trace:
    """Read a sequence and keep what was asked for. tokens: (T,), of at least one and at most n_ctx."""
    L, H, T, C = hparams.n_layer, hparams.n_head, len(tokens), hparams.n_embd
    weights = np.zeros((L, H, T, T), np.float32) if attention else None
    stream = np.empty((L, T, C), np.float32) if residual else None
    memory = Text(kernels) if weights is None else Watched(weights)
    with kernels.sharing_work(matrices, T):
        x = embed(tokens, np.arange(T), matrices)
        for layer in range(L):
            x = block(x, matrices, layer, H, memory, kernels)
            if stream is not None:
                stream[layer] = x
        return Trace(tokens, head(x, matrices, kernels), weights, stream, matrices)
