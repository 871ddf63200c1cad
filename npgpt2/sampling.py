"""From logits to the next token: temperature, top-k and top-p, in this order, then a draw.

Computed in float64. Temperature and top-k are those of OpenAI's `src/sample.py`; top-p is nucleus sampling as Holtzman
et al. 2019 define it, "The Curious Case of Neural Text Degeneration", where OpenAI's code mostly leaves out the token
with which p is reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from npgpt2.checks import check_number, check_whole

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.floating]
Probabilities = npt.NDArray[np.float64]


class SamplingSettings(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    sample: int


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    temperature: divides the logits: below 1 the likely gets likelier, and 0 takes the likeliest token (greedy; OpenAI's
    code divides by zero there) · top_k: keep the k likeliest tokens, and those as likely as the last of them; 0 keeps
    all · top_p: of those, keep the fewest whose probabilities reach p · seed: fixes what is drawn; None draws anew
    every time · sample: which of the seed's samples is drawn. Other values raise ValueError, other types TypeError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    sample: int = 0

    def __post_init__(self) -> None:
        check_whole("top_k", self.top_k, 0, " (0 keeps all)")
        check_whole("sample", self.sample, 0)
        if self.seed is not None:
            check_whole("seed", self.seed, 0)
        for name in ("top_k", "sample"):  # of NumPy's numbers, -k can overflow
            object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("temperature", "top_p"):
            check_number(name, getattr(self, name))
        if not (isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}, where a number of at least 0 is expected")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, where a number above 0 and up to 1 is expected (1 keeps all)")

    def candidates(self, logits: Logits, among: Ids | None = None) -> tuple[Ids, Probabilities]:
        """The tokens that can come next, and the probability with which each is drawn.

        logits: (V,) float32 · among: the ids (N,) that can be drawn at all, by default all → ids (K,) int64 and
        probabilities (K,) float64 that add up to 1, where K is how many tokens top-k and top-p leave. Logits that are
        not all finite raise ValueError.

        >>> tokens, probabilities = Sampling(temperature=1, top_k=2).candidates(np.float32([1, 0, 1]))
        >>> tokens.tolist(), probabilities.tolist()
        ([0, 2], [0.5, 0.5])
        """
        check_finite(logits)
        kept = Candidates(np.arange(logits.size), logits) if among is None else Candidates(among, logits[among])
        if self.temperature == 0:
            return kept.tokens[[np.argmax(kept.logits)]], np.ones(1)
        if (
            0 < self.top_k < kept.tokens.size
        ):  # before the temperature, which changes no order, since less is left to do
            kept = keep_top_k(kept, self.top_k)
        kept = apply_temperature(kept, self.temperature)
        if self.top_p < 1:
            kept = keep_top_p(kept, self.top_p)
        return kept.tokens, probabilities_of(kept)

    def likeliest(self, logits: Logits, most: int, among: Ids | None = None) -> list[tuple[int, float]]:
        """The likeliest of the candidates with their probabilities, from the first on; at most so many.

        >>> Sampling(temperature=1, top_k=2).likeliest(np.float32([0, 1, 1]), most=1)
        [(1, 0.5)]
        """
        tokens, probabilities = self.candidates(logits, among)
        order = np.argsort(-probabilities, kind="stable")[:most]
        return list(zip(tokens[order].tolist(), probabilities[order].tolist(), strict=True))

    def choose(self, logits: Logits, rng: np.random.Generator, among: Ids | None = None) -> int:
        """Draw the next token, one of `candidates`. Takes one number from `rng`, or none where there is no choice.

        >>> Sampling().choose(np.float32([0, 2, 1]), np.random.default_rng(0))
        1
        """
        tokens, probabilities = self.candidates(logits, among)
        if tokens.size == 1:
            return int(tokens[0])
        bounds = np.cumsum(probabilities)
        drawn = int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))
        return int(tokens[min(drawn, tokens.size - 1)])

    def generator(self) -> np.random.Generator:
        """Where the random numbers come from: they depend on the seed and the sample's number alone.

        >>> first, again, other = (Sampling(seed=7, sample=i).generator().random() for i in (0, 0, 1))
        >>> first == again != other
        True
        """
        # Of no seed, NumPy makes one that the system draws.
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(self.sample,))))


class Candidates(NamedTuple):
    """Tokens that can come next, (K,) ids, and their logits, (K,)."""

    tokens: Ids
    logits: Logits


def keep_top_k(candidates: Candidates, k: int) -> Candidates:
    """The k likeliest, and those as likely as the last. Fan et al. 2018, "Hierarchical Neural Story Generation"."""
    tokens, logits = candidates
    kept = np.flatnonzero(logits >= np.partition(logits, -k)[-k])
    return Candidates(tokens[kept], logits[kept])


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
    tokens, logits = candidates
    probabilities = probabilities_of(candidates)
    # Tokens below this add up to less than 1 - p, so that the others reach p: only those need sorting.
    likely = np.flatnonzero(probabilities >= (1 - p) / probabilities.size)
    likely = likely[np.argsort(-probabilities[likely], kind="stable")]
    nucleus = likely[: np.searchsorted(np.cumsum(probabilities[likely]), p) + 1]
    return Candidates(tokens[nucleus], logits[nucleus])


def probabilities_of(candidates: Candidates) -> Probabilities:
    """The softmax of logits of which the largest is 0, as `apply_temperature` leaves them. → (K,)"""
    probabilities: Probabilities = np.exp(candidates.logits)
    probabilities /= probabilities.sum()
    return probabilities


def log_softmax(logits: Logits) -> Probabilities:
    """The logarithms of the probabilities that a model gives, in float64. logits: (..., V) → (..., V)

    >>> log_softmax(np.float32([0, 0])).round(4)
    array([-0.6931, -0.6931])
    """
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return scores


def check_finite(logits: Logits) -> None:
    """Raise ValueError where a model's logits, of any shape, are not all finite."""
    if not np.isfinite(logits).all():
        raise ValueError("the model computed a logit that is not a number; its weights are too large or broken")
