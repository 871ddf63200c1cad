"""Ten thousand requests that mean no good, or nothing at all: the server answers each, as in order or as wrong, and is
afterwards as it was before.

Most are made by hypothesis, from bodies, headers and bytes that are nearly right to those that are no HTTP; the seed is
fixed. They are made first and asked then, so that what hypothesis remembers isn't taken for what the server does.
"""

from __future__ import annotations

import gc
import http.client
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import pytest
from asking import ask, serving
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from npgpt2.serving import app

pytest.importorskip("waitress", reason="needs waitress, which runs the server")

APPLICATION_REQUESTS, SOCKET_REQUESTS = 7000, 3000
WARM_UP = 500  # after so many, whatever is set up once has been
SECONDS = 60  # that an answer may take at most, on a machine that does other things too
SILENCE = 0.5  # seconds, after which a server that says nothing waits for more
GROWTH = 16 * 2**20
PATHS = ["/v1/completions", "/tokenize", "/detokenize", "/inspect", "/v1/models", "/v1/models/tiny", "/tokenizer_info"]
PATHS += ["/health", "/metrics", "/v1/chat/completions", "/", "/index.html"]


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


# ---- What is asked

TEXTS = st.sampled_from(
    ["A language model", "", "<|endoftext|>", "\x00", "é\u202e\N{FAMILY}", "\ud800", "A" * 3000, "\r\nX: y", "../etc",
     "http://127.0.0.1/", "<script>alert(1)</script>", "{{7*7}}", "%s%n", "1e5", "NaN", "\N{KELVIN SIGN}", "٣"]
)  # fmt: skip
NUMBERS = st.sampled_from(
    [0, -0.0, 1, 2, 3, 5, -1, 0.5, 1.5, 191, 192, 193, 255, 520, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**400,
     -(10**399), 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan")]
)  # fmt: skip
LEAVES = st.none() | st.booleans() | NUMBERS | st.integers(-3, 600) | st.floats() | TEXTS | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
TOKENS = st.lists(st.integers(0, 519), min_size=1, max_size=5)
SHARE = st.floats(0.01, 1)
RIGHT = {
    "prompt": st.just("A language model") | TOKENS | st.lists(TOKENS, min_size=1, max_size=3),
    "max_tokens": st.integers(0, 3),
    "model": st.just("tiny"),
    "temperature": st.floats(0, 2),
    "top_p": SHARE,
    "top_k": st.integers(0, 50),
    "min_p": st.floats(0, 1),
    "typical_p": SHARE,
    "n": st.integers(1, 3),
    "best_of": st.integers(1, 3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "logprobs": st.integers(0, 5),
    "echo": st.booleans(),
    "stop": st.just("model") | st.lists(st.sampled_from(["a", "game", " "]), max_size=4),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "no_repeat_ngram_size": st.integers(0, 3),
    "logit_bias": st.dictionaries(st.integers(0, 519).map(str), st.floats(-100, 100), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "min_tokens": st.integers(0, 3),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(st.integers(0, 519), max_size=3),
    "return_token_ids": st.booleans(),
    "user": TEXTS,
}
OTHERS = ["suffix", "content", "tokens", "with_pieces", "parse_special", "return_token_strs", "", "__proto__", "slot"]


@st.composite
def objects(draw):
    """A body as JSON has it: in order but for some fields, or with nothing in it that is."""
    names = draw(st.lists(st.sampled_from([*RIGHT]), max_size=6, unique=True))
    body = {"prompt": "A", "max_tokens": 1} | {name: draw(RIGHT[name]) for name in names}
    for name in draw(st.lists(st.sampled_from([*RIGHT, *OTHERS]), max_size=2, unique=True)):
        body[name] = draw(VALUES)
    return body


@st.composite
def damaged(draw, whole):
    """Bytes of which some are missing, changed, twice there, or others."""
    data = draw(whole)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 40)))
        new = draw(st.sampled_from([b"", b"\x00", b"\xff", b'"', b"[[[[", b"}", b"\r\n", b"\r\n\r\n", b"99999999999"]))
        data = data[:start] + draw(st.just(new) | st.just(2 * data[start:stop]) | st.binary(max_size=6)) + data[stop:]
    return data


def as_bytes(value):
    return json.dumps(value).encode("ascii")


