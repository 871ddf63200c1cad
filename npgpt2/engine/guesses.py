"""Guessing the next tokens from the text so far, so that the model reads several at once: "prompt lookup".

Reading a token takes as long as fetching all weights from memory, and reading a few more in the same pass takes little
more. Where a text repeats itself, what came after the same tokens the last time is a good guess at what comes now. The
model reads the guess along with the token it has to read anyway; of what it then says, all is used up to the first
token that is chosen otherwise, so that the text is the same as without guessing. Saxena 2023, "Prompt Lookup
Decoding"; Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".
"""

from __future__ import annotations

from collections.abc import Iterable

# Tokens that have to be the same before a guess is made. English repeats fewer in passing, and then goes on otherwise.
CONTEXT = 4
# Tokens that are guessed at most.
LONGEST_GUESS = 7


class Lookup:
    """One sequence's tokens, and where each run of CONTEXT tokens in them was last seen.

    >>> lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4])
    >>> lookup.guess()
    [5, 6, 7, 8]
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add the token that came."""
        if len(self._tokens) >= CONTEXT:
            self._after[tuple(self._tokens[-CONTEXT:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self) -> list[int]:
        """What came after the last tokens when they were last seen: as many as there were the same before it."""
        at = self._after.get(tuple(self._tokens[-CONTEXT:]))
        if at is None:
            return []
        same = CONTEXT
        while same < min(at, LONGEST_GUESS) and self._tokens[at - 1 - same] == self._tokens[-1 - same]:
            same += 1
        period = len(self._tokens) - at  # what comes after the guess's own beginning is the guess again
        return [self._tokens[at + i % period] for i in range(same)]
