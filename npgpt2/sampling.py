"""From logits to the next token: temperature, top-k and top-p, in this order, then a draw.

Computed in float64. The same as `top_k_logits` in OpenAI's `src/sample.py` and, but for rounding at its edge, its
`top_p_logits`; nucleus sampling is from Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration".
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt

from npgpt2.kernels import Array

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

    def probabilities(self, logits: Array) -> Probabilities:
        """The distribution that the next token is drawn from. logits: (V,) → (V,) float64; what is cut off is 0.

        >>> Sampler(temperature=1, top_k=2).probabilities(np.float32([1, 1, 0])).tolist()
        [0.5, 0.5, 0.0]
        """
        if not np.isfinite(logits).all():
            raise ValueError("the model computed a logit that is not a number; its weights are too large or broken")
        scores = logits.astype(np.float64)
        scores -= scores.max()  # the largest is 0, so that no temperature overflows
        if self.temperature == 0:
            greedy = np.zeros_like(scores)
            greedy[np.argmax(scores)] = 1
            return greedy
        if 0 < self.top_k < scores.size:
            kth = np.partition(scores, -self.top_k)[-self.top_k]
            scores[scores < kth] = -np.inf
        with np.errstate(over="ignore"):  # at the smallest temperatures the unlikely become -inf, which is right
            scores /= self.temperature
        probabilities = np.exp(scores, out=scores)
        probabilities /= probabilities.sum()
        if self.top_p < 1:
            # Tokens below this add up to less than 1 - p, so that the others reach p: only those need sorting.
            candidates = np.flatnonzero(probabilities >= (1 - self.top_p) / probabilities.size)
            candidates = candidates[np.argsort(-probabilities[candidates], kind="stable")]
            reached = np.searchsorted(np.cumsum(probabilities[candidates]), self.top_p) + 1
            kept = candidates[:reached]
            nucleus = np.zeros_like(probabilities)
            nucleus[kept] = probabilities[kept] / probabilities[kept].sum()
            return nucleus
        return probabilities

    def choose(self, logits: Array, rng: np.random.Generator) -> int:
        """Draw the next token. logits: (V,). Greedy sampling draws nothing from `rng`, other sampling one number.

        >>> Sampler().choose(np.float32([0, 2, 1]), np.random.default_rng(0))
        1
        """
        probabilities = self.probabilities(logits)
        if self.temperature == 0:
            return int(np.argmax(probabilities))
        tokens = np.flatnonzero(probabilities)
        bounds = np.cumsum(probabilities[tokens])
        drawn = np.searchsorted(bounds, rng.random() * bounds[-1], side="right")
        return int(tokens[min(drawn, tokens.size - 1)])


def random_generator(seed: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample of a run: they depend on the seed and the sample's number alone.

    >>> random_generator(7, 0).random() == random_generator(7, 0).random() != random_generator(7, 1).random()
    True
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(sample,))))