BODIES = st.one_of(
    objects().map(as_bytes),
    objects().map(as_bytes),
    objects().map(lambda body: json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    damaged(objects().map(as_bytes)),
    VALUES.map(as_bytes),
    st.binary(max_size=40),
)
LATIN = st.text(st.characters(min_codepoint=1, max_codepoint=255, blacklist_characters="\r\n"), max_size=20)
HEADERS = {
    "Host": st.sampled_from(["localhost", "127.0.0.1:8000", "[::1]", "evil.example", "", "localhost:99999"]) | LATIN,
    "Origin": st.sampled_from(["null", "http://localhost:8000", "https://evil.example", "http://localhost"]) | LATIN,
    "Content-Type": st.sampled_from(["application/json; charset=utf-16", "text/plain", "application/JSON", ""]) | LATIN,
    "Content-Encoding": st.sampled_from(["identity", "gzip", "x" * 500]),
    "Content-Length": st.sampled_from(["0", "1", "-1", "+5", "1e3", "0x10", "99999999999999999999", "5, 5", "", "²"]),
    "Authorization": st.sampled_from(["Bearer ", "Basic Og==", "Bearer \xff", "Bearer " + "x" * 9000]) | LATIN,
    "Access-Control-Request-Headers": LATIN,
    "If-None-Match": LATIN,
    "Accept": LATIN,
    "X-Request-Id": LATIN,
}
ODD_PATHS = ["//", "/../", "/%2e%2e/models", "/v1/completions/", "/v1/models/\xe4", "/\x00", "*", "/v1/models/../x"]
SOME_PATH = LATIN.map(lambda text: f"/{text}")


@st.composite
def requests(draw):
    """A request of which, mostly, the body is odd, and otherwise the headers, the path or the method."""
    odd = draw(st.sampled_from(["body"] * 6 + ["headers", "path", "method"]))
    method, path = "POST", draw(st.sampled_from(["/v1/completions"] * 8 + PATHS[:4]))
    headers = {"Host": "localhost", "Content-Type": "application/json"}
    if odd == "headers":
        headers |= {name: draw(HEADERS[name]) for name in draw(st.sets(st.sampled_from([*HEADERS]), max_size=3))}
    if odd == "path":
        method, path = draw(st.sampled_from(["GET", "POST"])), draw(st.sampled_from(PATHS + ODD_PATHS) | SOME_PATH)
    if odd == "method":
        method = draw(st.sampled_from(["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "X"]))
        path = draw(st.sampled_from(PATHS))
    return Request(method, path, headers, draw(BODIES) if method not in ("GET", "HEAD") else b"")


def wire(request):
    """A request as it goes over a socket."""
    headers = {"Content-Length": str(len(request.body))} | request.headers
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    path = "".join(c if "!" <= c <= "~" else f"%{ord(c):02X}" for c in request.path)
    return f"{request.method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + request.body


def made(strategy, count):
    """So many of what a strategy makes, always the same."""
    found = []

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=[*HealthCheck])  # fmt: skip
    @given(strategy)
    def take(value):
        found.append(value)

    take()
    return (found * (1 + count // len(found)))[:count]


# What was thought of: against limits, and against the reading of HTTP.
LONG = 2**22
THOUGHT_OF_BODIES = [
    b"", b"null", b"[]", b"{}", b"{" * 5000, b"[" * LONG, b'{"a":' * 100_000, b'"' + b"\\" * LONG, b"\x00" * 1000,
    b"\xef\xbb\xbf{}", '{"prompt": "A"}'.encode("utf-16"), b'{"prompt": "\\ud800"}', b'{"prompt": "A", "prompt": 5}',
    b'{"prompt": ' + b"9" * 5000 + b"}", b'{"max_tokens": 1' + b"0" * 100_000 + b"}", b'{"temperature": 1e999}',
    b'{"temperature": NaN}', b'{"top_p": -Infinity}', b'{"n": 1e2}', b'{"n": 128, "best_of": 128, "max_tokens": 1000}',
    as_bytes({"prompt": ["A"] * 3000}), as_bytes({"prompt": [[1]] * 2048, "best_of": 128, "max_tokens": 192}),
    as_bytes({"prompt": "A " * 10**6}), as_bytes({"prompt": [0] * 10**5}), as_bytes({"prompt": [[[[]]]]}),
    as_bytes({"prompt": "A", "stop": ["x" * 200] * 33}), as_bytes({"prompt": "A", "stop": "x" * LONG}),
    as_bytes({"prompt": "A", "logit_bias": {str(i): 1 for i in range(2000)}}), as_bytes({"prompt": [-1]}),
    as_bytes({"prompt": "A", "logit_bias": {"-1": 1, "1e3": 2, "9" * 500: 3}}), as_bytes({"prompt": [2**70]}),
    as_bytes({"prompt": "A", "logprobs": 10**9}), as_bytes({"prompt": "A", "logprobs": True}),
    as_bytes({"prompt": "A", "n_discard": -1, "n_predict": -1, "id_slot": 10**9, "truncate_prompt_tokens": -5}),
    as_bytes({"prompt": "A", "path": "/etc/passwd", "model": "../../../etc/passwd"}), as_bytes({"tokens": [1e300]}),
    as_bytes({"prompt": "A", "suffix": "B"}), as_bytes({"model": ["tiny"]}), as_bytes({"tokens": [-1, 520, 2**64]}),
    as_bytes({"tokens": [0] * 10**5}), as_bytes({"content": "\ud800"}), as_bytes({f"a{i}": i for i in range(10**5)}),
]  # fmt: skip
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GOOD = b'{"prompt": "A", "max_tokens": 1}'
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
LENGTH, CHUNKED = b"Content-Length: ", b"Transfer-Encoding: chunked\r\n"
WHOLE = POST + LENGTH + b"32\r\n\r\n" + GOOD
THOUGHT_OF_BYTES = [
    b"\x00" * 100, b"\r\n" * 50, b"\n", b"GET", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
    b"GET /" + b"a" * 10**5 + b" HTTP/1.1\r\n\r\n", GET + b"X: " + b"a" * 10**5 + b"\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\n\r\n", b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n", GET + b"Host: evil.example\r\n\r\n",
    b"GET /health HTTP/1.1\r\n Host: localhost\r\n\r\n", GET + b"X: y\r\n" * 5000 + b"\r\n",
    b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n", GET + b"no colon\r\n\r\n", GET + b"X: \x00\r\n\r\n",
    POST + LENGTH + b"-1\r\n\r\n" + GOOD, POST + LENGTH + b"32\r\n" + LENGTH + b"3\r\n\r\n" + GOOD,
    POST + LENGTH + b"99999999999\r\n\r\n" + GOOD, POST + LENGTH + b"1_0\r\n\r\n" + GOOD,
    POST + LENGTH + b"500\r\n\r\n" + GOOD, POST + LENGTH + b"3\r\n\r\n" + GOOD, POST + b"\r\n" + GOOD,
    POST + LENGTH + b"32\r\n" + CHUNKED + b"\r\n0\r\n\r\n", POST + CHUNKED + b"\r\n20\r\n" + GOOD + b"\r\n0\r\n\r\n",
    POST + CHUNKED + b"\r\nffffffffffffffff\r\n" + GOOD, POST + CHUNKED + b"\r\n-1\r\n", POST + CHUNKED + b"\r\nx\r\n",
    POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", POST + CHUNKED + b"\r\n20;" + b"x" * 10**5,
    POST + b"Expect: 100-continue\r\n" + LENGTH + b"32\r\n\r\n" + GOOD, 3 * WHOLE, WHOLE + b"\x00", WHOLE[:-1],
    POST + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 50 * (GET + b"\r\n"),
    GET + b"X-Forwarded-For: evil\r\nX-Forwarded-Host: evil.example\r\n\r\n", POST + LENGTH + b"9\r\n\r\n",
]  # fmt: skip


# ---- What may be answered


def check(request, status, kind, body, method):
    """An answer that is in order, or says what is wrong; `request` is shown where it is neither."""
    assert 200 <= status < 300 or status == 304 or 400 <= status < 500, (request, status, body)
    if method == "HEAD" or status in (204, 304):
        assert body == b"", request
        return
    kind = kind.partition(";")[0]
    assert kind == "application/json" or status < 400, (request, status, kind)
    if kind == "application/json":
        said = parse(body)
        if status >= 400:
            assert set(said["error"]) == {"message", "type", "param", "code"}, request
            assert isinstance(said["error"]["message"], str), request
            assert len(body) < 3000, request
    elif kind == "text/event-stream":
        *events, done, end = body.split(b"\n\n")
        assert (done, end) == (b"data: [DONE]", b""), request
        for event in events:
            assert "error" not in parse(event.removeprefix(b"data: ")), (request, event)
    else:
        assert kind in ("text/plain", "text/html", "text/css", "text/javascript"), (request, kind)


def parse(body):
    """JSON, in which there is no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON: {body[:200]}")

    return json.loads(body, parse_constant=refuse)


def resident(pid="self"):
    """Bytes of memory that a process has; 0 where the system doesn't say."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def settled(condition):
    """Whether something is so in the end."""
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# ---- The application by itself


def test_the_application_answers_all_and_is_as_before(model):
    served = app(model, "tiny", slots=8)

    def answer(request):
        headers = {name.replace("-", "_"): value for name, value in request.headers.items()}
        found = ask(served, request.method, request.path, request.body, **headers)
        check(request, found.status, found.headers.get("Content-Type", ""), found.body, request.method)
        return found.status

    usual = {"Host": "localhost", "Content-Type": "application/json"}
    thought_of = [Request("POST", path, usual, body) for body in THOUGHT_OF_BODIES for path in PATHS[:4]]
    asked = thought_of + made(requests(), APPLICATION_REQUESTS - len(thought_of))
    try:
        with ThreadPoolExecutor(4) as pool:
            statuses = [*pool.map(answer, asked[:WARM_UP], timeout=SECONDS)]
            gc.collect()
            memory, threads = resident(), threading.active_count()
            for start in range(WARM_UP, len(asked), 100):
                statuses += pool.map(answer, asked[start : start + 100], timeout=SECONDS)
            gc.collect()
            assert resident() - memory < GROWTH
            assert threading.active_count() <= threads
        loop = served.loop
        assert settled(lambda: (loop.running, loop.waiting, loop.slots_used, served.active) == (0, 0, 0, 0))
        assert loop.error is None
        assert (
            answer(Request("POST", "/v1/completions", {"Host": "localhost", "Content-Type": "application/json"}, GOOD))
            == 200
        )
    finally:
        served.close()
    assert len(statuses) == APPLICATION_REQUESTS
    assert statuses.count(200) > APPLICATION_REQUESTS // 10, "some of them are in order"
    assert {400, 403, 404, 405, 413, 415} <= {*statuses}


# ---- A server, by bytes


def method_of(data):
    return data.partition(b" ")[0].decode("latin-1")


def exchange(port, data):
    """The status, type and body of the first answer to bytes; None where none comes, since more is waited for."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        with suppress(ConnectionError):  # where it is refused before it was all sent, the answer says why
            connection.sendall(data)
        connection.settimeout(SILENCE)
        try:
            begun = connection.recv(1, socket.MSG_PEEK)
        except (TimeoutError, ConnectionError):
            begun = b""
        if not begun:
            return None
        connection.settimeout(SECONDS)
        response = http.client.HTTPResponse(connection, method=method_of(data))
        response.begin()
        return response.status, response.getheader("Content-Type", ""), response.read()


def test_a_server_answers_all_bytes_and_is_as_before(tiny):
    damaged_wire = damaged(requests().map(wire))
    count = SOCKET_REQUESTS - len(THOUGHT_OF_BYTES)
    asked = THOUGHT_OF_BYTES + made(requests().map(wire), count // 2) + made(damaged_wire, count - count // 2)
    with serving("-m", tiny, "--slots", "8") as server:

        def answer(data):
            found = exchange(server.port, data)
            if found:
                status, kind, body = found
                check(data, status, kind, body, method_of(data))
            return found and found[0]

        with ThreadPoolExecutor(24) as pool:
            statuses = [*pool.map(answer, asked[:WARM_UP], timeout=SECONDS)]
            memory, threads = resident(server.process.pid), server.threads
            statuses += pool.map(answer, asked[WARM_UP:], timeout=4 * SECONDS)
        assert resident(server.process.pid) - memory < GROWTH
        for name in ("requests_running", "requests_waiting", "slots_used"):
            assert settled(lambda name=name: server.metric(name) == 0)
        assert server.threads == threads
        assert server.ask("POST", "/v1/completions", {"prompt": "A language model", "max_tokens": 1}).status == 200
        assert server.end() == 0
        assert not any("Traceback" in line for line in server.log)
    assert len(statuses) == SOCKET_REQUESTS
    assert statuses.count(200) > SOCKET_REQUESTS // 20, "some of them are in order"
    assert statuses.count(None) < SOCKET_REQUESTS // 5, "few are only half of a request"
    assert {400, 403, 404, 405, 413, 415, 431} <= {*statuses}
