"""What the settings of `Sampling` do, a small function each, from candidates to candidates.

Processors change logits, see what was written so far, and count at temperature 0 too; filters narrow the choice. The
two rows of them, `PROCESSORS` and `FILTERS`, stand at the end, in the order in which they are applied, which is that of
Hugging Face's transformers, as are their results. They compute in float64. Temperature and top-k are those of OpenAI's
`src/sample.py` as well; top-p is nucleus sampling as Holtzman et al. 2019 define it, "The Curious Case of Neural Text
Degeneration", where OpenAI's code mostly leaves out the token with which p is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from math import inf
from reprlib import repr as shortened
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from npgpt2.checks import is_whole, wrong_type

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.floating]
Probabilities = npt.NDArray[np.float64]


class Written:
    """What was written so far, kept up as tokens come, so that no step has to count all of it anew.

    seen: the tokens that are in the prompt or the text · counts: how often each was generated, if it was · generated:
    how many tokens were · ends: ids of those that end a text. Those that the vocabulary hasn't are left out.

    >>> written = Written([5, 6], n_vocab=8, ends=[7])
    >>> written.append(5)
    >>> written.tokens, written.seen, written.counts
    (array([5, 6, 5]), {5, 6}, {5: 1})
    """

    def __init__(self, prompt: Sequence[int] = (), n_vocab: int = 0, ends: Iterable[int] = ()) -> None:
        self._room = np.array(prompt, np.int64)
        self._size = len(prompt)
        self.seen = set(prompt)
        self.counts: dict[int, int] = {}
        self.generated = 0
        self.ends: Ids = np.array([end for end in ends if end < n_vocab], np.int64)

    @property
    def tokens(self) -> Ids:
        """The prompt's and those generated, (T,)."""
        return self._room[: self._size]

    def copy(self) -> Written:
        """The same again, for tokens that may not come."""
        other = copy(self)
        other._room, other.seen, other.counts = self._room.copy(), self.seen.copy(), self.counts.copy()
        return other

    def append(self, token: int) -> None:
        """Add the token that was chosen."""
        if self._size == self._room.size:
            self._room = np.resize(self._room, 2 * self._size + 64)
        self._room[self._size] = token
        self._size += 1
        self.generated += 1
        self.seen.add(token)
        self.counts[token] = self.counts.get(token, 0) + 1


NOTHING = Written()


class Candidates(NamedTuple):
    """Tokens that can come next, (K,) ids, with their logits, (K,), and what was written before them.

    Processors are given the whole vocabulary in order, so that a token's id is its place.
    """

    tokens: Ids
    logits: Logits
    written: Written = NOTHING

    def only(self, kept: Ids | npt.NDArray[np.bool_]) -> Candidates:
        """Those at the places, in this order, or those for which a mask is true."""
        return self._replace(tokens=self.tokens[kept], logits=self.logits[kept])

    def change(self, places: Ids | list[int], logits: Logits | float) -> Candidates:
        """The same with other logits at some places. The array stays as it is."""
        changed = self.logits.copy()
        changed[places] = logits
        return self._replace(logits=changed)


# ---- Processors: what changes logits


def add_bias(candidates: Candidates, bias: Mapping[int, float]) -> Candidates:
    """z + b, for the tokens that have one. With -100, a token hardly ever comes."""
    check_bias(bias, candidates.logits.size)
    places = list(bias)
    return candidates.change(places, candidates.logits[places] + np.array([*bias.values()]))


def parse_bias(bias: object) -> dict[int, float]:
    """A mapping from token ids to what is added to their logits, as Python's numbers, once it is one."""
    if not isinstance(bias, Mapping):
        raise wrong_type("logit_bias", bias, "a mapping from token ids to numbers")
    for token, value in bias.items():
        if not is_whole(token):
            raise TypeError(f"logit_bias has {token!r}, where a token id, a whole number, is expected")
        if not is_whole(value) and not isinstance(value, float | np.floating):
            raise TypeError(f"logit_bias has {value!r} for token {token}, where a number is expected")
        if token < 0 or not -100 <= value <= 100:
            pair = f"logit_bias has {value} for token {token}"
            raise ValueError(f"{pair}, where numbers from -100 to 100 for ids from 0 on are expected")
    return {int(token): float(value) for token, value in bias.items()}


def check_bias(bias: Mapping[int, float] | None, n_vocab: int) -> None:
    """Raise ValueError where a bias is for a token that is not in the vocabulary."""
    if bias and max(bias) >= n_vocab:
        token = shortened(max(bias))
        raise ValueError(f"logit_bias has token {token}, which is not in the vocabulary, from 0 to {n_vocab - 1}")


def penalize_repetition(candidates: Candidates, penalty: float) -> Candidates:
    """z / penalty for tokens that are in the prompt or the text, however often; z · penalty where z is below 0.

    Keskar et al. 2019, "CTRL", which divides alone, and so would make likelier what is below 0.
    """
    places = np.fromiter(candidates.written.seen, np.int64)
    logits = candidates.logits[places]
    return candidates.change(places, np.where(logits < 0, logits * penalty, logits / penalty))


def penalize_presence(candidates: Candidates, penalty: float) -> Candidates:
    """z - penalty, for tokens that were generated. OpenAI's API."""
    places = np.fromiter(candidates.written.counts, np.int64)
    return candidates.change(places, candidates.logits[places] - penalty)


