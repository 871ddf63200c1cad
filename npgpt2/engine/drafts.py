"""Guessing the next tokens by a small model, the draft, so that the large one reads several at once.

The small model draws its guesses as the large one will draw the tokens: by the same settings, and by the same numbers,
which depend on seed, sample, place and token alone (see `sampling.py`). So both draw the same wherever they find about
the same tokens likely, at any temperature. The large model reads all guesses in one pass and draws for itself; what it
draws is used up to the first token that wasn't guessed, so that the text is the same as without a draft. Leviathan et
al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Daliri et al. 2025, "Coupling without
Communication and Drafter-Invariant Speculative Decoding".

How many tokens are guessed follows from how many were right, and from what a pass of so many rows takes. Where none are
worth it, the draft rests, and is tried again later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import prod

import numpy as np

from npgpt2.engine.cache import Slots, Span
from npgpt2.engine.sequence import count_shared, window_start
from npgpt2.formulas import Array
from npgpt2.kernels import Matrices, time_of_pass
from npgpt2.model import HParams, variable_shapes

# Tokens that are guessed at most: a pass of twice as many rows takes nearly twice as long.
MOST_GUESSES = 15
# How many of the last guesses count for how many will be right, and what is supposed before the first.
REMEMBERED, SUPPOSED = 32, 0.8
# How many guesses are a trial, by which a draft that rests can return, and how many that count for before it. How many
# tokens come between two of them at first, and at most: without success, twice as many each time.
TRIAL, FIRST_REST, LONGEST_REST = 4, 32, 1024


class Draft:
    """A small model that guesses for one sequence at a time, whichever is alone in an engine.

    matrices, hparams: the small model's, and the large one's, of which nothing but its size counts
    """

    def __init__(self, matrices: Matrices, hparams: HParams, large: tuple[Matrices, HParams]) -> None:
        self._matrices, self._hparams = matrices, hparams
        self._slots = Slots(hparams, 1)
        self._seen: list[int] = []  # the tokens that the slot holds
        self._start = 0  # the first of the text's tokens that the small model sees
        self._tokens: list[int] = []  # the text
        self._guesses: list[int] = []
        self._at = 0  # the place of the first that was guessed last
        self._right, self._asked = SUPPOSED * TRIAL, float(TRIAL)  # of the last guesses
        self._rest, self._rested = FIRST_REST, 0
        self._large = large

    def guess(self, tokens: list[int], start: int, most: int, draw: Callable[[Array], int]) -> list[int]:
        """Guess what follows a text; at most so many tokens, and none where it isn't worth it.

        tokens: the whole text, the same list each time, at whose end those stand that came · start: the first that the
        large model sees · most: how many are of use · draw: given the logits (V,) of one place after another, says what
        is drawn there
        """
        self._take_note(tokens)
        # Of a window that is begun anew, half is read again, which is more than is guessed.
        number = min(self._number(), most, self._hparams.n_ctx // 2 - 1)
        if number < 1:
            return []
        start = self._first_seen(start, len(tokens) + number)
        unread = len(tokens) - start - count_shared(self._seen, tokens[start:])
        if unread > TRIAL and self._reading(unread) > most * self._saves(number, SUPPOSED):
            return []  # a long prompt, and a short text
        self._start = start
        guesses: list[int] = []
        while len(guesses) < number:
            logits = self._read([*tokens[start:], *guesses])
            if not np.isfinite(logits).all():  # which it goes on without
                self._right, self._asked = 0, REMEMBERED
                self._slots.clear(0, 0, len(self._seen))
                self._seen = []
                break
            try:
                guesses.append(draw(logits))
            except ValueError:  # the settings leave no token, which the large model finds out when it comes to that
                break
        self._guesses, self._at = guesses, len(tokens)
        return guesses

    def _take_note(self, tokens: list[int]) -> None:
        """Of how many of the last guesses were right; and where it is another text, expect less to be known of it."""
        if tokens is not self._tokens:
            self._tokens, self._start, self._guesses = tokens, 0, []
            self._forget_all_but(TRIAL)
        if self._guesses:
            right = count_shared(tokens[self._at :], self._guesses)
            self._right += right
            self._asked += min(right + 1, len(self._guesses))
            self._guesses = []
            self._forget_all_but(REMEMBERED)

    def _forget_all_but(self, count: int) -> None:
        if self._asked > count:
            self._right *= count / self._asked
            self._asked = count

    def _number(self) -> int:
        """How many guesses are worth it; now and then a trial where none are."""
        best = max(range(MOST_GUESSES + 1), key=self._saves)
        if best:
            self._rest, self._rested = FIRST_REST, 0
            return best
        self._rested += 1
        if self._rested < self._rest:
            return 0
        self._rested, self._rest = 0, min(2 * self._rest, LONGEST_REST)
        self._forget_all_but(TRIAL)
        return TRIAL

    def _saves(self, number: int, least: float = 0.0) -> float:
        """What so many guesses save of a token's time, where at least such a share is right: all up to the first wrong
        one count, and what is drawn there.
        """
        rate = max(least, self._right / self._asked)
        came = sum(rate**i for i in range(number + 1))
        return 1 - (self._checking[number] + number * self._drafting) / came

    @cached_property  # when both models are being used anyway
    def _checking(self) -> list[float]:
        """What the large model's passes of a token and 0, 1, 2 … guesses take, by that of a token alone."""
        seconds = [_seconds(*self._large, 1 + n) for n in range(MOST_GUESSES + 1)]
        return [each / seconds[0] for each in seconds]

    @cached_property
    def _drafting(self) -> float:
        """What the small model's pass of a token takes, by the large one's."""
        return self._reading(1)

    def _reading(self, rows: int) -> float:
        """What the small model's pass of so many tokens takes, by the large one's of one."""
        return _seconds(self._matrices, self._hparams, rows) / _seconds(*self._large, 1)

    def _first_seen(self, start: int, length: int) -> int:
        """Which token comes first in the small model's window: as in the large one's where that fits, or as before."""
        return window_start(length, max(start, self._start), self._hparams.n_ctx)

    def _read(self, tokens: list[int]) -> Array:
        """The small model's logits (V,) after the tokens of its window, of which it reads those that it hasn't."""
        first, end = min(count_shared(self._seen, tokens), len(tokens) - 1), len(tokens)
        self._seen = self._seen[:first]
        try:
            logits = self._slots.read(self._matrices, tokens[first:], [Span(0, first, end)], [end - first - 1])
        except BaseException:
            self._slots.clear(0, first, end)  # of which some may have been read
            raise
        self._seen = tokens
        row: Array = logits[0]
        return row


def _seconds(matrices: Matrices, hparams: HParams, rows: int) -> float:
    """About how long a model's pass takes."""
    numbers = sum(prod(shape) for shape in variable_shapes(hparams).values())
    return time_of_pass(numbers, hparams.n_layer, rows, matrices.in_int8)
