"""Who may ask, and what may be in a request, before anything is done about it.

A server on this machine can be reached by every page that its user's browser shows. A page whose own name leads here
(DNS rebinding) gives itself away by the `Host` header, and one of somebody else's by `Origin`; a form, which a browser
sends without asking, can't have the `Content-Type` of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from hashlib import sha256
from hmac import compare_digest
from ipaddress import ip_address
from math import isfinite
from typing import Any, NamedTuple, NoReturn

import regex

from npgpt2.files import VALUES_LIMIT, parse_json_object

Environ = dict[str, Any]

# Bytes of a request's body. As many values as JSON may have take less, as the ids of tokens.
BODY_LIMIT = 2**21
# Digits of a number in JSON, and brackets within each other: more than any field has.
DIGITS_LIMIT, NESTING_LIMIT = 400, 16
LOCAL = ("localhost", "127.0.0.1", "::1")
# What of JSON opens and closes; strings, also those without an end, are passed over whole.
_BRACKETS = regex.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', regex.DOTALL)
_ORIGIN = regex.compile(r"[a-z][a-z0-9+.-]*://[^/*\s]+")
_HOST = regex.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:,/@*\s]+))(?::[0-9]{1,5})?")


class Refused(Exception):
    """A request that isn't answered as it wants: the status, what is wrong, and what else an error's body says."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = ()
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: list[tuple[str, str]] = [*headers]


class Guard(NamedTuple):
    """Who may ask.

    hosts: by which names the server may be called, in lower case · any_address: whether by every address as well, which
    nobody else's page can have · origins: whose scripts may ask, beside the server's own · keys: hashes of those of
    which one is to be given, if there are any
    """

    hosts: frozenset[str]
    any_address: bool
    origins: frozenset[str]
    keys: tuple[bytes, ...]

    @classmethod
    def of(
        cls, hosts: Iterable[str] = (), any_address: bool = False, origins: Iterable[str] = (), keys: Iterable[str] = ()
    ) -> Guard:
        """hosts: beside those of this machine to itself · keys: as they are"""
        names, said = [], [origin.lower() for origin in origins]
        for host in (*LOCAL, *hosts):
            if not (_is_address(host) or _HOST.fullmatch(host)):
                raise ValueError(f"{host!r} is no name of a server, such as box.example or 10.0.0.1")
            names.append(host.lower() if _is_address(host) else _name_in(host))
        for origin in said:
            if origin != "null" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin, such as https://example.org; null is that of files")
        return cls(
            frozenset(names),
            any_address,
            frozenset(said),
            tuple(sha256(key.encode("utf-8")).digest() for key in keys),
        )

    def check_host(self, environ: Environ) -> None:
        """`Refused` where the server isn't called by one of its names."""
        said = environ.get("HTTP_HOST")
        if said is None:
            raise Refused(400, "the header Host is missing")
        name = _name_in(said)
        if name not in self.hosts and not (self.any_address and _is_address(name)):
            raise Refused(403, f"Host is {said[:100]!r}, which is no name of this server; --allowed-host adds names")

    def check_origin(self, environ: Environ) -> str | None:
        """The page on which a script asks, if it isn't one of the server's own; `Refused` where it mayn't."""
        origin = environ.get("HTTP_ORIGIN")
        own = f"{environ.get('wsgi.url_scheme', 'http')}://{environ.get('HTTP_HOST', '')}"
        if origin is None or origin.lower() == own.lower():
            return None
        if origin.lower() not in self.origins:
            raise Refused(403, f"Origin is {origin[:100]!r}, whose scripts may not ask; --cors-origin adds origins")
        return str(origin)

    def check_key(self, environ: Environ) -> None:
        """`Refused` where a key is wanted and none of ours is given. How long it takes says nothing of the keys."""
        if not self.keys:
            return
        scheme, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        hashed = sha256(given.strip().encode("latin-1", "replace")).digest()
        known = [compare_digest(hashed, key) for key in self.keys]
        if scheme.lower() != "bearer" or not any(known):
            wanted = [("WWW-Authenticate", "Bearer")]
            raise Refused(401, "a key is wanted: Authorization: Bearer KEY", code="invalid_api_key", headers=wanted)


