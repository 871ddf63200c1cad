"""How well a model predicts a text: the figures by which language models are compared.

A text is read in windows of n_ctx tokens, each a stride further than the last, so that every token is predicted once,
from the n_ctx - stride tokens before it at least, or from all there are. The text follows `<|endoftext|>`, as texts
did in training, so that its first token is predicted too; where a vocabulary has no such token, that one isn't counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp, inf, log

import numpy as np

from npgpt2.checks import is_whole, wrong_type
from npgpt2.engine import Slots, Span
from npgpt2.formulas import Array
from npgpt2.kernels import Matrices
from npgpt2.model import HParams
from npgpt2.samplers import Ids
from npgpt2.sampling import check_finite, log_softmax

# Positions whose logits are computed together: in 124M, those of a whole window would take 200 MB.
POSITIONS = 64


@dataclass
class Score:
    """What a text costs a model, in bits, and how long the text is.

    bits: the sum of -log2 of the probability of each token · tokens: those that were predicted · characters, bytes (of
    UTF-8), words (between white space): the length of the text. Scores of several texts can be added.

    >>> score = Score(bits=300.0, tokens=100, words=60, characters=150, bytes=200)
    >>> score.bits_per_byte, score.bits_per_character, round(score.perplexity_per_token)
    (1.5, 2.0, 8)
    """

    bits: float = 0.0
    tokens: int = 0
    words: int = 0
    characters: int = 0
    bytes: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(*(ours + theirs for ours, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def counted(self, pieces: Iterable[str]) -> Iterator[str]:
        """Pass on the pieces of a text, and add up their lengths."""
        last = " "
        for piece in pieces:
            if not isinstance(piece, str):
                raise wrong_type("a piece of the text", piece, "a text")
            goes_on = not last.isspace() and not piece[:1].isspace()  # the first word began in the piece before
            self.words += len(piece.split()) - (goes_on and bool(piece))
            self.characters += len(piece)
            self.bytes += len(piece.encode("utf-8", "surrogatepass"))
            last = piece[-1:] or last
            yield piece

    @property
    def bits_per_byte(self) -> float:
        """bits / bytes of UTF-8: comparable between models whatever their vocabularies. Gao et al. 2020, "The Pile"."""
        return self.bits / max(1, self.bytes)

    @property
    def bits_per_character(self) -> float:
        """bits / characters (code points), as for enwik8 and text8."""
        return self.bits / max(1, self.characters)

    @property
    def perplexity_per_token(self) -> float:
        """2 ** (bits / tokens): between how many tokens the model hesitates, infinite where too large. Depends on the
        vocabulary.
        """
        return _perplexity(self.bits, self.tokens)

    @property
    def perplexity_per_word(self) -> float:
        """2 ** (bits / words): as for WikiText and LAMBADA, but of words between white space. Infinite where too large.

        Radford et al. 2019, section 3.1, count the words of a text before it was tokenized in the same way.
        """
        return _perplexity(self.bits, self.words)


def _perplexity(bits: float, number: int) -> float:
    nats = bits * log(2) / max(1, number)
    return exp(nats) if nats < 700 else inf


def surprises(
    matrices: Matrices, hparams: HParams, tokens: Iterable[int], stride: int | None = None
) -> Iterator[tuple[int, float]]:
    """Each token but the first, and -log2 of the probability that the model gives it after those before.

    tokens: of any number, taken as they are needed · stride: 1 to n_ctx, by default n_ctx // 2. Memory is that of one
    window.
    """
    n_ctx = hparams.n_ctx
    stride = max(1, n_ctx // 2) if stride is None else stride
    if not is_whole(stride):
        raise wrong_type("stride", stride, f"1 to the model's n_ctx of {n_ctx}")
    if not 1 <= stride <= n_ctx:
        raise ValueError(f"stride is {stride}, where 1 to the model's n_ctx of {n_ctx} is expected")
    rest, slots = iter(tokens), Slots(hparams, 1)
    window: list[int] = []  # what has been read of it
    last = next(rest, None)
    while last is not None:
        if len(window) == n_ctx:
            window = window[stride:]
            if window:
                slots.read(matrices, window, [Span(0, 0, len(window))], [])
        targets = list(islice(rest, min(POSITIONS, n_ctx - len(window))))
        if not targets:
            return
        inputs, read = [last, *targets[:-1]], len(window)
        logits = slots.read(matrices, inputs, [Span(0, read, read + len(inputs))], range(len(inputs)))
        yield from zip(targets, surprisal(logits, targets), strict=True)
        window += inputs
        last = targets[-1]


def surprisal(logits: Array, targets: Sequence[int] | Ids) -> list[float]:
    """-log2 of the probability of each target, in bits.

    logits: (T, V) float32, in float64 from here on, for the sake of long sums; ValueError where they are not finite ·
    targets: (T,) token ids → T numbers.

    >>> surprisal(np.float32([[0, 0, -1000, -1000]]), [1])
    [1.0]
    """
    check_finite(logits)
    return [-nats / log(2) for nats in log_softmax(logits)[np.arange(len(targets)), targets].tolist()]
