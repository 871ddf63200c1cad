"""Attacks on a server that listens on somebody's own machine, each with what it meets."""

import json
import sys

import pytest
from asking import ask, environ_of
from hypothesis import given, settings
from hypothesis import strategies as st

from npgpt2.serving import app
from npgpt2.serving.server.application import printable
from npgpt2.serving.server.guard import BODY_LIMIT, Guard, Refused, parse_strictly

BODY = {"prompt": "A", "max_tokens": 1}


@pytest.fixture(scope="module")
def served(model):
    made = app(model, "tiny", slots=4)
    yield made
    made.close()


@pytest.fixture(scope="module")
def locked(model):
    made = app(model, "tiny", api_keys=["secret", "schlüssel"], cors_origins=["https://friend.example", "null"])
    yield made
    made.close()


# ---- DNS rebinding: another's name leads here, and the browser takes this server for a part of that page


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "localhost@evil.example", "",
     "localhost, evil.example", "localhost:80:80", "[::1", "::1", "localhost:port", "localhost/", " localhost",
     "0.0.0.0", "localhost.", "LOCALHOST.EVIL", "192.168.0.1", "[::2]", "xn--localhost", "localhost:123456",
     "localhost\x00"],
)  # fmt: skip
def test_a_host_that_is_not_ours_is_refused(host, served):
    for method, path, body in (("GET", "/", b""), ("GET", "/v1/models", b""), ("POST", "/v1/completions", BODY)):
        answer = ask(served, method, path, body, Host=host)
        assert answer.status == 403
        assert "--allowed-host" in answer.error["message"]


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_a_host_that_is_ours_is_taken(host, served):
    assert ask(served, "GET", "/health", Host=host).status == 200


def test_a_host_that_is_missing_is_400(served):
    assert ask(served, "GET", "/health", Host=None).status == 400


def test_names_of_the_server_are_added(model):
    made = app(model, allowed_hosts=["box.LAN:80", "192.168.0.7", "fe80::1"])
    for host, status in (("BOX.lan:8000", 200), ("192.168.0.7", 200), ("[fe80::1]:80", 200), ("192.168.0.8", 403)):
        assert ask(made, "GET", "/health", Host=host).status == status
    anywhere = app(model, any_address=True)
    for host, status in (("10.0.0.1:8000", 200), ("[2001:db8::1]", 200), ("box.lan", 403), ("1", 403)):
        assert ask(anywhere, "GET", "/health", Host=host).status == status


# ---- Pages of others: requests that their scripts and forms make


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "file://", "http://localhost", "http://localhost:8001", "https://localhost:8000",
     "http://127.0.0.1:8000", "http://localhost:8000.evil.example", "http://localhost:8000/", "", "http://evil@localhost:8000"],
)  # fmt: skip
def test_an_origin_that_is_not_ours_is_refused(origin, served):
    """The server is called localhost:8000 here; what a browser calls another origin is another."""
    for method, path, body in (
        ("GET", "/v1/models", b""),
        ("POST", "/v1/completions", BODY),
        ("OPTIONS", "/tokenize", b""),
    ):
        answer = ask(served, method, path, body, Origin=origin)
        assert answer.status == 403
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_the_origin_of_our_own_page_is_taken(served):
    for host in ("localhost:8000", "127.0.0.1:80", "[::1]"):
        answer = ask(served, "POST", "/v1/completions", BODY, Origin=f"http://{host}", Host=host)
        assert answer.status == 200
        assert answer.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("origin", ["https://friend.example", "null"])
def test_scripts_of_pages_that_are_named_may_ask(origin, locked):
    asked = {"Origin": origin, "Access_Control_Request_Method": "POST"}
    wanted = "authorization,content-type,x-stainless-retry-count,x-stainless-os,openai-organization,cookie,x-evil"
    answer = ask(locked, "OPTIONS", "/v1/completions", Access_Control_Request_Headers=wanted, **asked)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    assert answer.headers["Vary"] == "Origin"
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert answer.headers["Access-Control-Allow-Headers"].split(", ") == wanted.split(",")[:5]
    assert "Access-Control-Allow-Credentials" not in answer.headers
    local = ask(locked, "OPTIONS", "/v1/models", Access_Control_Request_Private_Network="true", **asked)
    assert local.headers["Access-Control-Allow-Private-Network"] == "true"
    refused = ask(locked, "POST", "/v1/completions", BODY, Origin=origin)
    assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (401, origin)
    answer = ask(locked, "POST", "/v1/completions", BODY, Origin=origin, Authorization="Bearer secret")
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, origin)


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", None,
     "text/plain; application/json", "application/json-patch+json", "application/jsonp"],
)  # fmt: skip
def test_what_a_form_can_send_is_415(kind, served):
    for path in ("/v1/completions", "/tokenize", "/detokenize", "/inspect"):
        assert ask(served, "POST", path, BODY, Content_Type=kind).status == 415


def test_json_with_a_charset_is_json(served):
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert ask(served, "POST", "/v1/completions", BODY, Content_Type=kind).status == 200
    assert ask(served, "POST", "/v1/completions", BODY, Content_Encoding="gzip").status == 415