def penalize_frequency(candidates: Candidates, penalty: float) -> Candidates:
    """z - penalty · n, for tokens that were generated n times. OpenAI's API."""
    counts = candidates.written.counts
    places, times = np.fromiter(counts, np.int64), np.fromiter(counts.values(), np.int64)
    return candidates.change(places, candidates.logits[places] - penalty * times)


def ban_repeated_ngrams(candidates: Candidates, n: int) -> Candidates:
    """-∞ for tokens that stand behind the last n - 1 somewhere before. Paulus et al. 2017, "A Deep Reinforced Model …".

    The places where that is so are narrowed down from the last token on, of which few are left soon.
    """
    tokens = candidates.written.tokens
    if n > tokens.size:
        return candidates
    places = n - 1 + np.flatnonzero(tokens[n - 2 : -1] == tokens[-1]) if n > 1 else np.arange(tokens.size)
    for back in range(2, n):
        if not places.size:
            break
        places = places[tokens[places - back] == tokens[-back]]
    return candidates.change(tokens[places], -inf)


def ban_ends(candidates: Candidates, least: int) -> Candidates:
    """-∞ for the tokens that end a text, until so many were generated."""
    written = candidates.written
    return candidates.change(written.ends, -inf) if written.generated < least else candidates


def drop_banned(candidates: Candidates) -> Candidates:
    """Those that are left after the processors."""
    allowed = np.flatnonzero(candidates.logits > -inf)
    return candidates if allowed.size == candidates.logits.size else candidates.only(allowed)


# ---- Filters: what narrows the choice


def keep_top_k(candidates: Candidates, k: int) -> Candidates:
    """The k likeliest, and those as likely as the last. Fan et al. 2018, "Hierarchical Neural Story Generation"."""
    logits = candidates.logits
    return candidates if k >= logits.size else candidates.only(np.flatnonzero(logits >= np.partition(logits, -k)[-k]))


def apply_temperature(candidates: Candidates, temperature: float) -> Candidates:
    """The logits divided by it, in float64: below 1 the likely get likelier, above 1 the unlikely catch up.

    The largest becomes 0, so that no temperature overflows.
    """
    logits = candidates.logits.astype(np.float64)
    logits -= logits.max()
    with np.errstate(over="ignore"):  # at the smallest temperatures the unlikely become -inf, which is right
        logits /= temperature
    return candidates._replace(logits=logits)


def keep_top_p(candidates: Candidates, p: float) -> Candidates:
    """The fewest whose probabilities reach p, from the likeliest on. Holtzman et al. 2019."""
    probabilities = probabilities_of(candidates)
    # Tokens below this add up to less than 1 - p, so that the others reach p: only those need sorting.
    likely = np.flatnonzero(probabilities >= (1 - p) / probabilities.size)
    likely = likely[np.argsort(-probabilities[likely], kind="stable")]
    return candidates.only(likely[: np.searchsorted(np.cumsum(probabilities[likely]), p) + 1])


def keep_min_p(candidates: Candidates, p: float) -> Candidates:
    """Those at least p times as likely as the likeliest. Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling"."""
    probabilities = probabilities_of(candidates)
    return candidates.only(np.flatnonzero(probabilities >= p * probabilities.max()))


def keep_typical(candidates: Candidates, p: float) -> Candidates:
    """The fewest whose probabilities reach p, from those on whose surprise -log p is nearest to its mean, the entropy.

    Those as near as the last stay too, as in transformers. Meister et al. 2022, "Locally Typical Sampling".
    """
    weights = np.exp(candidates.logits)
    probabilities = weights / weights.sum()
    # That of the impossible is finite here, since 0 times infinity is no number.
    surprise = np.log(weights.sum()) - np.maximum(candidates.logits, -1e300)
    away = np.abs(surprise - (probabilities * surprise).sum())
    # As in `keep_top_p`, the likely reach p, so that only those as near as one of them need sorting.
    likely = probabilities >= (1 - p) / probabilities.size
    order = np.flatnonzero(away <= away[likely].max())
    order = order[np.argsort(away[order], kind="stable")]
    last = np.searchsorted(np.cumsum(probabilities[order]), p)
    return candidates.only(np.flatnonzero(away <= away[order[min(int(last), order.size - 1)]]))


def probabilities_of(candidates: Candidates) -> Probabilities:
    """The softmax of logits of which the largest is 0, as `apply_temperature` leaves them, or not far below. → (K,)"""
    probabilities: Probabilities = np.exp(candidates.logits)
    probabilities /= probabilities.sum()
    return probabilities


Step = Callable[[Candidates, Any], Candidates]

# By setting, in order. What is at its default is left out.
PROCESSORS: dict[str, Step] = {
    "logit_bias": add_bias,
    "repetition_penalty": penalize_repetition,
    "presence_penalty": penalize_presence,
    "frequency_penalty": penalize_frequency,
    "no_repeat_ngram_size": ban_repeated_ngrams,
    "min_tokens": ban_ends,
}
FILTERS: dict[str, Step] = {
    "top_k": keep_top_k,  # before the temperature, which changes no order, since less is left to do
    "temperature": apply_temperature,
    "top_p": keep_top_p,
    "min_p": keep_min_p,
    "typical_p": keep_typical,
}
