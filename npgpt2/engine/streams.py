"""An engine run by its only caller: one text as it comes, or samples of one prompt, some at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, islice
from typing import TYPE_CHECKING

from npgpt2.checks import check_callable, check_whole
from npgpt2.engine.engine import Engine, Prompt
from npgpt2.engine.request import Request, Settings, mean_logprob, parse_settings
from npgpt2.samplers import check_bias
from npgpt2.sampling import Sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Texts of which one is kept, at most.
MOST_DRAWN = 128


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
    best_of: int = 1,
    **settings: Unpack[Settings],
) -> Iterator[str]:
    """Continue a prompt several times, on an engine that nobody else steps: as many at once as it has slots.

    nsamples: how many; 0 for no end · first: which of the seed's samples is the first · progress: called with the
    number of tokens after each step · best_of: how many are drawn for each, of which the likeliest is given back; see
    `draws` · settings: see `Engine.submit` → the texts, in order
    """
    check_whole("nsamples", nsamples, 0)
    check_whole("first", first, 0)
    check_callable("progress", progress)
    nsamples, first = int(nsamples), int(first)  # NumPy's own can become floats when they are added
    # So that what is wrong is said here, and not when the first text is asked for.
    sampling, limits = parse_settings(settings)
    check_best_of(best_of, sampling)
    check_bias(sampling.logit_bias, engine.model.hparams.n_vocab)
    tokens = engine.model.prompt_tokens(prompt, limits.allow_special)

    def drawn() -> Iterator[Request]:
        numbers = chain.from_iterable(
            draws(settings, number, best_of)
            for number in (range(first, first + nsamples) if nsamples else count(first))
        )
        pending: deque[Request] = deque()
        while True:
            while engine.running + engine.waiting < engine.slots and (one := next(numbers, None)) is not None:
                pending.append(engine.submit(tokens, **one))
            if not pending:
                return
            if pending[0].error:
                raise pending[0].error
            if pending[0].finish_reason:
                yield pending.popleft()
            else:
                progress(sum(event.token is not None for event in engine.step()))

    return (request.text for request in likeliest(drawn(), best_of))


# ---- The likeliest of several


def check_best_of(best_of: int, sampling: Sampling) -> None:
    """Raise an error where `best_of` is none, or where there is nothing to choose between."""
    check_whole("best_of", best_of, 1)
    if best_of > MOST_DRAWN:
        raise ValueError(f"best_of is {best_of}, where a whole number from 1 to {MOST_DRAWN} is expected")
    if best_of > 1 and sampling.temperature == 0:
        raise ValueError(f"best_of is {best_of}, but all texts are the same at temperature 0; set a temperature")


def draws(settings: Settings, number: int, best_of: int) -> Iterator[Settings]:
    """The settings of what is drawn for a sample: of `best_of`, sample i has the seed's samples i · best_of and on."""
    best_of = int(best_of)  # NumPy's own can overflow
    for i in range(number * best_of, (number + 1) * best_of):
        one = settings | {"sample": i}
        if best_of > 1 and one.get("logprobs") is None:
            one["logprobs"] = 0  # of what is drawn alone, by which it is chosen
        yield one


def likeliest(drawn: Iterable[Request], best_of: int) -> Iterator[Request]:
    """Of each `best_of` requests that follow each other and have ended, the one that the model finds likeliest."""
    requests = iter(drawn)
    for first in requests:
        yield max(chain([first], islice(requests, best_of - 1)), key=mean_logprob)
