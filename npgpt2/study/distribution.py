"""What can come next at one place of a text, in the numbers that `distribution.js` draws: a model's logits, in short.

Of the likeliest tokens it has each one's own logit, and of the others the mean of groups of neighbours in rank, which
is as good: see `report.py`, which does the same at all places of a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from npgpt2.formulas import Array
from npgpt2.samplers import Ids
from npgpt2.sampling import check_finite
from npgpt2.tokenizer import Tokenizer

# Of each distribution, pages show so many tokens, have the logits of so many more, and of the rest the mean logits of
# groups of neighbours in rank. With fewer groups, percentages were off by up to 4e-4 of themselves; with so many, by
# 1e-4.
SHOWN, EXACT, GROUPS = 40, 200, 256


def group_bounds(V: int) -> npt.NDArray[np.intp]:
    """The ranks at which groups begin in a vocabulary of V, and the one after the last; short ones before long ones.

    >>> group_bounds(201), group_bounds(100)
    (array([200, 201]), array([100]))
    """
    return np.unique(np.geomspace(min(EXACT, V), V, GROUPS + 1).round().astype(np.intp))


def entries_of(order: Ids, tokens: Ids, bounds: Ids) -> Ids:
    """Where a page has the logits of tokens: of the likeliest, by rank; then by the group that they are in.

    order: (M, V), the vocabulary from the likeliest on · tokens: (T,) · bounds: see `group_bounds` → (M, T)

    >>> entries_of(np.array([[2, 0, 1]]), np.array([0, 1, 2]), np.array([1, 3]))
    array([[1, 1, 0]])
    """
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1])[None], axis=1)
    ranks = ranks[:, tokens]
    return np.where(ranks < bounds[0], ranks, bounds[0] + np.searchsorted(bounds, ranks, side="right") - 1)


def token_characters(tokenizer: Tokenizer, token: int) -> str:
    """A token's bytes as characters; none for a row that no token has, which may be among the likeliest as well.

    >>> token_characters(tokenizer, tokenizer.encode("€")[0])
    'â'
    """
    return tokenizer.decode_bytes([token]).decode("latin-1") if token in tokenizer else ""


def next_place(
    logits: Array, before: Sequence[int], tokenizer: Tokenizer, ends: Iterable[int] = (), others: Iterable[int] = ()
) -> dict[str, Any]:
    """What `distribution.js` wants to know of the place behind a text, as JSON has it, and what the tokens say.

    logits: (V,) float32, of what comes next; ValueError where one is not finite · before: the text's tokens · ends: ids
    of those that end a text · others: ids of more that settings may concern, as a bias does

    >>> place = next_place(model.next_logits([10, 20]), [10, 20], tokenizer)
    >>> len(place["likeliest"]), len(place["logits"]), sum(place["sizes"]), [id for id, *_ in place["own"]]
    (40, 200, 320, [10, 20])
    """
    check_finite(logits)
    bounds = group_bounds(logits.size)
    ends = [end for end in ends if end < logits.size]
    own = np.array(sorted({*before, *ends, *others}), np.int64)
    order = np.argsort(-logits, kind="stable")
    falling = logits[order].astype(np.float64)
    exact, sizes = bounds[0], np.diff(bounds)
    groups = np.add.reduceat(falling[exact:], bounds[:-1] - exact) / sizes if sizes.size else np.zeros(0)
    entries = entries_of(order[None], own, bounds)[0] if own.size else own
    likeliest = order[:SHOWN].tolist()
    return {
        "vocabulary": logits.size,
        "likeliest": likeliest,
        "texts": {token: token_characters(tokenizer, token) for token in likeliest},
        "logits": falling[:exact].tolist(),
        "groups": groups.tolist(),
        "sizes": sizes.tolist(),
        "before": [*before],
        "own": [list(one) for one in zip(own.tolist(), logits[own].tolist(), entries.tolist(), strict=True)],
        "ends": ends,
    }
