"""From logits to the next token: the settings, what they leave of the choice, and a draw.

What each setting does is in `samplers.py`, a function each. The draw is a race: every token waits for a time that is
random, and shorter the likelier the token is; the one that waits least is drawn. All tokens' times are functions of the
seed, the sample, the place in the text and the token, so that a draw depends on nothing that came before it, and
probabilities that differ in their last digits nearly never lead to another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import inf
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from npgpt2.checks import check_number, check_whole
from npgpt2.forks import whole
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
    parse_bias,
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


# What SplitMix64 adds from one number to the next: 2**64 divided by the golden ratio.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)

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
        self, logits: Logits, number: np.uint64, among: Ids | None = None, written: Written | None = None
    ) -> int:
        """Draw the next token, one of `candidates`. number: what the draw depends on, see `numbers`.

        >>> Sampling().choose(np.float32([0, 2, 1]), np.uint64(0))
        1
        """
        tokens, probabilities = self.candidates(logits, among, written)
        return int(tokens[0]) if tokens.size == 1 else draw(tokens, probabilities, number)

    def numbers(self) -> Callable[[int], np.uint64]:
        """The number from which each place of a text is drawn, which depends on seed, sample and place alone.

        place: of a token in the whole text, the prompt's counted. Of no seed, the system draws one, at each call.

        >>> first, again, other = (Sampling(seed=7, sample=i).numbers()(12) for i in (0, 0, 1))
        >>> int(first) == int(again) != int(other)
        True
        """
        with whole("import"):
            from numpy.random import SeedSequence  # which NumPy itself imports no sooner
        (key,) = SeedSequence(self.seed, spawn_key=(self.sample,)).generate_state(1, np.uint64)
        return partial(hashed, key)


# ---- The draw


def hashed(number: np.uint64, values: npt.ArrayLike) -> Any:
    """As many random-looking numbers as there are values, each a function of its value and `number` alone: SplitMix64.

    number: 64 bits · values: whole numbers from 0 on, one or (N,) → uint64, one or (N,). Steele, Lea & Flood 2014,
    "Fast Splittable Pseudorandom Number Generators"; here value i gives what their generator gives when asked for the
    (i + 1)th time.

    >>> hashed(np.uint64(0), [0, 1]).tolist()  # what others give for the seed 0
    [16294208416658607535, 7960286522194355700]
    """
    mixed: Any = np.array(values).astype(np.uint64)
    with np.errstate(over="ignore"):  # what is beyond 64 bits is meant to be lost
        mixed *= GOLDEN
        mixed += number + GOLDEN
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed[()]


def waits(tokens: Ids, probabilities: Probabilities, number: np.uint64) -> Probabilities:
    """How long each token waits: a time that is exponentially distributed, on average 1 / p.

        wait = -log(u) / p, where u in (0, 1) is a hash of number and token

    tokens: (K,) · probabilities: (K,) → (K,) float64; where p is 0, the wait is infinite. The chance that a token waits
    least is p: this is the Gumbel-max trick, whose log(p) - log(-log(u)) is largest where this is smallest.

    >>> waits(np.array([3, 5]), np.array([1, 0]), np.uint64(0)).round(3)
    array([0.03,  inf])
    """
    u = ((hashed(number, tokens) >> np.uint64(12)) + 0.5) / 2**52  # exact in float64, and never 0 or 1
    with np.errstate(divide="ignore", over="ignore"):
        result: Probabilities = -np.log(u) / probabilities
    return result


def draw(tokens: Ids, probabilities: Probabilities, number: np.uint64) -> int:
    """The token that waits least; see `waits`. tokens, probabilities: (K,)

    >>> draw(np.array([3, 5]), np.array([0.1, 0.9]), np.uint64(0))
    3
    """
    return int(tokens[np.argmin(waits(tokens, probabilities, number))])


# ---- Checks, and what else is made of logits


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
