"""Server-sent events: how a completion is streamed over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from npgpt2.serving.chunks import Chunks
from npgpt2.serving.server.loop import Job

TYPE = "text/event-stream; charset=utf-8"
# After so many seconds of silence, a comment says that there is somebody, and finds out whether there still is.
PATIENCE = 15.0


def event(body: dict[str, Any]) -> bytes:
    r"""One event.

    >>> event({"text": "é"})
    b'data: {"text": "\\u00e9"}\n\n'
    """
    return b"data: " + json.dumps(body, allow_nan=False).encode("ascii") + b"\n\n"


def events(job: Job, chunks: Chunks, error_of: Callable[[Exception], dict[str, Any]]) -> Iterator[bytes]:
    """A completion as events, the last of which is `[DONE]`. error_of: the body that tells of an error"""
    try:
        for batch in job.events(PATIENCE):
            if not batch:
                yield b": still here\n\n"
            said = b"".join(
                event(chunk) for number, one in batch if one.token is not None for chunk in chunks.of(number, one)
            )
            if said:
                yield said
        if chunks.completion.stream_usage:
            yield event(chunks.usage())
    except Exception as error:  # the headers are out, so that it can't have a status
        yield event(error_of(error))
    finally:
        job.cancel()
    yield b"data: [DONE]\n\n"
