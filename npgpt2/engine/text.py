"""From tokens to text as they come: no half characters, nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from npgpt2.tokenizer import Tokenizer


class TextStream:
    """Decodes one sequence's tokens as they come, up to where a stop string begins.

    The pieces that `push` and `finish` return, joined, are what `Tokenizer.decode` gives for all tokens, cut off before
    the stop string. Text is held back while it could be the beginning of a character or of a stop string. Of several
    stop strings the one that is complete first counts; `done` says that one was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._held = ""
        self.done = False

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        return self._release(self._decoder.decode(self._tokenizer.decode_bytes([token])), final=False)

    def finish(self) -> str:
        """What was held back, at the end of the tokens; U+FFFD stands for a character that was never completed."""
        return "" if self.done else self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, piece: str, final: bool) -> str:
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            self.done = True
            return text[: min(ends)[1]]
        longest = min(max((len(stop) for stop in self._stop), default=1) - 1, len(text))
        held = 0 if final else next((n for n in range(longest, 0, -1) if self._begins_stop(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)
