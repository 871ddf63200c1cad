"""A file of requests, one to a line, as often as it has to be read: OpenAI's batch files, or plain prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, BinaryIO, NamedTuple

from npgpt2.engine.engine import Model
from npgpt2.files import decode_utf8, parse_json_object
from npgpt2.serving.protocol import BadRequest, Completion, parse_completion

# The largest request that fits into a window takes less, as a text or as ids.
LINE_LIMIT = 2**22
CUSTOM_ID_LIMIT = 512
URL = "/v1/completions"


class Line(NamedTuple):
    """A line of a file of requests.

    number: which, from 1 on · mark: 64 bits that stand for the request, by this model · custom_id: its name, where it
    has one · key: 64 bits that stand for the name, and draw its text where it has no seed · completion: what is asked
    for, or problem: what is wrong with it; neither where the line is empty
    """

    number: int
    mark: int
    custom_id: str | None = None
    key: int = 0
    completion: Completion | None = None
    problem: BadRequest | None = None


class Requests:
    """A file of requests. OSError where it can't be read, ValueError where it is none, or the settings are wrong.

    model: who is to answer, and names: what requests may call it · fingerprint: of its contents · settings: a body
    without a prompt, if each line is a prompt and nothing else
    """

    def __init__(
        self,
        path: Path,
        model: Model,
        names: list[str],
        fingerprint: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self._model, self._names = model, names
        self._said = json.dumps(settings, sort_keys=True).encode("ascii")
        self._settings: dict[str, Any] | None = json.loads(self._said)
        if self._settings is not None:  # which would be wrong in every line
            parse_completion({**self._settings, "prompt": [0]}, model)
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: is no file; its lines are read twice, so write them to one")

    def lines(self, progress: Callable[[int], object] = lambda bytes: None) -> Iterator[Line]:
        """All lines, also those that are empty or wrong. progress: called with the bytes that each took"""
        with open(self.path, "rb") as file:
            for number, (data, size) in enumerate(bounded_lines(file, LINE_LIMIT), 1):
                yield self._parse(number, data)
                progress(size)

    def _parse(self, number: int, data: bytes | None) -> Line:
        if data is None:
            problem = BadRequest(f"has more than {LINE_LIMIT:,} bytes")
            return Line(number, salted(0, number), problem=problem)
        if self._settings is None and not data.strip():
            return Line(number, salted(0, number))
        line = Line(number, hash64(self.fingerprint.encode(), self._said, data))
        if self._settings is not None:  # the same prompt may stand in several lines
            line = line._replace(mark=salted(line.mark, number))
        try:
            said = self._read(number, data)
        except ValueError as error:
            return line._replace(mark=salted(line.mark, number), problem=BadRequest(str(error)))
        custom_id = said.get("custom_id")
        if isinstance(custom_id, str) and 0 < len(custom_id) <= CUSTOM_ID_LIMIT:
            line = line._replace(custom_id=custom_id, key=hash64(custom_id.encode("utf-8", "surrogatepass")))
        try:
            if line.custom_id is None:
                expected = f"a text of 1 to {CUSTOM_ID_LIMIT} characters is expected"
                raise BadRequest(f"custom_id is {shortened(custom_id)}, where {expected}", "custom_id")
            for name, expected in (("method", "POST"), ("url", URL)):
                if said.get(name) != expected:
                    raise BadRequest(f"{name} is {shortened(said.get(name))}, where {expected!r} is expected", name)
            completion = parse_completion(said.get("body"), self._model, line.key, self._names)
            if completion.stream:
                raise BadRequest("stream is True, where a batch's answers come whole", "stream")
            return line._replace(completion=completion)
        except BadRequest as problem:
            return line._replace(mark=salted(line.mark, number), problem=problem)

    def _read(self, number: int, data: bytes) -> dict[str, Any]:
        """What a line says, a prompt by itself as if it stood in a request."""
        if self._settings is None:
            return parse_json_object(data, "the line")
        # A byte order mark, which this leaves out, can only be before the first.
        prompt = decode_utf8(data, "the line") if number == 1 else data.decode("utf-8")
        body = {**self._settings, "prompt": prompt.removesuffix("\r")}
        return {"custom_id": f"line-{number}", "method": "POST", "url": URL, "body": body}


def bounded_lines(file: BinaryIO, limit: int) -> Iterator[tuple[bytes | None, int]]:
    """A file's lines without their ends, and how many bytes each took; None for one of more than `limit` bytes."""
    while data := file.readline(limit + 1):
        size = len(data)
        if size <= limit or data.endswith(b"\n"):
            yield data.removesuffix(b"\n"), size
            continue
        while not data.endswith(b"\n") and (data := file.readline(limit)):
            size += len(data)
        yield None, size


def hash64(*parts: bytes) -> int:
    """64 bits that stand for these bytes.

    >>> hash64(b"a", b"b") == hash64(b"a", b"b") != hash64(b"ab", b"")
    True
    """
    hashed = blake2b(digest_size=8)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(hashed.digest(), "little")


def salted(mark: int, number: int) -> int:
    """The mark of what isn't known by its contents alone, as a prompt, or one of two lines that are wrong alike."""
    return hash64(mark.to_bytes(8, "little"), number.to_bytes(8, "little"))
