"""What is answered at each path, once it is known that it may be: a function each, from a request to an `Answer`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

from npgpt2 import GPT2
from npgpt2.engine import end_tokens
from npgpt2.serving.choices import Origin, answer
from npgpt2.serving.chunks import Chunks
from npgpt2.serving.protocol import BadRequest, Completion, UnknownModel, error_body, parse_completion
from npgpt2.serving.server import metrics, pages, streams
from npgpt2.serving.server.guard import Environ, Refused, parse_body, read_body
from npgpt2.serving.server.loop import Full, Gone, Loop, Stopped
from npgpt2.serving.together import parse_together

JSON = "application/json"
# Characters of a text that is encoded for its tokens alone. So many of one word take half a second.
TEXT_LIMIT = 2**19
# Seconds that a text waits to be looked into while another is.
INSPECT_PATIENCE = 10
RETRY = [("Retry-After", "1")]
NO_CHAT = (
    "this is a base model, which continues text and has no chat: POST /v1/completions with a prompt, as in"
    ' {"prompt": "Once upon a time", "max_tokens": 50}'
)


class Answer(NamedTuple):
    """An answer: its status, its type, its body, whole or in pieces, and other headers."""

    status: int
    type: str
    body: bytes | Iterable[bytes]
    headers: Sequence[tuple[str, str]] = ()


def as_json(body: object, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> Answer:
    return Answer(status, JSON, json.dumps(body, allow_nan=False).encode("ascii"), [*headers])


def gone_of(environ: Environ) -> Callable[[], bool]:
    """What says whether a client has gone away, where the server knows."""
    gone: Callable[[], bool] = environ.get("waitress.client_disconnected", lambda: False)
    return gone


def problem(error: Exception) -> tuple[int, dict[str, Any], list[tuple[str, str]]]:
    """The status and the body of what tells of an error, and headers."""
    if isinstance(error, Refused):
        kind = {"type": "server_error"} if error.status >= 500 else {}
        said = error_body(error.message, error.param, **kind)
        said["error"]["code"] = error.code
        return error.status, said, error.headers
    if isinstance(error, BadRequest):
        said = error_body(str(error), error.param)
        if not isinstance(error, UnknownModel):
            return 400, said, []
        said["error"]["code"] = "model_not_found"
        return 404, said, []
    if isinstance(error, Full):
        return 429, error_body("too many requests wait; try again", type="rate_limit_error"), RETRY
    if isinstance(error, Stopped):
        return error.status, error_body(str(error), type="server_error"), []
    return 500, error_body(f"{type(error).__name__}: {error}", type="server_error"), []


class Service:
    """What the endpoints need: the model, its name, and what runs it.

    names: what requests may call the model, the first of which is its name
    """

    def __init__(self, model: GPT2, names: list[str], loop: Loop, counted: metrics.Metrics) -> None:
        self.model, self.names, self.loop, self.metrics = model, names, loop, counted
        fingerprint = getattr(model.weights, "fingerprint", lambda: os.urandom(8).hex())()
        self.origin = Origin(names[0], fingerprint, int(time.time()))
        # Bodies are read, and texts looked into, one at a time: both take memory, and Python's time from the engine.
        self._reading, self._inspecting = Lock(), Lock()

    # ---- Completions

    def completions(self, environ: Environ) -> Answer:
        return self._complete(environ, parse_completion)

    def together(self, environ: Environ) -> Answer:
        """Several requests in one stream, for the playground; see `parse_together`."""
        return self._complete(environ, parse_together)

    def _complete(self, environ: Environ, parse: Callable[..., Completion]) -> Answer:
        # Nothing is kept of the body while it waits.
        job = self.loop.submit(self._asked(environ, parse), gone_of(environ))
        id, environ["npgpt2.job"] = environ["npgpt2.id"], job
        origin = self.origin._replace(created=int(time.time()))
        if job.completion.stream:
            chunks = Chunks(job.completion, self.model.tokenizer, origin, id)
            said = streams.events(job, chunks, lambda error: problem(error)[1])
            return Answer(200, streams.TYPE, said, [("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no")])
        try:
            for _ in job.events(streams.PATIENCE):
                pass
        finally:
            job.cancel()
        return as_json(answer(job.completion, job.requests, self.model.tokenizer, origin, id))

    def _asked(self, environ: Environ, parse: Callable[..., Completion]) -> Completion:
        data = read_body(environ)
        with self._turn(environ):
            return parse(parse_body(data), self.model, names=self.names)

    @contextmanager
    def _turn(self, environ: Environ) -> Iterator[None]:
        """Wait for one's turn to look at a body; `Gone` where the client hasn't waited."""
        with self._reading:
            if gone_of(environ)():
                raise Gone
            yield

    def chat(self, environ: Environ) -> Answer:
        raise Refused(404, NO_CHAT)

    # ---- The model

    def models(self, environ: Environ) -> Answer:
        return as_json({"object": "list", "data": [self._model()]})

    def one_model(self, environ: Environ) -> Answer:
        name = environ["PATH_INFO"].removeprefix("/v1/models/").encode("latin-1").decode("utf-8", "replace")
        if name not in self.names:
            raise Refused(
                404, f"there is no model {name[:100]!r}; there is {self.names[0]}", "model", "model_not_found"
            )
        return as_json(self._model())

    def _model(self) -> dict[str, Any]:
        hparams = self.model.hparams
        said = {"id": self.names[0], "object": "model", "created": self.origin.created, "owned_by": "npgpt2"}
        return said | {"max_model_len": hparams.n_ctx, "meta": hparams._asdict()}

    # ---- Tokens

    def tokenize(self, environ: Environ) -> Answer:
        """In vLLM's spelling, `prompt` with `add_special_tokens` and `return_token_strs`, or llama.cpp's, `content`
        with `with_pieces`. No token is added before a text of GPT-2's.
        """
        data = read_body(environ)
        with self._turn(environ):
            body = parse_body(data)
            name = "content" if "content" in body and "prompt" not in body else "prompt"
            text, special = body.get(name), body.get("parse_special", True)
            if not isinstance(text, str) or len(text) > TEXT_LIMIT:
                raise Refused(400, f"{name} is no text of up to {TEXT_LIMIT:,} characters", name)
            if not isinstance(special, bool):
                raise Refused(400, "parse_special is neither true nor false", "parse_special")
            tokenizer = self.model.tokenizer
            tokens = tokenizer.encode(text, special)
            if body.get("with_pieces"):
                return as_json({"tokens": [{"id": token, "piece": tokenizer.decode([token])} for token in tokens]})
            strings = [tokenizer.decode([token]) for token in tokens] if body.get("return_token_strs") else None
            said = {"count": len(tokens), "max_model_len": self.model.hparams.n_ctx, "tokens": tokens}
            return as_json(said | {"token_strs": strings})

    def detokenize(self, environ: Environ) -> Answer:
        data = read_body(environ)
        with self._turn(environ):
            tokens = parse_body(data).get("tokens")
            if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
                raise Refused(400, "tokens is no list of token ids", "tokens")
            try:
                text = self.model.tokenizer.decode(tokens)
            except ValueError as error:
                raise Refused(400, f"tokens: {error}", "tokens") from None
            return as_json({"prompt": text, "content": text})

    def tokenizer_info(self, environ: Environ) -> Answer:
        """What transformers would call the vocabulary's parts."""
        begin, ends = self.model.begin, end_tokens(self.model)
        name = {token: self.model.tokenizer.decode([token]) for token in (begin, *ends) if token is not None}
        said = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": self.model.hparams.n_ctx}
        said |= {"bos_token": None if begin is None else name[begin], "eos_token": name[ends[0]] if ends else None}
        return as_json(said | {"add_bos_token": False, "add_prefix_space": self.model.special.prefix_space})

    # ---- A look inside

    def distribution(self, environ: Environ) -> Answer:
        """What can come after a prompt, for the playground; see `next_place`."""
        data = read_body(environ)
        with self._turn(environ):
            body = parse_body(data)
            asked = {"prompt": body.get("prompt"), "logit_bias": body.get("logit_bias"), "max_tokens": 0}
            completion = parse_completion(asked, self.model)
            if len(completion.prompts) > 1:
                raise Refused(400, f"prompt is {len(completion.prompts)} prompts, where one is expected", "prompt")
        with self._looking_inside(environ):
            place = pages.next_place_of(self.model, completion.prompts[0], completion.settings["logit_bias"] or {})
        return as_json(place)

    def inspect(self, environ: Environ) -> Answer:
        data = read_body(environ)
        with self._turn(environ):
            prompt = parse_body(data).get("prompt")
            if isinstance(prompt, list) and prompt and type(prompt[0]) is not int:
                raise Refused(400, "prompt is neither a text nor token ids", "prompt")
            (tokens,) = parse_completion({"prompt": prompt, "max_tokens": 0}, self.model).prompts
        if len(tokens) > pages.INSPECT_LIMIT:
            most = f"{pages.INSPECT_LIMIT} can be looked into"
            raise Refused(400, f"prompt has {len(tokens):,} tokens, of which {most}", "prompt")
        with self._looking_inside(environ):
            page = pages.inspect_page(self.model, tokens, self.names[0])
        return Answer(200, pages.TYPES["html"], page, [("Content-Security-Policy", pages.INSPECT_POLICY)])

    @contextmanager
    def _looking_inside(self, environ: Environ) -> Iterator[None]:
        """Wait until nobody else looks inside; `Full` where that takes long, `Gone` where the client hasn't waited."""
        if not self._inspecting.acquire(timeout=INSPECT_PATIENCE):
            raise Full
        try:
            if gone_of(environ)():
                raise Gone
            yield
        finally:
            self._inspecting.release()

    def file(self, environ: Environ) -> Answer:
        found = pages.find_file(environ["PATH_INFO"][1:] or next(iter(pages.FILES)))
        if found is None:
            raise Refused(404, f"there is nothing at {environ['PATH_INFO'][:100]!r}")
        headers = [("Content-Security-Policy", pages.policy()), ("ETag", found.tag), ("Cache-Control", "no-cache")]
        if environ.get("HTTP_IF_NONE_MATCH") == found.tag:
            return Answer(304, found.type, b"", headers)
        return Answer(200, found.type, found.data, headers)

    # ---- How it is

    def health(self, environ: Environ) -> Answer:
        if self.loop.error:
            raise Stopped(f"the engine failed: {self.loop.error!r}")
        return as_json({"status": "ok"})

    def tell_metrics(self, environ: Environ) -> Answer:
        loop = self.loop
        gauges: dict[str, tuple[str, Callable[[], int]]] = {
            "requests_running": ("Requests for completions of which a text has begun.", lambda: loop.running),
            "requests_waiting": ("Requests for completions that wait.", lambda: loop.waiting),
            "slots_used": ("Texts that are being read or continued.", lambda: loop.slots_used),
        }
        return Answer(200, metrics.TYPE, self.metrics.render(gauges).encode())
