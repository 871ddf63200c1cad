"""The WSGI application: which path is whose, errors, headers that all answers have, and a line of log for each."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from threading import Lock
from typing import Any

from npgpt2 import GPT2
from npgpt2.checks import check_callable, check_whole, wrong_type
from npgpt2.serving.server.endpoints import RETRY, Answer, Service, as_json, problem
from npgpt2.serving.server.guard import Environ, Guard, Refused, cors_headers, preflight_headers
from npgpt2.serving.server.loop import Gone, Job, Loop, Stopped
from npgpt2.serving.server.metrics import Metrics
from npgpt2.serving.server.pages import FILES

Handler = Callable[[Environ], Answer]
Log = Callable[[str], object]
# What all answers tell browsers: not to guess types, not to say where they were, not to give others what is ours.
SAFETY = [
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]
GET, POST = ("GET", "HEAD"), ("POST",)
OPEN = {"/", "/health", *(f"/{name}" for name in FILES)}  # no key is wanted for these
# Seconds that the engine's thread has to end its step.
JOIN = 30.0
CLOSING = "the server is shutting down"


def app(
    model: GPT2,
    name: str | None = None,
    *,
    aliases: Iterable[str] = (),
    slots: int = 16,
    queue: int = 64,
    api_keys: Iterable[str] = (),
    allowed_hosts: Iterable[str] = (),
    any_address: bool = False,
    cors_origins: Iterable[str] = (),
    log: Log = lambda line: None,
    log_prompts: bool = False,
) -> App:
    """A WSGI application that serves a model as OpenAI's completions, for any server that has threads.

    name: what the model is called, by default as its file; aliases: by what else · slots: how many texts are continued
    at once · queue: how many requests wait at most while all slots are taken · api_keys: of which each request has to
    give one, if there are any · allowed_hosts: by what names the server may be called, beside `localhost`; any_address:
    or by every address · cors_origins: whose scripts may ask, as "https://example.org", or "null" · log: called with a
    line for each request; log_prompts: which has the prompts in it. The thread that generates begins with the first
    request, so that a server may fork before that. ValueError where the model has no vocabulary.

    >>> served = app(model, "tiny", slots=2)
    >>> environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/health", "HTTP_HOST": "localhost"}
    >>> print(*served(environ, lambda status, headers: print(status)))
    200 OK
    b'{"status": "ok"}'
    >>> served.close()
    """
    check_whole("slots", slots, 1)
    check_whole("queue", queue, 0)
    check_callable("log", log)
    for argument, texts in (
        ("aliases", aliases),
        ("api_keys", api_keys),
        ("allowed_hosts", allowed_hosts),
        ("cors_origins", cors_origins),
    ):
        if isinstance(texts, str):
            raise wrong_type(argument, texts, "a list of texts")
    guard = Guard.of(allowed_hosts, any_address, cors_origins, api_keys)
    metrics = Metrics()
    loop = Loop(model, slots, queue, metrics)
    names = list(dict.fromkeys((name or model.name, *aliases)))
    return App(Service(model, names, loop, metrics), guard, log, log_prompts)


class App:
    """A WSGI application that serves a model; `app` makes one.

    loop: what generates · active: how many answers are being made or sent
    """

    def __init__(self, service: Service, guard: Guard, log: Log, log_prompts: bool) -> None:
        self._service, self._guard, self._log, self._log_prompts = service, guard, log, log_prompts
        self.loop = service.loop
        self.active = 0
        self._counting = Lock()
        self._closing = False
        self._routes: dict[str, tuple[tuple[str, ...], Handler]] = {
            "/v1/completions": (POST, service.completions),
            "/v1/models": (GET, service.models),
            "/tokenize": (POST, service.tokenize),
            "/detokenize": (POST, service.detokenize),
            "/tokenizer_info": (GET, service.tokenizer_info),
            "/inspect": (POST, service.inspect),
            "/distribution": (POST, service.distribution),
            "/together": (POST, service.together),
            "/health": (GET, service.health),
            "/metrics": (GET, service.tell_metrics),
            "/v1/chat/completions": ((*GET, *POST), service.chat),
        }
        self._routes |= dict.fromkeys(("/", *(f"/{name}" for name in FILES)), (GET, service.file))

    # ---- For who runs it

    def start(self) -> None:
        """Begin the thread that generates, which the first request does otherwise."""
        self.loop.start()

    def refuse(self) -> None:
        """Answer no more requests from now on, but go on with those that there are."""
        self._closing = True

    def end(self) -> None:
        """End the requests that there are, with an error."""
        self.refuse()
        self.loop.end_all(Stopped(CLOSING, 503))

    def close(self) -> None:
        """End all requests, and the thread that generates."""
        self.end()
        self.loop.join(JOIN)

    # ---- For a server

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        began, origin, error = time.monotonic(), None, None
        environ["npgpt2.id"] = uuid.uuid4().hex
        with self._counting:
            self.active += 1
        try:
            self._guard.check_host(environ)
            origin = self._guard.check_origin(environ)
            answer = self._answer(environ)
        except Exception as caught:
            error, (status, body, more) = caught, problem(caught)
            answer = as_json(body, status, more)
        headers = [("X-Request-Id", environ["npgpt2.id"]), *SAFETY, *answer.headers, *cors_headers(environ, origin)]
        if answer.status not in (204, 304):
            headers.append(("Content-Type", answer.type))
            if isinstance(answer.body, bytes):
                headers.append(("Content-Length", str(len(answer.body))))
        start_response(f"{answer.status} {HTTPStatus(answer.status).phrase}", headers)
        return _Sending(self, environ, answer, began, error)

    def _answer(self, environ: Environ) -> Answer:
        path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
        methods, handler = self._find(path)
        if method == "OPTIONS":
            return Answer(204, "text/plain", b"", preflight_headers(environ, (*methods, "OPTIONS")))
        if path not in OPEN:
            self._guard.check_key(environ)
        if method not in methods:
            allowed = [("Allow", ", ".join((*methods, "OPTIONS")))]
            raise Refused(405, f"{method[:20]} {path[:100]}: {' or '.join(methods)} is expected", headers=allowed)
        if self._closing:
            raise Refused(503, CLOSING, headers=RETRY)
        return handler(environ)

    def _find(self, path: str) -> tuple[tuple[str, ...], Handler]:
        if path in self._routes:
            return self._routes[path]
        if path.startswith("/v1/models/"):
            return GET, self._service.one_model
        raise Refused(404, f"there is nothing at {path[:100]!r}; POST /v1/completions continues texts")

    def ended(self, environ: Environ, how: str, began: float) -> None:
        """Take note that an answer was sent, or can't be sent any more. how: its status, or what the log says of it"""
        with self._counting:
            self.active -= 1
        job: Job | None = environ.get("npgpt2.job")
        parts = [environ.get("REMOTE_ADDR", "-"), environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")]
        took = time.monotonic() - began
        said = [*map(printable, parts), how, f"{took:.3f} s"]
        if job:
            speed = f", {job.written / took:.1f} tokens/s" if took else ""
            said.append(f"{sum(map(len, job.completion.prompts))} + {job.written} tokens{speed}")
            if self._log_prompts:
                tokenizer = self._service.model.tokenizer
                said.append(json.dumps([tokenizer.decode(prompt) for prompt in job.completion.prompts]))
        self._log(" ".join(said))


class _Sending:
    """An answer's body while it is sent, and what follows, whether or not it was sent to its end."""

    def __init__(self, app: App, environ: Environ, answer: Answer, began: float, error: Exception | None) -> None:
        self._app, self._environ, self._answer, self._began, self._error = app, environ, answer, began, error
        self._open, self._whole = True, False

    def __iter__(self) -> Iterator[bytes]:
        body = [self._answer.body] if isinstance(self._answer.body, bytes) else self._answer.body
        if self._environ["REQUEST_METHOD"] != "HEAD":
            yield from body
        self._whole = True
        self.close()

    def close(self) -> None:
        if self._open:
            self._open = False
            job: Job | None = self._environ.get("npgpt2.job")
            if job:
                job.cancel()
            gone = isinstance(self._error or (job and job.error), Gone) or not self._whole
            self._app.ended(self._environ, "gone" if gone else str(self._answer.status), self._began)


def printable(text: str) -> str:
    r"""A text in which nothing can be taken for another line of the log, or for a terminal's commands.

    >>> printable("/\r\n\x1b[31m")
    '/\\x0d\\x0a\\x1b[31m'
    """

    def shown(c: str) -> str:
        if "!" <= c <= "~" and c != "\\":
            return c
        return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"

    return "".join(map(shown, text[:500]))