def test_answers_tell_browsers_not_to_guess_and_not_to_give_away(served, locked):
    for answer in (ask(served, "GET", "/v1/models"), ask(served, "GET", "/nothing"), ask(locked, "GET", "/metrics")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


# ---- Keys


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "secret", "Basic secret", "Bearer secret2", "Bearer secre",
     "Bearer \xff\xfe", "Bearer " + "x" * 10_000, "Bearer secret secret", "BearerXsecret"],
)  # fmt: skip
def test_without_a_key_nothing_is_told(given, locked):
    for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions"), ("POST", "/inspect")):
        answer = ask(locked, method, path, BODY if method == "POST" else b"", Authorization=given)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_with_a_key_all_is(locked):
    umlaut = "Bearer " + "schlüssel".encode().decode("latin-1")  # as servers hand on bytes
    for key in ("Bearer secret", "bearer secret", umlaut):
        assert ask(locked, "GET", "/v1/models", Authorization=key).status == 200
    for path in ("/health", "/"):
        assert ask(locked, "GET", path).status == 200


def test_keys_are_compared_as_hashes_each_of_them(monkeypatch):
    """So that the time tells neither how much of a key is right, nor how long it is, nor which it is."""
    compared = []

    def compare(one, other):
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("npgpt2.serving.server.guard.compare_digest", compare)
    guard = Guard.of(keys=["a", "b" * 100])
    guard.check_key({"HTTP_AUTHORIZATION": "Bearer a"})
    with pytest.raises(Refused):
        guard.check_key({"HTTP_AUTHORIZATION": "Bearer " + "b" * 99})
    assert compared == [(32, 32)] * 4


# ---- Bodies


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"null", b'"a"', b"{}{}", b"\xff", b'{"a": NaN}', b'{"temperature": Infinity}',
     b'{"temperature": -Infinity}', b'{"temperature": 1e999}', b'{"seed": ' + b"9" * 401 + b"}",
     b'{"max_tokens": ' + b"1" * 100_000 + b"}", b'{"temperature": 0.' + b"1" * 100_000 + b"}",
     b"[" * 100_000, b'{"a":' * 100_000, b"[" * 17 + b"]" * 17, b'{"prompt": ' + b"[" * 16 + b"]" * 16 + b"}",
     b'{"prompt": [' + b"1," * 300_000 + b"1]}", b'{"a": [' + b"[]," * 200_000 + b"1]}",
     b"{" + b'"a":1,' * 200_000 + b"}",
     b'"' * 1_000_000 + b"[" * 20, b'"' + b"\\" * 1_000_001, b'"\\"' * 300_000 + b"[" * 17],
    ids=lambda body: f"{body[:20]!r} of {len(body)}",
)  # fmt: skip
def test_what_is_no_sound_json_is_400(body, served):
    answer = ask(served, "POST", "/v1/completions", body, Content_Type="application/json")
    assert answer.status == 400
    assert len(answer.body) < 500


def test_bodies_are_bounded(served):
    whole = b'{"prompt": "A", "max_tokens": 1, "user": "%s"}'
    room = BODY_LIMIT - len(whole % b"")
    assert ask(served, "POST", "/v1/completions", whole % (b"x" * room)).status == 200
    assert ask(served, "POST", "/v1/completions", whole % (b"x" * (room + 1))).status == 413
    ended = {"wsgi.input_terminated": True}
    chunked = environ_of("POST", "/v1/completions", whole % b"x", Content_Length=None) | ended
    assert json.loads(b"".join(served(chunked, lambda *said: None)))["choices"]
    chunked = environ_of("POST", "/v1/completions", whole % (b"x" * (room + 1)), Content_Length=None) | ended
    assert b"has more than 2,097,152 bytes" in b"".join(served(chunked, lambda *said: None))
    for length in ("-1", "1e3", "x", "9" * 30, "٣"):
        assert ask(served, "POST", "/v1/completions", BODY, Content_Length=length).status in (400, 413)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 10**9), ("n", -1), ("best_of", 10**9), ("best_of", -1), ("max_tokens", 10**9), ("max_tokens", -1),
     ("logprobs", 10**6), ("logprobs", -1), ("stop", ["x"] * 33), ("stop", "x" * 201), ("stop_token_ids", [5] * 1025),
     ("stop_token_ids", [-1]), ("logit_bias", {str(i): 0 for i in range(1025)}), ("logit_bias", {"5": 1e300}),
     ("logit_bias", {"9" * 400: 1}), ("top_k", -1), ("seed", 2**63), ("seed", -(2**63) - 1), ("min_tokens", -1),
     ("no_repeat_ngram_size", -1), ("temperature", -1), ("temperature", 1e308 * 10), ("repetition_penalty", 0),
     ("model", 5), ("model", ["tiny"]),
     ("prompt", [["A"]]), ("prompt", ["A"] * 2049), ("prompt", [-1]), ("prompt", [10**300]), ("prompt", [[]])],
)  # fmt: skip
def test_numbers_and_lists_are_bounded_both_ways(field, value, served):
    text = json.dumps(BODY | {field: value}).encode()
    answer = ask(served, "POST", "/v1/completions", text)
    assert answer.status == 400
    assert answer.error["param"] == (None if b"Infinity" in text else field)
    assert len(answer.body) < 500


