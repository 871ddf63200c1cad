"""A trace as one HTML file that shows itself: `report.html`, filled with numbers.

The numbers travel as arrays of a few bytes each, compressed, in base64; every string as JSON, in which no markup can
begin. The file asks nothing of the network, and its Content-Security-Policy allows no script but its own, so that what
a prompt or a vocabulary holds is shown and never run. What the page computes itself is what its sliders change.
"""

from __future__ import annotations

import inspect
import json
import zlib
from base64 import b64encode
from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from npgpt2 import formulas, model
from npgpt2.formulas import Array
from npgpt2.study.distribution import EXACT, SHOWN, entries_of, group_bounds, token_characters
from npgpt2.study.score import surprisal
from npgpt2.study.template import allowed_sources, template
from npgpt2.study.trace import Trace
from npgpt2.tokenizer import Tokenizer

# Positions whose logits are looked at together, in float64: those of a whole text in 124M would take 400 kB a token.
POSITIONS = 64
# At which temperatures the page's entropy is compared with the exact one.
COMPARED = (0.5, 1.0, 2.0, 3.0)
# Steps into which square roots of attention weights are rounded, finer ones first: the first that compress to so many
# bytes are taken, for texts of 256 tokens or less, and in proportion to longer ones.
STEPS = (255, 63, 15)
ATTENTION_BYTES = 2_400_000
# Tokens that are shown within other pages. A notebook keeps what it shows in its file, and has room for some such.
FRAMED = 256


