"""An engine run by its only caller: one text as it comes, or samples of one prompt, some at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

from npgpt2.checks import check_callable, check_whole
from npgpt2.engine.engine import Engine, Prompt
from npgpt2.engine.request import Request, Settings, parse_settings
from npgpt2.samplers import check_bias

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Stream(Iterator[str]):
    """A text in pieces as they come. request: what is known of it, such as why it ended."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.request = request
        self._engine = engine
        self._shown = 0

    def __repr__(self) -> str:
        return f"<Stream of {self.request!r}>"

    def __next__(self) -> str:
        pieces = self.request.pieces
        while True:
            while self._shown < len(pieces):
                self._shown += 1
                if piece := pieces[self._shown - 1]:
                    return piece
            if self.request.error:
                raise self.request.error
            if self.request.finish_reason:
                raise StopIteration
            self._engine.step()


def run(engine: Engine, requests: Sequence[Request]) -> Sequence[Request]:
    """Step an engine until nothing is left to do; returns the requests, or raises the error by which one ended."""
    while engine.busy:
        engine.step()
    for request in requests:
        if request.error:
            raise request.error
    return requests


def stream(engine: Engine, prompt: Prompt, **settings: Unpack[Settings]) -> Stream:
    """Continue a text on an engine that nobody else steps; see `Engine.submit`."""
    return Stream(engine, engine.submit(prompt, **settings))


def samples(
    engine: Engine,
    prompt: Prompt,
    nsamples: int = 1,
    first: int = 0,
    progress: Callable[[int], object] = lambda tokens: None,
    **settings: Unpack[Settings],
) -> Iterator[str]:
    """Continue a prompt several times, on an engine that nobody else steps: as many at once as it has slots.

    nsamples: how many; 0 for no end · first: which of the seed's samples is the first · progress: called with the
    number of tokens after each step · settings: see `Engine.submit` → the texts, in order
    """
    check_whole("nsamples", nsamples, 0)
    check_whole("first", first, 0)
    check_callable("progress", progress)
    nsamples, first = int(nsamples), int(first)  # NumPy's own can become floats when they are added
    # So that what is wrong is said here, and not when the first text is asked for.
    sampling, limits = parse_settings(settings)
    check_bias(sampling.logit_bias, engine.model.hparams.n_vocab)
    tokens = engine.model.prompt_tokens(prompt, limits.allow_special)

    def texts() -> Iterator[str]:
        numbers = iter(range(first, first + nsamples) if nsamples else count(first))
        pending: deque[Request] = deque()
        while True:
            while engine.running + engine.waiting < engine.slots and (number := next(numbers, None)) is not None:
                pending.append(engine.submit(tokens, **settings | {"sample": number}))
            if not pending:
                return
            if pending[0].error:
                raise pending[0].error
            if pending[0].finish_reason:
                yield pending.popleft().text
            else:
                progress(sum(event.token is not None for event in engine.step()))

    return texts()
