"""What is asked of an engine, and what has come of it so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Literal, NamedTuple, TypeAlias, cast

from npgpt2.checks import check_flag, check_iterable, check_whole, is_bytes, is_whole, wrong_type
from npgpt2.formulas import Array
from npgpt2.samplers import Ids
from npgpt2.sampling import Sampling, SamplingSettings, check_finite, largest, log_softmax

FinishReason: TypeAlias = Literal["length", "stop", "end", "cancelled", "error"]


class Settings(SamplingSettings, total=False):
    """All keyword arguments of what generates text: the fields of `Sampling` and `Limits`."""

    length: int
    stop: str | Sequence[str]
    stop_tokens: Sequence[int]
    ignore_eot: bool
    allow_special: bool
    skip_special: bool | None
    guess: bool
    logprobs: int | None
    prompt_logprobs: int | None


@dataclass(frozen=True)
class Limits:
    """How the prompt is read, where its text ends, and what is kept of it.

    length: how many tokens to generate at most · stop: strings before which the text ends · stop_tokens: ids of tokens
    that end the text beside the model's own, and are no part of it either; `min_tokens` bans both · ignore_eot: go on
    past the tokens with which the model ends a text, such as `<|endoftext|>` · allow_special: whether
    `<|endoftext|>` and the model's other special tokens in a prompt's text are those tokens, or text like any other ·
    skip_special: leave all special tokens out of the text (True), or none (False); by default, the one that ends it
    alone · guess: whether tokens may be guessed ahead, where a text repeats itself (`guesses.py`) or by a draft model
    (`drafts.py`), which changes nothing but the time · logprobs: keep the log-probability of each token, and of so many
    of the likeliest beside it; None keeps none · prompt_logprobs: the same for the prompt's tokens. Values out of range
    raise ValueError.
    """

    length: int = 40
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    ignore_eot: bool = False
    allow_special: bool = False
    skip_special: bool | None = None
    guess: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        check_whole("length", self.length, 1)
        object.__setattr__(self, "length", int(self.length))
        for name in ("ignore_eot", "allow_special", "guess"):
            check_flag(name, getattr(self, name))
        if self.skip_special is not None:
            check_flag("skip_special", self.skip_special)
        for name in ("logprobs", "prompt_logprobs"):
            if (number := getattr(self, name)) is not None:
                check_whole(name, number, 0, ", or None for none")
                object.__setattr__(self, name, int(number))
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if is_bytes(stops) or not isinstance(stops, Iterable):
            raise TypeError(f"stop is {shortened(stops)}, where a string or several are expected")
        stops = tuple(stops)
        if not all(isinstance(stop, str) for stop in stops):
            raise TypeError(f"stop is {shortened(stops)}, where a string or several are expected")
        if "" in stops:
            raise ValueError("a stop string is empty, which would end every text at once")
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "stop_tokens", parse_tokens("stop_tokens", self.stop_tokens))

    def check_vocabulary(self, n_vocab: int) -> None:
        """Raise ValueError where a token is named that is not in the vocabulary."""
        if self.stop_tokens and max(self.stop_tokens) >= n_vocab:
            token = shortened(max(self.stop_tokens))
            raise ValueError(f"stop_tokens has {token}, which is not in the vocabulary, from 0 to {n_vocab - 1}")


def parse_tokens(name: str, tokens: object) -> tuple[int, ...]:
    """Token ids as Python's numbers, each once; TypeError names what is none, ValueError what is below 0.

    >>> parse_tokens("stop_tokens", [5, 7, 5])
    (5, 7)
    """
    if isinstance(tokens, str):
        raise wrong_type(name, tokens, "a list of token ids")
    check_iterable(name, tokens, "a list of token ids")
    ids = list(cast("Iterable[object]", tokens))
    for token in ids:
        if not is_whole(token):
            raise TypeError(f"{name} has {shortened(token)}, where a token id, a whole number, is expected")
        if token < 0:
            raise ValueError(f"{name} has {token}, where ids from 0 on are expected")
    return tuple(dict.fromkeys(int(cast(int, token)) for token in ids))


def parse_settings(settings: Settings) -> tuple[Sampling, Limits]:
    """The settings as checked objects; TypeError names what is none, ValueError what is out of range.

    >>> parse_settings({"temperature": 0.5, "length": 3})[1].length
    3
    """
    drawing = {name: value for name, value in settings.items() if name in Sampling.__dataclass_fields__}
    others = {name: value for name, value in settings.items() if name not in drawing}
    for name in others:
        if name not in Limits.__dataclass_fields__:
            raise TypeError(f"{name!r} is no setting; there are {', '.join(Settings.__annotations__)}")
    return Sampling(**drawing), Limits(**others)  # type: ignore[arg-type]


class LogProb(NamedTuple):
    """How likely the model found a token, before all settings.

    token: its id · logprob: the natural logarithm of its probability; None for a prompt's first token, which nothing
    came before · top: the likeliest tokens there with theirs, as many as were asked for, from the first on
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


def log_probs(logits: Array, tokens: Sequence[int], most: int | None, among: Ids | None = None) -> list[LogProb]:
    """How likely tokens are, and the likeliest beside each.

    logits: (M, V), of which the first len(tokens) are used · most: how many of the likeliest · among: the ids that
    those are of, by default all. Logits that are not finite raise ValueError.

    >>> import numpy as np
    >>> log_probs(np.float32([[0, 0, -1000]]), [1], most=1)[0].top[0][0]
    0
    """
    check_finite(logits)
    found = []
    for row, token in zip(logits, tokens, strict=False):
        scores = log_softmax(row)
        top: list[tuple[int, float]] = []
        known = scores if among is None else scores[among]
        if most:
            likely = largest(known, most)
            ids = likely if among is None else among[likely]
            top = list(zip(ids.tolist(), known[likely].tolist(), strict=True))
        found.append(LogProb(token, float(scores[token]), top))
    return found


@dataclass(eq=False)
class Request:
    """A text that an engine continues: what was asked for, and what has come of it so far.

    prompt: the tokens that it begins with · sampling, limits: its settings · tokens: those that were generated, the end
    token included · pieces, text: what they say, as far as it is certain, up to the end token or a stop string ·
    finish_reason: why it ended: "length", "stop" (a stop string or token), "end" (by the model), "cancelled" or
    "error"; None while it runs · error: what went wrong with this one · logprobs, prompt_logprobs: of each token, where
    asked for · reused: how many of the prompt's tokens another had read before
    """

    prompt: list[int]
    sampling: Sampling
    limits: Limits
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    logprobs: list[LogProb] = field(default_factory=list)
    prompt_logprobs: list[LogProb] = field(default_factory=list)
    reused: int = 0

    def __repr__(self) -> str:
        state = self.finish_reason or "running"
        return f"<Request of {len(self.prompt)} tokens: {len(self.tokens)} more, {shortened(self.text)}, {state}>"

    @property
    def text(self) -> str:
        """The pieces together."""
        return "".join(self.pieces)


def mean_logprob(request: Request) -> float:
    """How likely the model finds what was generated: the mean of its tokens' log-probabilities."""
    return sum(one.logprob or 0 for one in request.logprobs) / max(1, len(request.logprobs))


class Event(NamedTuple):
    """What a step brought for a request: a token, the text that it makes certain, and whether it was the last.

    token: None where a request ended without one, cancelled or by an error
    """

    request: Request
    token: int | None
    text: str
    finish_reason: FinishReason | None
