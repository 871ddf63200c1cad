"""From logits to the next token: temperature, top-k and top-p, in this order, then a draw.

Computed in float64. Temperature and top-k are those of OpenAI's `src/sample.py`; top-p is nucleus sampling as Holtzman
et al. 2019 define it, "The Curious Case of Neural Text Degeneration", where OpenAI's code mostly leaves out the token
with which p is reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt

from npgpt2.kernels.kernels import Array

Ids = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampler:
    """How to choose the next token.

    temperature: divides the logits: below 1 the likely gets likelier, and 0 takes the likeliest token (greedy; OpenAI's
    code divides by zero there) · top_k: keep the k likeliest tokens, and those as likely as the last of them; 0 keeps
    all · top_p: of those, keep the fewest whose probabilities reach p. Other values raise ValueError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}, where a number of at least 0 is expected")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, where a whole number of at least 0 is expected (0 keeps all)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, where a number above 0 and up to 1 is expected (1 keeps all)")

    def candidates(self, logits: Array) -> tuple[Ids, Probabilities]:
        """The tokens that can come next, and the probability with which each is drawn.

        logits: (V,) float32 → ids (K,) int64 and probabilities (K,) float64 that add up to 1, where K is how many
        tokens top-k and top-p leave. Logits that are not all finite raise ValueError.

        >>> tokens, probabilities = Sampler(temperature=1, top_k=2).candidates(np.float32([1, 0, 1]))
        >>> tokens.tolist(), probabilities.tolist()
        ([0, 2], [0.5, 0.5])
        """
        check_finite(logits)
        if self.temperature == 0:
            return np.array([np.argmax(logits)], np.int64), np.ones(1)
        tokens = np.arange(logits.size)
        if 0 < self.top_k < logits.size:  # before the temperature, which changes no order, since less is left to do
            tokens = np.flatnonzero(logits >= np.partition(logits, -self.top_k)[-self.top_k])
        scores = logits[tokens].astype(np.float64)
        scores -= scores.max()  # the largest is 0, so that no temperature overflows
        with np.errstate(over="ignore"):  # at the smallest temperatures the unlikely become -inf, which is right
            scores /= self.temperature
        probabilities = np.exp(scores, out=scores)
        probabilities /= probabilities.sum()
        if self.top_p < 1:
            # Tokens below this add up to less than 1 - p, so that the others reach p: only those need sorting.
            likely = np.flatnonzero(probabilities >= (1 - self.top_p) / probabilities.size)
            likely = likely[np.argsort(-probabilities[likely], kind="stable")]
            nucleus = likely[: np.searchsorted(np.cumsum(probabilities[likely]), self.top_p) + 1]
            tokens, probabilities = tokens[nucleus], probabilities[nucleus] / probabilities[nucleus].sum()
        return tokens, probabilities

    def likeliest(self, logits: Array, most: int) -> list[tuple[int, float]]:
        """The likeliest of the candidates with their probabilities, from the first on; at most so many.

        >>> Sampler(temperature=1, top_k=2).likeliest(np.float32([0, 1, 1]), most=1)
        [(1, 0.5)]
        """
        tokens, probabilities = self.candidates(logits)
        order = np.argsort(-probabilities, kind="stable")[:most]
        return list(zip(tokens[order].tolist(), probabilities[order].tolist(), strict=True))

    def choose(self, logits: Array, rng: np.random.Generator) -> int:
        """Draw the next token. logits: (V,). Takes one number from `rng`, or none where there is no choice.

        >>> Sampler().choose(np.float32([0, 2, 1]), np.random.default_rng(0))
        1
        """
        tokens, probabilities = self.candidates(logits)
        if tokens.size == 1:
            return int(tokens[0])
        bounds = np.cumsum(probabilities)
        drawn = int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))
        return int(tokens[min(drawn, tokens.size - 1)])


def check_finite(logits: Array) -> None:
    """Raise ValueError where a model's logits, of any shape, are not all finite."""
    if not np.isfinite(logits).all():
        raise ValueError("the model computed a logit that is not a number; its weights are too large or broken")


def random_generator(seed: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample of a run: they depend on the seed and the sample's number alone.

    >>> random_generator(7, 0).random() == random_generator(7, 0).random() != random_generator(7, 1).random()
    True
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(sample,))))
