"""A sequence that is being continued: what has been read of it, and what is still to be read."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from itertools import count

import numpy as np

from npgpt2.engine.guesses import Lookup
from npgpt2.engine.request import FinishReason, Request
from npgpt2.engine.text import TextStream
from npgpt2.samplers import PROCESSORS, Ids, Logits, Written
from npgpt2.tokenizer import Tokenizer


def window_start(length: int, start: int, n_ctx: int) -> int:
    """Where the window of so many tokens starts, which has started at `start`: there, as long as it has room for them;
    otherwise only the last n_ctx // 2 are seen.

    >>> window_start(8, start=0, n_ctx=8), window_start(9, start=0, n_ctx=8)
    (0, 5)
    """
    return start if length - start <= n_ctx else length - max(1, n_ctx // 2)


def count_shared(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with alike; by halves, since Python compares lists faster than token by token.

    >>> count_shared([1, 2, 3], [1, 2, 4, 5])
    2
    """
    same, most = 0, min(len(one), len(other))
    while same < most:
        half = (same + most + 1) // 2
        if one[same:half] == other[same:half]:
            same = half
        else:
            most = half - 1
    return same


class Sequence:
    """A request while it runs.

    tokens: all that there are, the prompt's and those generated · start: the first of them that stands in the window,
    whose positions count from there · slot: where what is read of the window is kept · read: how many of its positions
    have been · sound: how many of them led to logits that were finite, so that their values are · reads: how many
    tokens the next pass reads, and guessed: what it reads beyond the last one, in case it follows

    ends: the tokens that end it, unless its limits ignore them · bannable: those that `min_tokens` bans
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        ends: Container[int],
        n_ctx: int,
        n_vocab: int,
        bannable: Iterable[int],
    ) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self._numbers = request.sampling.numbers()
        self.start = self.read = self.sound = self.reads = 0
        self.slot = -1
        self.guessed: list[int] = []
        self._n_ctx = n_ctx
        self._text = TextStream(tokenizer, tuple(request.limits.stop)) if tokenizer else None
        self._ends = () if request.limits.ignore_eot else ends
        self._silent = tokenizer.special_ids if tokenizer and request.limits.skip_special else ()
        self._lookup, self._looked_up = Lookup(), 0
        self._processed = bool(request.sampling.steps(PROCESSORS))
        self._written: Written | None = None
        self._n_vocab, self._bannable = n_vocab, bannable
        self.make_room()

    # ---- What is read

    @property
    def window(self) -> list[int]:
        """The tokens that the model can see."""
        return self.tokens[self.start :]

    @property
    def unread(self) -> int:
        """How many tokens the model has to read before it can say what follows."""
        return len(self.tokens) - self.start - self.read

    @property
    def scores_prompt(self) -> bool:
        """Whether the next pass is about the prompt, whose log-probabilities are wanted."""
        return self.request.limits.prompt_logprobs is not None and not self.request.tokens

    def next_tokens(self) -> list[int]:
        """What the next pass reads."""
        first = self.start + self.read
        return self.tokens[first : first + self.reads] + self.guessed

    def make_room(self) -> None:
        """Where the tokens don't fit into the window any more, start a new one with the most recent."""
        start = window_start(len(self.tokens), self.start, self._n_ctx)
        if start != self.start:
            self.start = start
            self.read = self.sound = 0
            self._lookup, self._looked_up = Lookup(), self.start

    def guess(self) -> None:
        """Guess what follows a token that is to be read, as far as the window has room for it."""
        for token in self.tokens[self._looked_up :]:
            self._lookup.append(token)
        self._looked_up = len(self.tokens)
        self.guessed = self._lookup.guess()[: self.room]

    @property
    def room(self) -> int:
        """How many guesses are of use: so many tokens can come behind the next one, and have room in the window."""
        left = self.request.limits.length - len(self.request.tokens) - 1
        return min(left, self._n_ctx - self.read - 1)

    def shared_with(self, tokens: list[int]) -> int:
        """How many of its window's tokens are those that another begins with, but for the last: only reading that one
        says what follows.
        """
        if self.request.limits.prompt_logprobs is not None:
            return 0  # all of the prompt's logits are wanted
        return count_shared(self.window[:-1], tokens)

    # ---- What is written

    @property
    def written(self) -> Written | None:
        """What the processors of its settings look at, if it has any.

        Made when the first token is chosen: it takes a few times the memory of the prompt, and others wait.
        """
        if self._processed and self._written is None:
            self._written = Written(self.request.prompt, self._n_vocab, self._bannable)
        return self._written

    @property
    def number(self) -> np.uint64:
        """What the next token's draw depends on."""
        return self._numbers(len(self.tokens))

    def imagined(self, among: Ids | None) -> Callable[[Logits], int]:
        """A function that draws tokens as if they followed: given the logits of one place after another, from the next
        on. The sequence stays as it is.
        """
        places = count(len(self.tokens))
        written: Written | None = None

        def draw(logits: Logits) -> int:
            nonlocal written
            if written is None and self.written is not None:
                written = self.written.copy()
            token = self.request.sampling.choose(logits, self._numbers(next(places)), among, written)
            if written is not None:
                written.append(token)
            return token

        return draw

    def append(self, token: int) -> tuple[str, FinishReason | None]:
        """Add the token that was chosen; returns the text that it makes certain, and why it is the last, if it is."""
        request = self.request
        self.tokens.append(token)
        request.tokens.append(token)
        if self._written is not None:
            self._written.append(token)
        reason: FinishReason | None = "length" if len(request.tokens) == request.limits.length else None
        if token in self._ends or token in request.limits.stop_tokens:
            reason = "end" if token in self._ends else "stop"
            if request.limits.skip_special is not False:
                return "", reason
        if self._text is None or token in self._silent:
            return "", reason
        piece = self._text.push(token)
        return piece, "stop" if self._text.done else reason

    def finish(self) -> str:
        """The text that was held back, in case it went on."""
        return self._text.finish() if self._text is not None else ""
