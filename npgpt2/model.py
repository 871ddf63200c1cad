"""GPT-2's forward pass: tokens in, logits out, and the cache that saves computing a position twice.

There is one forward pass. It reads any number of sequences together, each with any number of new tokens, so that it
serves a prompt (prefill), one token after another (decode), and batches of sequences of different lengths alike: the
new tokens of all sequences lie one behind the other as rows of one array, and only attention looks at each sequence by
itself. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; OpenAI's `src/model.py`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from npgpt2.kernels.kernels import THREAD_WORTH, Array, causal_attention, gelu, layer_norm, linear
from npgpt2.kernels.threads import share, sharing

Tokens = npt.NDArray[np.intp]
# Who looks on: called with what there is to see ("attention" or "residual"), the layer, and the array.
Watch = Callable[[str, int, Array], object]


class HParams(NamedTuple):
    """A model's sizes, under the names that OpenAI's `hparams.json` gives them.

    n_vocab: entries of the vocabulary · n_ctx: positions that the model can see · n_embd: width of the residual
    stream · n_head: attention heads of a layer · n_layer: layers

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
        for product, n_in, n_out in (
            ("attn/c_attn", C, 3 * C),
            ("attn/c_proj", C, C),
            ("mlp/c_fc", C, 4 * C),
            ("mlp/c_proj", 4 * C, C),
        ):
            shapes |= {f"h{layer}/{product}/w": (n_in, n_out), f"h{layer}/{product}/b": (n_out,)}
    return shapes | {"ln_f/g": (C,), "ln_f/b": (C,)}


