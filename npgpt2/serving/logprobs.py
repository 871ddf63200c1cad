"""Log-probabilities as OpenAI's completions have them: four lists, in which tokens are called by what they say."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
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
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets, at = [], 0
    for token in tokens:
        offsets.append(min(at, end))
        at += len(decoder.decode(tokenizer.decode_bytes([token])))
    return offsets
