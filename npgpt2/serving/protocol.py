"""OpenAI's completions: the body of a request, checked, and its answer, shaped. It knows neither HTTP nor files.

Where it differs from OpenAI's, it is wider: as many `stop` strings and `logprobs` as clients send, and settings that
other servers have too, under the names that they give them. Fields that nobody here knows are passed over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any, NamedTuple, cast

from npgpt2.engine import LogProb, Request, Settings, mean_logprob, parse_settings
from npgpt2.engine.engine import Model
from npgpt2.sampling import SamplingSettings
from npgpt2.serving.logprobs import shape_logprobs, text_offsets
from npgpt2.tokenizer import Tokenizer

# What the engine knows under the same names.
SAMPLERS = [name for name in SamplingSettings.__annotations__ if name not in ("logit_bias", "seed", "sample")]
# What the engine can't do, by what to say of it.
REFUSED = {"suffix": "GPT-2 writes on, and can't fill in", "stop_token_ids": "stop takes texts"}
PROMPTS_LIMIT, SAMPLES_LIMIT, SEQUENCES_LIMIT = 2048, 128, 4096
LOGPROBS_LIMIT = 100
STOPS_LIMIT, STOP_LENGTH_LIMIT = 32, 200  # each token's text is compared with them
BIASES_LIMIT = 1024
# Tokens of a request, those in their places counted too where log-probabilities are asked for: each takes memory.
TOKENS_LIMIT = 2**18
FINISH = {"length": "length", "stop": "stop", "end": "stop"}


class BadRequest(ValueError):
    """What is wrong with a request, which names the field by `param`, if it is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


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
    the answer is to come as it is written
    """

    prompts: list[list[int]]
    settings: Settings
    max_tokens: int
    n: int
    best_of: int
    echo: bool
    logprobs: int | None
    token_ids: bool
    stream: bool

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

    def submissions(self) -> Iterator[tuple[list[int], Settings]]:
        """What an engine has to be asked for: prompts with settings, in the order that `answer` wants."""
        for number, prompt in enumerate(self.prompts):
            for i in range(self.best_of):
                settings = self.settings | {"sample": number * self.best_of + i}
                if i == 0 and self.echo:  # which is the same for all
                    settings["prompt_logprobs"] = self.logprobs
                yield prompt, settings


# ---- Requests


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
    for name, why in REFUSED.items():
        if body.get(name):
            raise BadRequest(f"{name} is {shortened(body[name])}; {why}", name)
    if names is not None and body.get("model") is not None and body["model"] not in list(names):
        raise BadRequest(f"model is {shortened(body['model'])}, where this one is {' or '.join(names)}", "model")
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
    )
    if completion.sequences > SEQUENCES_LIMIT:
        what = f"prompts × best_of are {completion.sequences:,} texts, more than {SEQUENCES_LIMIT:,}"
        raise BadRequest(what, "best_of")
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
    prompts = []
    for prompt in said if several else [said]:
        if isinstance(prompt, list) and not (prompt and all(type(token) is int for token in prompt)):
            raise BadRequest(f"prompt has {shortened(prompt)}, where token ids are expected", "prompt")
        try:
            tokens = model.prompt_tokens(prompt, True)
            model.tokenizer.decode_bytes(tokens)  # rows of the model that are no token's have no text
        except (TypeError, ValueError) as error:
            model.prompt_tokens([0], True)  # where this fails too, it isn't the prompt's fault
            raise BadRequest(f"prompt: {error}".replace("prompt: prompt ", "prompt "), "prompt") from None
        if len(tokens) + max_tokens > (n_ctx := model.hparams.n_ctx):
            more = f"{len(tokens):,} tokens and max_tokens is {max_tokens:,}: more than the model's n_ctx of {n_ctx:,}"
            raise BadRequest(f"prompt has {more}", "prompt" if len(tokens) > n_ctx else "max_tokens")
        prompts.append(tokens)
    return prompts


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
    settings |= {"logit_bias": _biases(body, model), "stop": _stops(body), "ignore_eot": _flag(body, "ignore_eos")}
    return cast(Settings, settings)


def _stops(body: dict[str, Any]) -> list[str]:
    said = body.get("stop")
    stops = [said] if isinstance(said, str) else said or []
    fits = isinstance(stops, list) and len(stops) <= STOPS_LIMIT
    if not fits or not all(isinstance(stop, str) and 0 < len(stop) <= STOP_LENGTH_LIMIT for stop in stops):
        expected = f"a text, or up to {STOPS_LIMIT}, each of 1 to {STOP_LENGTH_LIMIT} characters are expected"
        raise BadRequest(f"stop is {shortened(said)}, where {expected}", "stop")
    return list(stops)


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


# ---- Answers


class Origin(NamedTuple):
    """Who answers, and when: the model's name, the fingerprint of its contents, and seconds since 1970."""

    model: str
    fingerprint: str
    created: int


def answer(
    completion: Completion, requests: Sequence[Request], tokenizer: Tokenizer, origin: Origin, id: str
) -> dict[str, Any]:
    """The body of an answer.

    requests: what an engine made of `Completion.submissions`, in their order, all of them ended without an error
    """
    choices: list[dict[str, Any]] = []
    for number, prompt in enumerate(completion.prompts):
        drawn = requests[number * completion.best_of : (number + 1) * completion.best_of]
        scored = drawn[0].prompt_logprobs
        best = sorted(drawn, key=mean_logprob, reverse=True) if completion.best_of > completion.n else drawn
        for request in best[: completion.n]:
            choice = _choice(completion, prompt, scored, request, tokenizer)
            choices.append({"index": len(choices)} | choice)
    read = sum(map(len, completion.prompts))
    written = sum(len(request.tokens) for request in requests) if completion.max_tokens else 0
    return {
        "id": f"cmpl-{id}",
        "object": "text_completion",
        "created": origin.created,
        "model": origin.model,
        "system_fingerprint": f"fp_{origin.fingerprint}",
        "choices": choices,
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def _choice(
    completion: Completion, prompt: list[int], scored: list[LogProb], request: Request, tokenizer: Tokenizer
) -> dict[str, Any]:
    before, text = tokenizer.decode(prompt), request.text if completion.max_tokens else ""
    choice: dict[str, Any] = {
        "text": before + text if completion.echo else text,
        "logprobs": None,
        "finish_reason": FINISH[request.finish_reason or "length"] if completion.max_tokens else "length",
    }
    tokens = request.tokens[: completion.max_tokens]
    if completion.logprobs is not None:
        shown = request.logprobs[: completion.max_tokens]
        offsets = [len(before) + offset for offset in text_offsets(tokenizer, tokens, len(text))]
        if completion.echo:
            shown, offsets = scored + shown, text_offsets(tokenizer, prompt, len(before)) + offsets
        choice["logprobs"] = shape_logprobs(shown, offsets, tokenizer)
    if completion.token_ids:
        choice |= {"token_ids": tokens, "prompt_token_ids": prompt}
    return choice