def _name_in(host: str) -> str:
    """The name in what a `Host` header says, without a port; an empty one where there is none."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found else ""


def _is_address(name: str) -> bool:
    try:
        return bool(ip_address(name))
    except ValueError:
        return False


# ---- Bodies


def read_body(environ: Environ) -> bytes:
    """A request's body; `Refused` where it isn't said to be JSON, or is too large."""
    kind = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"Content-Type is {kind[:100]!r}, where application/json is expected")
    if environ.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
        raise Refused(415, "Content-Encoding: a body is expected as it is")
    # Without a length, a body is in chunks, of which some servers say themselves where they end.
    unsaid = str(BODY_LIMIT + 1) if environ.get("wsgi.input_terminated") else "0"
    size = environ.get("CONTENT_LENGTH") or unsaid
    if not (size.isascii() and size.isdigit() and len(size) < 20):
        raise Refused(400, "Content-Length is no number")
    data: bytes = environ["wsgi.input"].read(min(int(size), BODY_LIMIT + 1))
    if len(data) > BODY_LIMIT:
        raise Refused(413, f"the body has more than {BODY_LIMIT:,} bytes")
    return data


def parse_body(data: bytes) -> dict[str, Any]:
    """What a body says, a JSON object; `Refused` where it is none."""
    try:
        return parse_json_object(data, "the body", VALUES_LIMIT, parse_strictly)
    except ValueError as error:
        raise Refused(400, str(error)) from None


def parse_strictly(text: str) -> Any:
    """What JSON says, if it is JSON: no NaN, no number that is too large, nothing nested without end.

    >>> parse_strictly('{"a": [1.5]}')
    {'a': [1.5]}
    >>> parse_strictly("[NaN]")
    Traceback (most recent call last):
    ...
    ValueError: NaN is no JSON
    """
    depth = 0
    for found in _BRACKETS.finditer(text):
        if found[0] in ("[", "{"):
            depth += 1
        elif found[0] in ("]", "}"):
            depth -= 1
        if depth > NESTING_LIMIT:
            raise ValueError(f"more than {NESTING_LIMIT} brackets within each other")
    return json.loads(text, parse_constant=_no_constant, parse_int=_whole, parse_float=_number)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _whole(text: str) -> int:
    if len(text) > DIGITS_LIMIT:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _number(text: str) -> float:
    if len(text) > DIGITS_LIMIT or not isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is too large")
    return number


# ---- Scripts of other pages

ALLOWED_HEADERS = ("authorization", "content-type", "accept", "openai-", "x-stainless-", "x-request-id", "x-api-key")


def cors_headers(environ: Environ, origin: str | None) -> list[tuple[str, str]]:
    """What lets a script of another page read the answer. origin: as `Guard.check_origin` found it"""
    if origin is None:
        return [("Vary", "Origin")]
    shown = "X-Request-Id, Retry-After"
    return [("Vary", "Origin"), ("Access-Control-Allow-Origin", origin), ("Access-Control-Expose-Headers", shown)]


def preflight_headers(environ: Environ, methods: Collection[str]) -> list[tuple[str, str]]:
    """What a browser wants to know before it sends what a script asks."""
    wanted = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "").lower().split(",")
    names = [name.strip() for name in wanted if regex.fullmatch(r"\s*[a-z0-9-]{1,60}\s*", name)]
    allowed = [name for name in names if name.startswith(ALLOWED_HEADERS)][:50]
    headers = [("Access-Control-Allow-Methods", ", ".join(methods)), ("Access-Control-Max-Age", "600")]
    headers += [("Access-Control-Allow-Headers", ", ".join(allowed))] if allowed else []
    if environ.get("HTTP_ACCESS_CONTROL_REQUEST_PRIVATE_NETWORK") == "true":
        headers.append(("Access-Control-Allow-Private-Network", "true"))
    return headers
