"""The answer to a request as OpenAI's completions have it. How it is streamed is in `chunks.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from npgpt2.engine import LogProb, Request, mean_logprob
from npgpt2.serving.logprobs import shape_logprobs, text_offsets
from npgpt2.serving.protocol import Completion
from npgpt2.tokenizer import Tokenizer

FINISH = {"length": "length", "stop": "stop", "end": "stop"}


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
    written = sum(len(request.tokens) for request in requests) if completion.max_tokens else 0
    return head(origin, id) | {"choices": choices, "usage": usage(completion, written)}


def head(origin: Origin, id: str) -> dict[str, Any]:
    """What an answer, and each chunk of one, begins with."""
    return {
        "id": f"cmpl-{id}",
        "object": "text_completion",
        "created": origin.created,
        "model": origin.model,
        "system_fingerprint": f"fp_{origin.fingerprint}",
    }


def usage(completion: Completion, written: int) -> dict[str, int]:
    """How many tokens there were, of which so many were generated."""
    read = sum(map(len, completion.prompts))
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _choice(
    completion: Completion, prompt: Sequence[int], scored: list[LogProb], request: Request, tokenizer: Tokenizer
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
        choice |= {"token_ids": tokens, "prompt_token_ids": [*prompt]}
    return choice
