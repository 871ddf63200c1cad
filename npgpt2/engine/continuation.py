"""Sequences that are being continued: what the model has read of each, what it still has to read, and what to keep.

Whatever the sequence is, its tokens are read once: a beginning that others share is taken over from them, guessed
tokens that turn out wrong are forgotten, and only where the window is full is its latter half read again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from npgpt2.engine.guesses import Lookup
from npgpt2.kernels.kernels import Array
from npgpt2.model import Cache, HParams


@dataclass(frozen=True)
class Prefix:
    """A beginning that the model has read, for sequences that share it.

    tokens: what there is · cache: what reading it left behind; of more tokens than n_ctx, that of the latter half of a
    window · logits: (V,), after the last of them
    """

    tokens: list[int]
    cache: Cache
    logits: Array


class Continuation:
    """A sequence that is being continued: what the model has read of it, and what it still has to read.

    tokens: what there is so far · rng: where the random numbers come from that choose what follows · prefix: what need
    not be read again, as far as the tokens begin with the same ones

    unread: the tokens that the model has to read before it can say what follows · guessed: tokens that it reads beyond
    them, in case they follow · logits: (1 + guessed, V), once all is read: what it said before each guess and after
    the last one
    """

    def __init__(
        self, hparams: HParams, tokens: Sequence[int], rng: np.random.Generator, prefix: Prefix | None = None
    ) -> None:
        self.cache = Cache(hparams)
        self.unread = list(tokens)
        self.guessed: list[int] = []
        self.logits = np.empty((0, hparams.n_vocab), np.float32)
        self.rng = rng
        self._n_ctx = hparams.n_ctx
        self._recent = deque(tokens, maxlen=max(1, hparams.n_ctx // 2))
        self._lookup = Lookup(self._recent)
        if prefix is not None:
            self._begin_with(prefix)

    def _begin_with(self, prefix: Prefix) -> None:
        if prefix.tokens == self.unread:
            self.logits, shared = prefix.logits[None], prefix.cache.length
            self.unread = []
        elif prefix.cache.length == len(prefix.tokens):  # its window holds all of it
            pairs = zip(self.unread, prefix.tokens, strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            shared = min(shared, len(self.unread) - 1)  # only reading the last token says what comes after it
            del self.unread[:shared]
        else:
            return
        self.cache = prefix.cache.beginning(shared)

    def make_room(self) -> None:
        """Where the unread tokens don't fit into the window any more, start a new one with the most recent."""
        if self.cache.length + len(self.unread) > self._n_ctx:
            self.cache.length = 0
            self.unread = list(self._recent)
            self._lookup = Lookup(self._recent)

    def guess(self) -> None:
        """Guess what follows a token that is to be read, as far as the window has room for it."""
        if len(self.unread) == 1:
            self.guessed = self._lookup.guess()[: self._n_ctx - self.cache.length - 1]

    def read(self, logits: Array) -> None:
        """Take note that the model has read all that was unread, and the guess."""
        self.unread = []
        self.logits = logits

    def append(self, token: int) -> int:
        """Add the token that was chosen, and forget what was read of a guess that it isn't; returns it."""
        self._recent.append(token)
        self._lookup.append(token)
        if self.guessed and self.guessed[0] == token:
            del self.guessed[0]
            self.logits = self.logits[1:]
        else:
            self.cache.length -= len(self.guessed)
            self.guessed = []
            self.unread = [token]
        return token
