"""OpenAI's completions: the body of a request, checked. It knows neither HTTP nor files.

Where it differs from OpenAI's, it is wider: as many `stop` strings and `logprobs` as clients send, and settings that
other servers have too, under the names that they give them. Fields that nobody here knows are passed over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from reprlib import repr as shortened
from typing import Any, cast

from npgpt2.engine import Settings, parse_settings
from npgpt2.engine.engine import Model
from npgpt2.sampling import SamplingSettings
from npgpt2.tokenizer import Tokenizer

# What the engine knows under the same names.
SAMPLERS = [name for name in SamplingSettings.__annotations__ if name not in ("logit_bias", "seed", "sample")]
PROMPTS_LIMIT, SAMPLES_LIMIT, SEQUENCES_LIMIT = 2048, 128, 4096
# Tokens of all prompts together.
PROMPT_TOKENS_LIMIT = 2**18
LOGPROBS_LIMIT = 100
STOPS_LIMIT, STOP_LENGTH_LIMIT = 32, 200  # each token's text is compared with them
BIASES_LIMIT = STOP_TOKENS_LIMIT = 1024
# Tokens of a request, those in their places counted too where log-probabilities are asked for: each takes memory.
TOKENS_LIMIT = 2**18


class BadRequest(ValueError):
    """What is wrong with a request, which names the field by `param`, if it is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(BadRequest):
    """A request for another model than the one that is there."""


def error_body(message: str, param: str | None = None, type: str = "invalid_request_error") -> dict[str, Any]:
    """An error as OpenAI's clients expect it.

    >>> error_body("n is 0", "n")
    {'error': {'message': 'n is 0', 'type': 'invalid_request_error', 'param': 'n', 'code': None}}
    """
    return {"error": {"message": message, "type": type, "param": param, "code": None}}


@dataclass(frozen=True)
class Completion:
    """A request that was found in order.

    prompts: token ids · settings: of all its texts · n: how many texts of each prompt are given back, and best_of: of
    how many · max_tokens: 0 where the prompt is only scored · echo: whether the text begins with the prompt · logprobs:
    of how many tokens in each place, None for none · token_ids: whether ids are given back as well · stream: whether
    the answer is to come as it is written · stream_usage: whether the stream ends with how many tokens there were
    """

    prompts: Sequence[Sequence[int]]
    settings: Settings
    max_tokens: int
    n: int
    best_of: int
    echo: bool
    logprobs: int | None
    token_ids: bool
    stream: bool
    stream_usage: bool

    def __repr__(self) -> str:
        what = f"n={self.n}, best_of={self.best_of}, max_tokens={self.max_tokens}"
        return f"<Completion of {len(self.prompts)} prompts: {what}>"

    @property
    def sequences(self) -> int:
        """How many texts are generated."""
        return len(self.prompts) * self.best_of

    @property
    def most_tokens(self) -> int:
        """How many tokens are generated at most."""
        return self.sequences * max(1, self.max_tokens)

    def submissions(self) -> Iterator[tuple[Sequence[int], Settings]]:
        """What an engine has to be asked for: prompts with settings, in the order that `answer` wants."""
        for number, prompt in enumerate(self.prompts):
            for i in range(self.best_of):
                settings = self.settings | {"sample": number * self.best_of + i}
                if i == 0 and self.echo:  # which is the same for all
                    settings["prompt_logprobs"] = self.logprobs
                yield prompt, settings


