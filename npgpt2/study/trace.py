"""What happens inside the model: a forward pass that somebody watches.

There is no forward pass here: it is that of `model.py`, which shows whoever asks the attention of every layer and the
residual stream after it. They are only kept here, and read with the model's own head: the "logit lens" of
"interpreting GPT: the logit lens", 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from npgpt2.kernels.kernels import Array
from npgpt2.model import Cache, HParams, Tokens, forward, head, shared_pass


@dataclass(frozen=True, eq=False)
class Trace:
    """A forward pass, and what happened in it; `GPT2.trace` makes one. L is n_layer.

    tokens: (T,) int64, what was read · logits: (T, V) float32, for the token after each position, bit for bit those of
    `GPT2.logits` · attention: (L, H, T, T) float32, how much of what each position gathered came from which: row t adds
    up to 1 and is 0 behind t · residual: (L, T, C) float32, the residual stream after each layer. The last two are None
    if they were not asked for.

    >>> trace = model.trace(model.tokenizer.encode("A language model"), attention=True, residual=True)
    >>> trace.attention[0, 0].round(2)                                # the first head of the first layer
    array([[1.  , 0.  , 0.  ],
           [0.75, 0.25, 0.  ],
           [0.24, 0.43, 0.33]], dtype=float32)
    """

    tokens: Tokens
    logits: Array
    attention: Array | None
    residual: Array | None
    weights: Mapping[str, Array] = field(repr=False)

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
        with shared_pass(self.weights, len(self.residual[layer])):  # as in the pass itself, to the last bit
            return head(self.residual[layer], self.weights)


def trace(
    weights: Mapping[str, Array], hparams: HParams, tokens: Tokens, attention: bool = False, residual: bool = False
) -> Trace:
    """Read a sequence and keep what was asked for. tokens: (T,) of at least one; more than n_ctx raise ValueError."""
    L, H, T, C = hparams.n_layer, hparams.n_head, len(tokens), hparams.n_embd
    kept: dict[str, Array] = {}
    if attention:
        kept["attention"] = np.zeros((L, H, T, T), np.float32)
    if residual:
        kept["residual"] = np.empty((L, T, C), np.float32)

    def watch(point: str, layer: int, array: Array) -> None:
        if point == "attention" and attention:
            _, block, seen = array.shape
            kept[point][layer, :, seen - block : seen, :seen] = array
        elif point == "residual" and residual:
            kept[point][layer] = array

    logits = forward(weights, hparams, [tokens], [Cache(hparams)], all_positions=True, watch=watch)
    return Trace(tokens, logits, kept.get("attention"), kept.get("residual"), weights)
