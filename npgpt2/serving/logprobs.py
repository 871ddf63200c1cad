"""Log-probabilities as OpenAI's completions have them: four lists, in which tokens are called by what they say."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from npgpt2.engine import LogProb
from npgpt2.tokenizer import Tokenizer

# What those of -inf become, which JSON doesn't have.
LEAST = -9999.0


def shape_logprobs(shown: list[LogProb], offsets: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """The four lists of an answer. shown: of the tokens that it is about · offsets: where each begins in the text"""
    tops: list[dict[str, float] | None] = []
    for one in shown:
        among = [*one.top, (one.token, one.logprob)]
        tops.append(
            None
            if one.logprob is None
            else {token_name(tokenizer, token): max(LEAST, logprob or 0.0) for token, logprob in among}
        )
    return {
        "tokens": [token_name(tokenizer, one.token) for one in shown],
        "token_logprobs": [None if one.logprob is None else max(LEAST, one.logprob) for one in shown],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def token_name(tokenizer: Tokenizer, token: int) -> str:
    r"""What a token is called: its text, or its bytes where they are no whole characters, as OpenAI calls those.

    >>> [token_name(tokenizer, token) for token in tokenizer.encode("A€")]
    ['A', 'bytes:\\xe2', 'bytes:\\x82', 'bytes:\\xac']
    """
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def text_offsets(tokenizer: Tokenizer, tokens: Sequence[int], end: int) -> list[int]:
    """At which character of their text each token begins; where it begins within one, at that one.

    end: how many characters the text has, which may have been cut off before a stop string

    >>> text_offsets(tokenizer, tokenizer.encode("A€ model"), end=8)
    [0, 1, 1, 1, 2]
    """
    pieces = Pieces(tokenizer)
    added = [text for token in tokens for text in pieces.push(token)] + pieces.finish()
    return [min(at, end) for at in accumulate(map(len, added[:-1]), initial=0)][: len(tokens)]


class Pieces:
    r"""What each token of a text adds to it, as soon as that is known; all of it together is the text.

    Of tokens that are parts of one character, the last adds it, or U+FFFD where it is never completed.

    >>> pieces = Pieces(tokenizer)
    >>> [pieces.push(token) for token in tokenizer.encode("A€")], pieces.push(tokenizer.encode("€")[0]), pieces.finish()
    ([['A'], [], [], ['', '', '€']], [], ['\ufffd'])
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[str] = []  # of tokens that end within a character

    def push(self, token: int) -> list[str]:
        """What those tokens add of which it is known now, in order; this one may be among them."""
        text = self._decoder.decode(self._tokenizer.decode_bytes([token]))
        if self._held and text.startswith("\ufffd"):  # what they began isn't completed by this one
            self._held[-1] += "\ufffd"
            text = text[1:]
        known = self._held if text or not self._within else []
        self._held = [*([] if known else self._held), *([text] if self._within else [])]
        return known if self._within else [*known, text]

    def finish(self) -> list[str]:
        """What those add of which it isn't known yet, where no more come."""
        known, self._held = self._held, []
        if known:
            known[-1] += self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return known

    @property
    def _within(self) -> bool:
        """Whether the text so far ends within a character."""
        return bool(self._decoder.getstate()[0])