def parse_completion(
    body: object, model: Model, seed: int | None = None, names: Collection[str] | None = None
) -> Completion:
    """A request's body, checked; `BadRequest` says what is wrong with it.

    body: what its JSON says · seed: what draws where the body says none · names: what the model may be called; by
    default anything

    >>> parse_completion({"prompt": "A language model", "max_tokens": 4}, model).prompts
    [[32, 514, 352]]
    """
    if not isinstance(body, dict):
        raise BadRequest(f"body is {shortened(body)}, where an object is expected", "body")
    if body.get("suffix"):
        raise BadRequest(f"suffix is {shortened(body['suffix'])}; GPT-2 writes on, and can't fill in", "suffix")
    said = body.get("model")
    if said is not None and not isinstance(said, str):
        raise BadRequest(f"model is {shortened(said)}, where a name is expected", "model")
    if names is not None and said is not None and said not in list(names):
        raise UnknownModel(f"model is {shortened(said)}, where this one is {' or '.join(names)}", "model")
    max_tokens = _whole(body, "max_tokens", 16, 0, model.hparams.n_ctx)
    n = _whole(body, "n", 1, 1, SAMPLES_LIMIT)
    best_of = _whole(body, "best_of", n, n, SAMPLES_LIMIT)
    logprobs = _whole(body, "logprobs", -1, 0, LOGPROBS_LIMIT)
    settings = _settings(body, model, seed)
    settings["length"] = max(1, max_tokens)  # where it is 0, the token is left out again
    if logprobs >= 0 or best_of > n:
        settings["logprobs"] = max(0, logprobs)
    completion = Completion(
        _prompts(body, model, max_tokens),
        settings,
        max_tokens,
        n,
        best_of,
        _flag(body, "echo"),
        None if logprobs < 0 else logprobs,
        _flag(body, "return_token_ids"),
        _flag(body, "stream"),
        _stream_usage(body),
    )
    if completion.sequences > SEQUENCES_LIMIT:
        what = f"prompts × best_of are {completion.sequences:,} texts, more than {SEQUENCES_LIMIT:,}"
        raise BadRequest(what, "best_of")
    if completion.stream and best_of > n:
        raise BadRequest(
            f"best_of is {best_of}, of which {n} can't be chosen before all are written; don't stream", "best_of"
        )
    read = best_of * sum(map(len, completion.prompts)) if completion.echo else 0
    if (tokens := (read + completion.most_tokens) * (2 + logprobs)) > TOKENS_LIMIT:
        factors = "prompts × best_of × max_tokens, with logprobs and echo"
        raise BadRequest(f"{factors}, come to {tokens:,} tokens, more than {TOKENS_LIMIT:,}", "max_tokens")
    return completion