class Cache:
    """What one sequence's positions so far have left behind for those to come: their keys and values in each layer.

    k, v: (n_layer, H, n_ctx, D) float32, of which the first `length` positions are filled. The system gives memory for
    the others once they are; a position of 124M takes 74 kB.
    """

    def __init__(self, hparams: HParams) -> None:
        self._hparams = hparams
        self.length = 0
        shape = (hparams.n_layer, hparams.n_head, hparams.n_ctx, hparams.n_embd // hparams.n_head)
        self.k, self.v = _memory_for(shape), _memory_for(shape)

    def check_room(self, positions: int) -> None:
        """Raise ValueError where so many more would be more than n_ctx."""
        if self.length + positions > self._hparams.n_ctx:
            length, n_ctx = self.length + positions, self._hparams.n_ctx
            raise ValueError(f"{length} positions are more than the model's n_ctx of {n_ctx}")

    def beginning(self, length: int) -> Cache:
        """A copy of the first `length` positions, with room for more."""
        copy = Cache(self._hparams)
        copy.length = length
        copy.k[:, :, :length], copy.v[:, :, :length] = self.k[:, :, :length], self.v[:, :, :length]
        return copy


def _memory_for(shape: tuple[int, ...]) -> Array:
    """An array whose pages take no memory until they are written to; MemoryError where there isn't room for it.

    Those that np.empty gives are of 2 MB, which would all be written to by the first positions.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        memory = mmap.mmap(-1, 4 * prod(shape), **private)
    except OSError as error:
        raise MemoryError(f"{4 * prod(shape):,} bytes for a cache") from error
    with suppress(AttributeError, OSError):  # where the system would give large pages unasked
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)


def attention(
    x: Array,
    weights: Mapping[str, Array],
    layer: int,
    n_head: int,
    rows: Sequence[slice],
    caches: Sequence[Cache],
    watch: Watch | None = None,
) -> Array:
    """Multi-head self-attention of each sequence over its own past and new positions: `attn` in OpenAI's model.py.

    x: (N, C), where `rows` says which rows are whose → (N, C). New keys and values are put into the caches.
    """
    at = f"h{layer}/attn"
    N, C = x.shape
    qkv = linear(x, weights[f"{at}/c_attn/w"], weights[f"{at}/c_attn/b"])  # (N, C) -> (N, 3C)
    qkv = qkv.reshape(N, 3, n_head, C // n_head).transpose(1, 2, 0, 3)  # -> (3, H, N, D)
    y = np.empty((N, C), np.float32)

    def some_sequences(first: int, last: int) -> None:
        for own, cache in zip(rows[first:last], caches[first:last], strict=True):
            q, k, v = qkv[:, :, own]  # 3 x (H, T, D)
            gather(q, k, v, layer, cache, y[own], watch and partial(watch, "attention", layer))

    # Where each sequence has a single token, some sequences by each thread; otherwise one by one, see `gather`.
    worth = THREAD_WORTH // (C * (1 + max(cache.length for cache in caches)))
    share(len(rows), some_sequences, worth if len(rows) == N and watch is None else len(rows))
    return linear(y, weights[f"{at}/c_proj/w"], weights[f"{at}/c_proj/b"])


def gather(
    q: Array, k: Array, v: Array, layer: int, cache: Cache, y: Array, watch: Callable[[Array], object] | None
) -> None:
    """Put one sequence's new keys and values into its cache, and let its queries gather from there: into y.

    q, k, v: (H, T, D) · y: (T, C). Some heads by each thread, unless `watch` wants to see all of them together.
    """
    H, T, D = q.shape
    start, end = cache.length, cache.length + T  # T -> S

    def some_heads(first: int, last: int) -> None:
        heads = slice(first, last)
        keys, values = cache.k[layer, heads], cache.v[layer, heads]
        keys[:, start:end], values[:, start:end] = k[heads], v[heads]
        y[:, first * D : last * D] = causal_attention(q[heads], keys[:, :end], values[:, :end], watch)

    share(H, some_heads, H if watch else max(1, THREAD_WORTH // (T * end * D)))


def mlp(x: Array, weights: Mapping[str, Array], layer: int) -> Array:
    """The feed-forward half of a layer: `mlp` in OpenAI's model.py. x: (N, C) → (N, C)."""
    at = f"h{layer}/mlp"
    h = gelu(linear(x, weights[f"{at}/c_fc/w"], weights[f"{at}/c_fc/b"]))  # (N, C) -> (N, 4C)
    return linear(h, weights[f"{at}/c_proj/w"], weights[f"{at}/c_proj/b"])  # -> (N, C)


def head(x: Array, weights: Mapping[str, Array]) -> Array:
    """What comes next, by a residual stream: its final layer norm, and how well each token fits. x: (N, C) → (N, V)."""
    x = layer_norm(x, weights["ln_f/g"], weights["ln_f/b"])
    return linear(x, weights["wte"].T)


def shared_pass(weights: Mapping[str, Array], rows: int, sequences: int = 1) -> AbstractContextManager[None]:
    """`sharing`, if a pass of so many rows is worth it: the kernels divide their work among our threads, or else BLAS
    divides each product by itself.

    Small products, and those of one row, are over before threads of Python's have met; in int8 they take longer. A few
    rows of one sequence are mostly guesses, between single ones, after which BLAS's threads stay awake for a while: two
    of 124M took 18 % longer shared, but two sequences, which follow their like, a quarter less.
    """
    wte = weights["wte"]
    largest = rows * 4 * wte.shape[1] ** 2  # multiplications, of the rows and a matrix (C, 4C)
    in_int8 = not isinstance(wte, np.ndarray)
    worth = 2 if in_int8 else 4 if sequences > 1 else 8
    return sharing(largest >= worth * THREAD_WORTH and (in_int8 or rows > 1))


@np.errstate(over="ignore", invalid="ignore")  # what overflows ends in logits that the sampler refuses, with a message
def forward(
    weights: Mapping[str, Array],
    hparams: HParams,
    tokens: Sequence[Tokens],
    caches: Sequence[Cache],
    all_positions: bool = False,
    watch: Watch | None = None,
) -> Array:
    """Read each sequence's new tokens; return the logits of what comes next.

    weights: a model's variables by their names in OpenAI's checkpoint · tokens: for each of the B sequences its new
    token ids, (T,) of at least one, where T can differ · caches: each sequence's past, to which its new positions are
    added → (B, V) float32, after the last token of each; with `all_positions` (N, V), after every token, where N is
    the sum of all T. `model` in OpenAI's model.py.

    watch: called in each layer with "attention" and the weights (H, block, S) by which a block of new positions sees
    its sequence, block after block, and then with "residual" and the residual stream (N, C), which the next layer
    overwrites.
    """
    lengths = [len(new) for new in tokens]
    for cache, length in zip(caches, lengths, strict=True):
        cache.check_room(length)
    ends = np.cumsum(lengths)
    rows = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    positions = np.concatenate([np.arange(c.length, c.length + n) for c, n in zip(caches, lengths, strict=True)])

    with shared_pass(weights, len(positions), len(caches)):
        x = weights["wte"][np.concatenate(tokens)] + weights["wpe"][positions]  # (N,) -> (N, C)
        for layer in range(hparams.n_layer):
            h = layer_norm(x, weights[f"h{layer}/ln_1/g"], weights[f"h{layer}/ln_1/b"])
            x += attention(h, weights, layer, hparams.n_head, rows, caches, watch)
            h = layer_norm(x, weights[f"h{layer}/ln_2/g"], weights[f"h{layer}/ln_2/b"])
            x += mlp(h, weights, layer)
            if watch is not None:
                watch("residual", layer, x)
        for cache, length in zip(caches, lengths, strict=True):
            cache.length += length

        if not all_positions:
            x = x[ends - 1]  # (N, C) -> (B, C)
        return head(x, weights)  # -> (B, V) or (N, V)