def test_products_are_bounded(served):
    many = {"prompt": [[5]] * 64, "n": 128, "max_tokens": 100, "ignore_eos": True}
    assert ask(served, "POST", "/v1/completions", many).error["param"] == "best_of"
    for body in (many | {"n": 64}, {"prompt": [[5]] * 20, "n": 20, "max_tokens": 100, "logprobs": 100},
                 {"prompt": [[5] * 150] * 100, "max_tokens": 1, "n": 30, "echo": True}):  # fmt: skip
        assert ask(served, "POST", "/v1/completions", body).error["param"] == "max_tokens"


def test_texts_that_take_long_to_read_are_read_in_little_time(served):
    """One word of a megabyte, which has no place in the window anyway."""
    assert ask(served, "POST", "/v1/completions", {"prompt": "a" * 10**6}).status == 400
    assert ask(served, "POST", "/inspect", {"prompt": "a" * 10**6}).status == 400
    assert ask(served, "POST", "/tokenize", {"prompt": "a" * 2**19}).json["count"] > 2**17
    assert ask(served, "POST", "/tokenize", {"prompt": "a" * (2**19 + 1)}).status == 400


def test_halves_of_surrogate_pairs_are_text(served):
    body = rb'{"prompt": "\ud800 \udfff", "stop": "\ud800", "user": "\ud800", "max_tokens": 2, "echo": true}'
    answer = ask(served, "POST", "/v1/completions", body)
    assert answer.status == 200
    assert answer.json["choices"][0]["text"].startswith("\ufffd \ufffd")
    assert ask(served, "POST", "/v1/completions", rb'{"model": "\ud800"}').status == 404


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "prompt max_tokens temperature top_k n best_of logprobs echo stop logit_bias seed stream stream_options content"
)
FIELDS += " stop_token_ids tokens with_pieces parse_special return_token_ids"
PATHS = ["/v1/completions", "/tokenize", "/detokenize", "/inspect", "/v1/chat/completions"]


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from(PATHS), body=st.dictionaries(st.sampled_from(FIELDS.split()), VALUES, max_size=4))
def test_whatever_a_body_says_the_answer_is_sound(served, path, body):
    answer = ask(served, "POST", path, {"max_tokens": 1} | body)
    assert 200 <= answer.status < 500
    if answer.headers["Content-Type"] == "application/json":
        assert answer.json


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet='{}[]",:\\ 10.eaN', max_size=30))
def test_json_is_what_python_says_it_is(text):
    try:
        expected = json.loads(text, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        with pytest.raises(ValueError):  # noqa: PT011, whatever it says
            parse_strictly(text)
    else:
        found = parse_strictly(text) if "e" not in text else expected
        assert found == expected


# ---- What is written and sent


def test_nothing_in_a_request_makes_a_line_of_the_log(model):
    lines = []
    made = app(model, log=lines.append)
    path = "/a\r\n2026-11-29 12:00:00 127.0.0.1 GET /forged 200\x1b[2J\x9b\u2028 \"'\\"
    assert ask(made, "GET", path).status == 404
    assert ask(made, "G\nET", "/health").status == 405
    assert len(lines) == 2
    for line in lines:
        assert line.isascii()
        assert line.isprintable()
        assert len(line.split(" ")) == 6
    assert printable("/é x") == r"/\xe9 x".replace(" ", r"\x20")


def test_the_log_has_what_how_long_and_tokens_but_no_text_unless_that_is_wanted(model):
    for shown in (False, True):
        lines = []
        made = app(model, log=lines.append, log_prompts=shown)
        body = {"prompt": ["A language model", "é\n"], "max_tokens": 3, "ignore_eos": True}
        assert ask(made, "POST", "/v1/completions", body).status == 200
        made.close()
        (line,) = lines
        assert line.startswith("127.0.0.1 POST /v1/completions 200 0.")
        assert " s 5 + 6 tokens, " in line
        assert line.partition(" tokens/s")[2] == (r' ["A language model", "\u00e9\n"]' if shown else "")


def test_no_answer_tells_of_the_machine(served):
    """Neither paths nor what a traceback would show, nor which program answers."""
    for method, path, body in (
        ("GET", "/v1/models", b""),
        ("POST", "/v1/completions", BODY),
        ("GET", "/../../etc", b""),
    ):
        answer = ask(served, method, path, body)
        said = answer.body.decode() + str(answer.headers)
        for word in ("Traceback", "/tmp", sys.prefix, "Python", "waitress"):
            assert word not in said


def test_a_header_that_is_no_text_does_no_harm(served):
    environ = environ_of(
        "GET", "/health", Authorization="\xff\x80", If_None_Match='"\r\nX: y"', X_Forwarded_Host="evil"
    )
    assert list(served(environ, lambda status, headers: None)) == [b'{"status": "ok"}']