def _prompts(body: dict[str, Any], model: Model, max_tokens: int) -> list[list[int]]:
    said = "" if body.get("prompt") is None else body["prompt"]
    several = isinstance(said, list) and said and all(isinstance(one, str | list) for one in said)
    if not isinstance(said, str | list) or said == []:
        expected = "a text, token ids, or a list of either is expected"
        raise BadRequest(f"prompt is {shortened(said)}, where {expected}", "prompt")
    if several and len(said) > PROMPTS_LIMIT:
        raise BadRequest(f"prompt is a list of {len(said):,}, more than {PROMPTS_LIMIT:,}", "prompt")
    prompts, total, n_ctx = [], 0, model.hparams.n_ctx
    for prompt in said if several else [said]:
        if isinstance(prompt, list) and not (prompt and all(type(token) is int for token in prompt)):
            raise BadRequest(f"prompt has {shortened(prompt)}, where token ids are expected", "prompt")
        if isinstance(prompt, str) and (least := len(prompt) // _longest(model.tokenizer)) > n_ctx:
            # Said before the text is encoded, which takes a second a megabyte.
            more = f"{least:,} tokens and max_tokens is {max_tokens:,}: more than the model's n_ctx of {n_ctx:,}"
            raise BadRequest(f"prompt has at least {more}", "prompt")
        try:
            tokens = model.prompt_tokens(prompt, True)
            model.tokenizer.decode_bytes(tokens)  # rows of the model that are no token's have no text
        except (TypeError, ValueError) as error:
            model.prompt_tokens([0], True)  # where this fails too, it isn't the prompt's fault
            raise BadRequest(f"prompt: {error}".replace("prompt: prompt ", "prompt "), "prompt") from None
        if len(tokens) + max_tokens > n_ctx:
            more = f"{len(tokens):,} tokens and max_tokens is {max_tokens:,}: more than the model's n_ctx of {n_ctx:,}"
            raise BadRequest(f"prompt has {more}", "prompt" if len(tokens) > n_ctx else "max_tokens")
        prompts.append(tokens)
        if (total := total + len(tokens)) > PROMPT_TOKENS_LIMIT:
            raise BadRequest(f"prompt has more than {PROMPT_TOKENS_LIMIT:,} tokens, all together", "prompt")
    return prompts


@lru_cache(maxsize=1)
def _longest(tokenizer: Tokenizer) -> int:
    """How many bytes the longest token has, so that no text of more characters is one token."""
    return max(len(tokenizer.decode_bytes([token])) for token in range(len(tokenizer)) if token in tokenizer)


def _settings(body: dict[str, Any], model: Model, seed: int | None) -> Settings:
    """What is asked of the engine, but for what depends on several fields."""
    settings: dict[str, Any] = {"temperature": 1.0}
    settings |= {name: body[name] for name in SAMPLERS if body.get(name) is not None}
    for name, value in settings.items():
        try:
            parse_settings(cast(Settings, {name: value}))
        except (TypeError, ValueError) as error:
            raise BadRequest(str(error), name) from None
    said = _whole(body, "seed", 0, -(2**63), 2**63 - 1)
    settings["seed"] = seed if body.get("seed") is None else said % 2**64
    settings |= {"logit_bias": _biases(body, model), "stop": _stops(body), "stop_tokens": _stop_tokens(body, model)}
    settings["ignore_eot"] = _flag(body, "ignore_eos")
    return cast(Settings, settings)


def _stops(body: dict[str, Any]) -> list[str]:
    said = body.get("stop")
    stops = [said] if isinstance(said, str) else said or []
    fits = isinstance(stops, list) and len(stops) <= STOPS_LIMIT
    if not fits or not all(isinstance(stop, str) and 0 < len(stop) <= STOP_LENGTH_LIMIT for stop in stops):
        expected = f"a text, or up to {STOPS_LIMIT}, each of 1 to {STOP_LENGTH_LIMIT} characters are expected"
        raise BadRequest(f"stop is {shortened(said)}, where {expected}", "stop")
    return list(stops)


def _stop_tokens(body: dict[str, Any], model: Model) -> list[int]:
    said, n_vocab = body.get("stop_token_ids") or [], model.hparams.n_vocab
    fits = isinstance(said, list) and len(said) <= STOP_TOKENS_LIMIT
    if not fits or not all(type(token) is int and 0 <= token < n_vocab for token in said):
        expected = f"a list of up to {STOP_TOKENS_LIMIT:,} token ids, from 0 to {n_vocab - 1}, is expected"
        raise BadRequest(f"stop_token_ids is {shortened(said)}, where {expected}", "stop_token_ids")
    return said


def _stream_usage(body: dict[str, Any]) -> bool:
    said = body.get("stream_options")
    if said is None:
        return False
    if not isinstance(said, dict) or not body.get("stream"):
        expected = "an object, and only with stream, is expected"
        raise BadRequest(f"stream_options is {shortened(said)}, where {expected}", "stream_options")
    try:
        return _flag(said, "include_usage")
    except BadRequest as problem:
        raise BadRequest(f"stream_options: {problem}", "stream_options") from None


def _biases(body: dict[str, Any], model: Model) -> dict[int, float]:
    said, biases = body.get("logit_bias") or {}, {}
    n_vocab = model.hparams.n_vocab
    if not isinstance(said, dict) or len(said) > BIASES_LIMIT:
        expected = f"an object of up to {BIASES_LIMIT:,} token ids is expected"
        raise BadRequest(f"logit_bias is {shortened(said)}, where {expected}", "logit_bias")
    for text, bias in said.items():
        token = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else n_vocab
        if token >= n_vocab:
            expected = f"a token id from 0 to {n_vocab - 1} is expected"
            raise BadRequest(f"logit_bias has {shortened(text)}, where {expected}", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            what = f"logit_bias of token {token} is {shortened(bias)}, where a number from -100 to 100 is expected"
            raise BadRequest(what, "logit_bias")
        biases[token] = float(bias)
    return biases


def _whole(body: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        expected = f"a whole number from {least} to {most} is expected"
        raise BadRequest(f"{name} is {shortened(value)}, where {expected}", name)
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name} is {shortened(value)}, where true or false is expected", name)
    return bool(value)