def make_report(trace: Trace, tokenizer: Tokenizer, name: str) -> str:
    """The page of a trace, as HTML: at most 5 MB for 256 tokens of 124M.

    trace: with attention and residual, which ValueError asks for · tokenizer: the vocabulary of its model · name: what
    to call the model. Logits that are not all finite raise ValueError. Beside the trace, it takes half of the
    attention's memory, as much as the logits for one layer's lens, and a few times the logits of 64 positions.

    >>> trace = model.trace(model.tokenizer.encode("A language model"), attention=True, residual=True)
    >>> page = make_report(trace, model.tokenizer, "tiny")
    >>> page[:15], len(page) < 200_000
    ('<!doctype html>', True)
    """
    if trace.attention is None or trace.residual is None:
        raise ValueError("a report needs a trace with everything in it: trace(tokens, attention=True, residual=True)")
    L, H, T, _ = trace.attention.shape
    letters = {"T": T, "C": trace.residual.shape[2], "H": H, "D": trace.residual.shape[2] // H}
    letters["V"] = trace.logits.shape[1]
    arrays, error = _distributions(trace)
    arrays |= _lens(trace, L)
    levels, arrays["attention"] = _rounded(trace.attention)
    used = np.unique(np.concatenate([arrays[name].ravel() for name in ("tokens", "likeliest", "lens_tokens")]))
    steps = forward_steps(L, **letters)
    data = {
        "model": name,
        "count": T,
        "layers": L,
        "heads": H,
        "vocabulary": letters["V"],
        "steps_of_attention": levels,
        "letters": letters,
        "texts": {token: token_characters(tokenizer, token) for token in used.tolist()},
        "steps": steps,
        "sources": {kernel: _source(_function(kernel)) for part in steps for _, kernel, _ in part},
        "notes": _notes(arrays, letters["V"], levels, H, error),
        "arrays": {name: _packed(array) for name, array in arrays.items()},
    }
    page = template()
    allowed = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
    policy = "; ".join([*allowed, *(f"{kind}-src {source}" for kind, source in allowed_sources().items())])
    page = page.replace("{{policy}}", policy, 1)
    # JSON in a script ends where `</script` begins, whatever it is a part of, so that it has no `<`.
    return page.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"), 1)


def make_frame(trace: Trace) -> str:
    """The page as a part of another, such as a notebook's: neither sees or changes anything of the other.

    trace: as `GPT2.trace` makes it, with attention and residual. One of more than 256 tokens raises ValueError, and so
    does one by a model without a vocabulary.

    >>> trace = model.trace([10, 20, 30], attention=True, residual=True)
    >>> make_frame(trace)[:50]
    '<iframe sandbox="allow-scripts" title="npgpt2 insp'
    """
    if (T := len(trace.tokens)) > FRAMED:
        raise ValueError(f"{T} tokens are more than the {FRAMED} that are shown here; npgpt2 inspect shows more")
    if trace.model is None:
        raise ValueError("a trace without its model can't be shown, since the vocabulary is missing; use GPT2.trace")
    page = make_report(trace, trace.model.tokenizer, trace.name)
    # Scripts, but in an origin of their own, so that they can't reach what is around the frame, nor that them.
    size = "display: block; box-sizing: border-box; width: 100%; height: 720px; resize: vertical"
    frame = f'<iframe sandbox="allow-scripts" title="npgpt2 inspect" style="{size}; border: 1px solid #8886"'
    return f'{frame} srcdoc="{escape(page)}"></iframe>'


def forward_steps(L: int, T: int, C: int, H: int, D: int, V: int) -> list[list[tuple[str, str, str]]]:
    """What the forward pass computes, in order: before the layers, in each layer, and after them.

    Each step is what it is called, the function that computes it, and the shapes it turns into which.

    >>> forward_steps(L=2, T=3, C=48, H=4, D=12, V=520)[2]
    [('ln_f', 'layer_norm', '(3, 48) → (3, 48)'), ('logits: times wteᵀ', 'linear', '(3, 48) → (3, 520)')]
    """
    return [
        [("embedding: wte[tokens] + wpe[positions]", "embed", f"({T},) → ({T}, {C})")],
        [
            ("ln_1", "layer_norm", f"({T}, {C}) → ({T}, {C})"),
            ("attn/c_attn: queries, keys, values", "linear", f"({T}, {C}) → ({T}, {3 * C}) → 3 × ({H}, {T}, {D})"),
            ("attn: how well keys fit queries", "softmax", f"({H}, {T}, {T}) → ({H}, {T}, {T})"),
            ("attn: values, weighted", "causal_attention", f"3 × ({H}, {T}, {D}) → ({T}, {C})"),
            ("attn/c_proj, added to the residual stream", "linear", f"({T}, {C}) → ({T}, {C})"),
            ("ln_2", "layer_norm", f"({T}, {C}) → ({T}, {C})"),
            ("mlp/c_fc", "linear", f"({T}, {C}) → ({T}, {4 * C})"),
            ("mlp", "gelu", f"({T}, {4 * C}) → ({T}, {4 * C})"),
            ("mlp/c_proj, added to the residual stream", "linear", f"({T}, {4 * C}) → ({T}, {C})"),
        ],
        [
            ("ln_f", "layer_norm", f"({T}, {C}) → ({T}, {C})"),
            ("logits: times wteᵀ", "linear", f"({T}, {C}) → ({T}, {V})"),
        ],
    ]


def _function(kernel: str) -> Any:
    return getattr(formulas, kernel, None) or getattr(model, kernel)


def _source(function: Any) -> str:
    """A function's code; where Python hasn't got that, its arguments and its docstring, in which the formula is too."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        arguments = str(inspect.signature(function)).replace("'", "")
        return f"{function.__name__}{arguments}\n\n{inspect.getdoc(function) or '(without its docstring)'}\n"


def _blocks(logits: Array) -> Iterator[tuple[slice, Array]]:
    for start in range(0, len(logits), POSITIONS):
        block = slice(start, start + POSITIONS)
        yield block, logits[block]


def _distributions(trace: Trace) -> tuple[dict[str, npt.NDArray[Any]], float]:
    """What came at each position, and what could come after it; and how far off the page's entropies are, in bits."""
    T, V = trace.logits.shape
    exact = min(EXACT, V)
    bounds = group_bounds(V)
    sizes = np.diff(bounds)
    # What is behind each token; the last has nothing behind it, so that its own place is filled with any.
    targets = np.append(trace.tokens[1:], 0)
    bits, ranks = np.zeros(T, np.float32), np.zeros(T, np.uint32)
    likeliest, logits = np.zeros((T, min(SHOWN, V)), np.uint32), np.zeros((T, exact), np.float32)
    groups, error = np.zeros((T, len(sizes)), np.float32), 0.0
    text_logits, text_entries = np.zeros((T, T), np.float32), np.zeros((T, T), np.uint16)
    for block, said in _blocks(trace.logits):
        bits[block] = surprisal(said, targets[block])
        chosen = np.take_along_axis(said, targets[block, None], axis=1)
        ranks[block] = 1 + (said > chosen).sum(1)
        order = np.argsort(-said, axis=1, kind="stable")
        likeliest[block] = order[:, :SHOWN]
        text_logits[block] = said[:, trace.tokens]
        text_entries[block] = entries_of(order, trace.tokens, bounds)
        falling = np.take_along_axis(said, order, axis=1).astype(np.float64)
        logits[block] = falling[:, :exact]
        if len(sizes):
            groups[block] = np.add.reduceat(falling[:, exact:], bounds[:-1] - exact, axis=1) / sizes
        coarse = np.hstack([logits[block], groups[block]]).astype(np.float64)
        all_sizes = np.concatenate([np.ones(exact), sizes])
        for temperature in COMPARED:
            off = _entropy(coarse, all_sizes, temperature) - _entropy(falling, np.ones(V), temperature)
            error = max(error, float(np.abs(off).max()))
    # Of the tokens of the text so far, each once, which is what penalties and bans need.
    before = np.tri(T, dtype=np.bool_)
    before[:, np.setdiff1d(np.arange(T), np.unique(trace.tokens, return_index=True)[1])] = False
    return {
        "tokens": trace.tokens.astype(np.uint32),
        "bits": np.roll(bits, 1),  # from the token before to the token itself
        "ranks": np.roll(ranks, 1),
        "likeliest": likeliest,
        "logits": logits,
        "groups": groups,
        "group_sizes": sizes.astype(np.uint32),
        "text_logits": np.where(before, text_logits, 0),
        "text_entries": np.where(before, text_entries, 0),
    }, error


def _entropy(falling: npt.NDArray[np.float64], sizes: npt.NDArray[Any], temperature: float) -> npt.NDArray[np.float64]:
    """In bits. falling: (T, N), logits from the largest on, each as often as `sizes` (N,) says → (T,)."""
    scores = (falling - falling[:, :1]) / temperature
    weights = sizes * np.exp(scores)
    total = weights.sum(1)
    entropy: npt.NDArray[np.float64] = (np.log(total) - (weights * scores).sum(1) / total) / np.log(2)
    return entropy


def _lens(trace: Trace, L: int) -> dict[str, npt.NDArray[Any]]:
    """What each layer would say, and with which probability: (L, T)."""
    T = len(trace.tokens)
    tokens, probabilities = np.zeros((L, T), np.uint32), np.zeros((L, T), np.float32)
    for layer in range(L):
        for block, said in _blocks(trace.lens(layer)):
            tokens[layer, block] = said.argmax(1)
            probabilities[layer, block] = 1 / np.exp(said - said.max(1, keepdims=True).astype(np.float64)).sum(1)
    return {"lens_tokens": tokens, "lens_probabilities": probabilities}


def _rounded(attention: Array) -> tuple[int, npt.NDArray[np.uint8]]:
    """Attention in as many steps as there is room for: their number, and (L, H, T, T), or (L, 1, T, T), the average."""
    room = ATTENTION_BYTES * max(1.0, attention.shape[-1] / 256)
    for levels in STEPS:
        rounded = _in_steps(attention, levels)
        if len(zlib.compress(rounded.tobytes())) <= room:
            return levels, rounded
    return STEPS[0], _in_steps(attention.mean(1, keepdims=True), STEPS[0])


def _in_steps(attention: Array, levels: int) -> npt.NDArray[np.uint8]:
    rounded = np.empty(attention.shape, np.uint8)
    for layer, out in zip(attention, rounded, strict=True):
        np.rint(np.sqrt(layer) * np.float32(levels), out=out, casting="unsafe")
    return rounded


def _notes(arrays: dict[str, npt.NDArray[Any]], V: int, levels: int, H: int, error: float) -> list[str]:
    """What on the page is not exact, and by how much."""
    # Half a step away from a root r, the square is off by at most r / levels, and a little.
    notes = [f"Attention weights are rounded, by at most {100 / levels:.1f} percentage points."]
    if arrays["attention"].shape[1] != H:
        notes.append(f"The {H} heads of each layer are shown as their average alone, since all would be too many.")
    if groups := len(arrays["group_sizes"]):
        exact = arrays["logits"].shape[1]
        notes.append(
            f"The {exact} likeliest tokens after each position have their own logits, and so have those that a penalty"
            f" or a ban concerns; the other {V - exact:,} are taken for {groups} groups of tokens of equal logits. At"
            f" temperatures from {COMPARED[0]} to {COMPARED[-1]}, that changes this text's entropies by at most"
            f" {max(error, 1e-4):.4f} bits."
        )
    return notes


def _packed(array: npt.NDArray[Any]) -> dict[str, Any]:
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {
        "type": array.dtype.name,
        "shape": array.shape,
        "base64": b64encode(zlib.compress(data.tobytes())).decode("ascii"),
    }
