"""A completion as it is streamed: chunks of the answer's own shape, a token in each.

What all chunks of a choice say, one behind another, is what the whole answer says: texts, log-probabilities, offsets. A
chunk's text is what its token adds. Where that isn't known yet, within a character, or where a stop string may have
begun, the chunk waits until it is.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

from npgpt2.engine import Event, LogProb
from npgpt2.serving.choices import FINISH, Origin, head, usage
from npgpt2.serving.logprobs import Pieces, shape_logprobs, text_offsets
from npgpt2.serving.protocol import Completion
from npgpt2.tokenizer import Tokenizer


class Chunks:
    """The chunks of one answer.

    completion: what was asked for, of which all that is written is given back · origin, id: see `answer`

    >>> from npgpt2.engine import Engine
    >>> from npgpt2.serving import parse_completion
    >>> asked = parse_completion({"prompt": "A language model", "max_tokens": 2, "temperature": 0}, model)
    >>> engine, chunks = Engine(model), Chunks(asked, tokenizer, Origin("tiny", "0123", 7), "x")
    >>> _ = [engine.submit(prompt, **settings) for prompt, settings in asked.submissions()]
    >>> while engine.busy:
    ...     for event in engine.step():
    ...         for chunk in chunks.of(0, event):
    ...             print(chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"])
     plays None
     one length
    """

    def __init__(self, completion: Completion, tokenizer: Tokenizer, origin: Origin, id: str) -> None:
        self.completion = completion
        self._tokenizer = tokenizer
        self._head = head(origin, id) | ({"usage": None} if completion.stream_usage else {})
        self._choices: dict[int, _Choice] = {}
        self._scored: dict[int, list[LogProb]] = {}  # by prompt, where their log-probabilities are wanted
        self._held: defaultdict[int, list[tuple[int, Event]]] = defaultdict(list)
        self._written = 0

    def of(self, number: int, event: Event) -> Iterator[dict[str, Any]]:
        """The chunks that an event brings. number: which of the completion's texts it is of, from 0 on."""
        prompt, sample = divmod(number, self.completion.n)
        if self.completion.echo and self.completion.logprobs is not None and prompt not in self._scored:
            if sample:  # its prompt's log-probabilities are those of the first sample, which come later
                self._held[prompt].append((number, event))
                return
            self._scored[prompt] = event.request.prompt_logprobs
        for one in [(number, event), *self._held.pop(prompt, ())]:
            yield from self._take(*one)

    def usage(self) -> dict[str, Any]:
        """The chunk that says how many tokens there were."""
        return self._head | {"choices": [], "usage": usage(self.completion, self._written)}

    def _take(self, number: int, event: Event) -> Iterator[dict[str, Any]]:
        if number not in self._choices:
            choice = _Choice(self.completion, number, self._tokenizer)
            self._choices[number] = choice
            if self.completion.echo:
                yield self._chunk(number, choice.echo(self._scored.get(number // self.completion.n, [])))
        if self.completion.max_tokens:
            self._written += event.token is not None
            for said in self._choices[number].take(event):
                yield self._chunk(number, said)
        elif event.finish_reason:
            yield self._chunk(number, self._choices[number].end())

    def _chunk(self, number: int, said: dict[str, Any]) -> dict[str, Any]:
        return self._head | {"choices": [{"index": number} | said]}


class _Choice:
    """One text: which of its tokens were given out, and what is held back."""

    def __init__(self, completion: Completion, number: int, tokenizer: Tokenizer) -> None:
        self._completion, self._tokenizer = completion, tokenizer
        self._prompt = completion.prompts[number // completion.n]
        self._before = tokenizer.decode(self._prompt)
        self._pieces = Pieces(tokenizer)
        self._tokens: deque[int] = deque()  # those that haven't been given out, and what each adds to the text
        self._added: deque[str] = deque()
        self._certain = ""  # text that hasn't been given out
        self._given, self._at, self._length = 0, 0, 0  # tokens; characters that they add, and those of the text
        self._first = True

    def echo(self, scored: list[LogProb]) -> dict[str, Any]:
        """The prompt."""
        offsets = text_offsets(self._tokenizer, self._prompt, len(self._before))
        return self._say([], self._before, scored, offsets[: len(scored)], None)

    def end(self) -> dict[str, Any]:
        """What is said last where nothing is written."""
        return self._say([], "", [], [], "length")

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        """What an event makes certain."""
        request, reason = event.request, event.finish_reason
        self._certain += event.text
        if event.token is not None:
            self._tokens.append(event.token)
            silent = reason == "end" or (reason == "stop" and event.token in request.limits.stop_tokens)
            self._added += [*self._pieces.finish(), ""] if silent else self._pieces.push(event.token)
        if reason:
            self._added += self._pieces.finish()
        end = self._length + len(self._certain)  # of the text, if this is its end
        while self._added and (reason or len(self._added[0]) <= len(self._certain)):
            token, added = self._tokens.popleft(), self._added.popleft()
            last = bool(reason) and not self._added
            text = self._certain if last else self._certain[: len(added)]
            self._certain = self._certain[len(text) :]
            logprobs = request.logprobs[self._given : self._given + 1]
            offset = len(self._before) + min(self._at, end)
            self._given, self._at, self._length = self._given + 1, self._at + len(added), self._length + len(text)
            yield self._say([token], text, logprobs, [offset], FINISH.get(reason or "") if last else None)

    def _say(
        self, tokens: list[int], text: str, logprobs: list[LogProb], offsets: list[int], reason: str | None
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text, "logprobs": None, "finish_reason": reason}
        if self._completion.logprobs is not None:
            said["logprobs"] = shape_logprobs(logprobs, offsets, self._tokenizer)
        if self._completion.token_ids:
            said["token_ids"] = tokens
            if self._first:
                said["prompt_token_ids"] = [*self._prompt]
        self._first = False
        return said
