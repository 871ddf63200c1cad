"""From logits to the next token: the settings, what they leave of the choice, and a draw.

What each setting does is in `samplers.py`, a function each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Any, TypedDict

import numpy as np

from npgpt2.checks import check_number, check_whole, is_whole, wrong_type
from npgpt2.samplers import (
    FILTERS,
    NOTHING,
    PROCESSORS,
    Candidates,
    Ids,
    Logits,
    Probabilities,
    Step,
    Written,
    drop_banned,
    probabilities_of,
)


class SamplingSettings(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    logit_bias: Mapping[int, float] | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    min_tokens: int
    seed: int | None
    sample: int


# What the numbers can be. What isn't in them, as NaN never is, raises ValueError.
WHOLE = {"top_k": " (0 keeps all)", "no_repeat_ngram_size": " (0 bans nothing)", "min_tokens": "", "sample": ""}
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number of at least 0 is expected", lambda x: 0 <= x < inf),
    "top_p": ("a number above 0 and up to 1 is expected (1 keeps all)", lambda x: 0 < x <= 1),
    "min_p": ("a number from 0 to 1 is expected (0 keeps all)", lambda x: 0 <= x <= 1),
    "typical_p": ("a number above 0 and up to 1 is expected (1 keeps all)", lambda x: 0 < x <= 1),
    "repetition_penalty": ("a number from 0.01 to 100 is expected (1 changes nothing)", lambda x: 0.01 <= x <= 100),
    "presence_penalty": ("a number from -2 to 2 is expected (0 changes nothing)", lambda x: -2 <= x <= 2),
    "frequency_penalty": ("a number from -2 to 2 is expected (0 changes nothing)", lambda x: -2 <= x <= 2),
}


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token: by default always the likeliest.

    What changes the logits, in this order. logit_bias: what to add, -100 to 100, by token id · repetition_penalty:
    divides the logits of tokens that are in the prompt or the text, or multiplies them where they are below 0 ·
    presence_penalty: subtracted from those of tokens that are in the text · frequency_penalty: subtracted as often as
    they are in it · no_repeat_ngram_size: no n tokens come that prompt and text already have in this order; 0 bans none
    · min_tokens: so many come before one that ends the text; with as many as `length`, none does. What has left the
    model's window counts too.

    What then narrows the choice, in this order. temperature: divides the logits: below 1 the likely gets likelier, and
    0 takes the likeliest token (greedy; OpenAI's code divides by zero there) · top_k: keep the k likeliest tokens, and
    those as likely as the last of them; 0 keeps all · top_p: of those, keep the fewest whose probabilities reach p ·
    min_p: keep those at least p times as likely as the likeliest · typical_p: keep the fewest that reach p, from the
    tokens on that are about as surprising as is to be expected.

    seed: fixes what is drawn; None draws anew every time · sample: which of the seed's samples is drawn. Other values
    raise ValueError, other types TypeError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_tokens: int = 0
    seed: int | None = None
    sample: int = 0

    def __post_init__(self) -> None:
        for name, more in WHOLE.items():
            check_whole(name, getattr(self, name), 0, more)
            object.__setattr__(self, name, int(getattr(self, name)))  # of NumPy's numbers, -k can overflow
        if self.seed is not None:
            check_whole("seed", self.seed, 0)
        for name, (expected, holds) in RANGES.items():
            value = getattr(self, name)
            check_number(name, value)
            if not holds(float(value)):
                raise ValueError(f"{name} is {value}, where {expected}")
            object.__setattr__(self, name, float(value))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", parse_bias(self.logit_bias) or None)

    @cached_property  # since every token takes them
    def _processors(self) -> list[tuple[Step, Any]]:
        return self.steps(PROCESSORS)

    @cached_property
    def _filters(self) -> list[tuple[Step, Any]]:
        return self.steps(FILTERS)

    def steps(self, row: Mapping[str, Step]) -> list[tuple[Step, Any]]:
        """Those of `PROCESSORS` or `FILTERS` that are not off, each with its setting.

        >>> [step.__name__ for step, _ in Sampling(temperature=2.0, min_p=0.1).steps(FILTERS)]
        ['apply_temperature', 'keep_min_p']
        """
        settings = [(name, step, getattr(self, name)) for name, step in row.items()]
        return [(step, value) for name, step, value in settings if value != getattr(Sampling, name)]

    def candidates(
        self, logits: Logits, among: Ids | None = None, written: Written | None = None
    ) -> tuple[Ids, Probabilities]:
        """The tokens that can come next, and the probability with which each is drawn.

        logits: (V,) float32 · among: the ids (N,) that can be drawn at all, by default all · written: what comes before
        it, by default nothing → ids (K,) int64 and probabilities (K,) float64 that add up to 1, where K is how many
        tokens the settings leave. Logits that are not all finite raise ValueError, and so do settings that leave none.

        >>> tokens, probabilities = Sampling(temperature=1, top_k=2).candidates(np.float32([1, 0, 1]))
        >>> tokens.tolist(), probabilities.tolist()
        ([0, 2], [0.5, 0.5])
        """
        check_finite(logits)
        kept = self.processed(logits, among, written)
        if not kept.tokens.size:
            raise nothing_left()
        if self.temperature == 0:
            return kept.tokens[[np.argmax(kept.logits)]], np.ones(1)
        for narrow, value in self._filters:
            kept = narrow(kept, value)
        return kept.tokens, probabilities_of(kept)

    def processed(self, logits: Logits, among: Ids | None = None, written: Written | None = None) -> Candidates:
        """The tokens that aren't banned, with their logits as the processors leave them; the same arguments.

        >>> Sampling(logit_bias={1: 0.5}).processed(np.float32([1, 0, 2]), among=np.array([1, 2])).logits.tolist()
        [0.5, 2.0]
        """
        if self._processors:
            kept = Candidates(np.arange(logits.size), logits.astype(np.float64), written or NOTHING)
            for process, value in self._processors:
                kept = process(kept, value)
            return drop_banned(kept if among is None else kept.only(among))
        return Candidates(np.arange(logits.size), logits) if among is None else Candidates(among, logits[among])

    def likeliest(
        self, logits: Logits, most: int, among: Ids | None = None, written: Written | None = None
    ) -> list[tuple[int, float]]:
        """The likeliest of the candidates with their probabilities, from the first on; at most so many.

        >>> Sampling(temperature=1, top_k=2).likeliest(np.float32([0, 1, 1]), most=1)
        [(1, 0.5)]
        """
        tokens, probabilities = self.candidates(logits, among, written)
        order = np.argsort(-probabilities, kind="stable")[:most]
        return list(zip(tokens[order].tolist(), probabilities[order].tolist(), strict=True))

    def choose(
        self, logits: Logits, rng: np.random.Generator, among: Ids | None = None, written: Written | None = None
    ) -> int:
        """Draw the next token, one of `candidates`. Takes one number from `rng`, or none where there is no choice.

        >>> Sampling().choose(np.float32([0, 2, 1]), np.random.default_rng(0))
        1
        """
        tokens, probabilities = self.candidates(logits, among, written)
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


def log_softmax(logits: Logits) -> Probabilities:
    """The logarithms of the probabilities that a model gives, in float64. logits: (..., V) → (..., V)

    >>> log_softmax(np.float32([0, 0])).round(4)
    array([-0.6931, -0.6931])
    """
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return scores


def largest(values: Logits, most: int) -> Ids:
    """The places of the largest values, from the first on; at most so many, and of equals the first ones.

    >>> largest(np.float32([1, 3, 2, 3]), 3)
    array([1, 3, 2])
    """
    places: Ids = np.arange(values.size)
    if most < values.size:  # then only those that aren't below the last one need sorting
        places = np.flatnonzero(values >= np.partition(values, -most)[-most])
    return places[np.argsort(-values[places], kind="stable")][:most]


def nothing_left() -> ValueError:
    """What to raise where the processors leave no token."""
    return ValueError("no token is left to choose: no_repeat_ngram_size and min_tokens ban all of them")


def check_finite(logits: Logits) -> None:
    """Raise ValueError where a model's logits, of any shape, are not all finite."""
    if not np.isfinite(logits).all():
        raise ValueError("the model computed a logit that is not a number; its weights are too large or broken")
