"""The file of answers: whole lines, added at its end, and what is there when a run begins.

A line begins with the mark of the request that it answers, so that a later run knows what there is without reading all
of it. It is written at once, with those that came in the same second, and the disk is waited for, so that whatever ends
a run costs no more than that second. What a kill, a full disk or a power cut can leave behind is a last line without an
end, or a part that the disk never got, of zeros: from there on, all is cut off.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import regex

from npgpt2.files import PIECE, lock, naming_full_disk
from npgpt2.serving.lines import Line

# Seconds between two times that the disk is waited for, which takes it some milliseconds; or bytes, if they come first.
STEP, STEP_BYTES = 1.0, 2**18
_HEAD = regex.compile(
    rb'\{"id": "batch_req_([0-9a-f]{16})", "custom_id": (?:null|"(?:[^"\\]|\\.)*"), "response": \{"status_code": (\d+),'
)
_FINGERPRINT = regex.compile(rb'"system_fingerprint": "fp_([0-9a-f]+)"')


def answer_line(line: Line, status: int, body: dict[str, Any]) -> bytes:
    """A line of the file, as OpenAI's batches have them."""
    mark = f"{line.mark:016x}"
    response = {"status_code": status, "request_id": f"req_{mark}", "body": body}
    said = {"id": f"batch_req_{mark}", "custom_id": line.custom_id, "response": response, "error": None}
    return json.dumps(said, allow_nan=False).encode() + b"\n"


class Found(NamedTuple):
    """What a file holds: the marks of what is answered, (N,) uint64, how many of those are errors, the model's
    fingerprint where an answer says it, and at which byte the last whole line ends.
    """

    marks: npt.NDArray[np.uint64]
    errors: int
    fingerprint: str | None
    end: int


class Answers:
    """A file of answers that lines are added to, as long as it is entered; nobody else can meanwhile.

    OSError where it can't be written to, ValueError where another run is about it.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: is no file that lines can be added to")
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by `__exit__`
        if not lock(self._file):
            self._file.close()
            raise ValueError(f"{path}: is being written by another run")
        self._pending = bytearray()
        self._size = os.fstat(self._file.fileno()).st_size
        self._synced = monotonic()

    def find(self) -> Found:
        """What is there already; ValueError where that is anything but answers of a batch. Nothing is changed."""
        marks, errors, fingerprint, end = array("Q"), 0, None, 0
        with open(self.path, "rb") as file:
            for number, (head, size, whole) in enumerate(_heads(file), 1):
                if not whole:
                    if not _HEAD.match(head.partition(b"\0")[0], partial=True):
                        raise self._foreign(number)
                    break
                if not (said := _HEAD.match(head)):
                    raise self._foreign(number)
                marks.append(int(said[1], 16))
                errors += said[2] != b"200"
                if fingerprint is None and (named := _FINGERPRINT.search(head)):
                    fingerprint = named[1].decode()
                end += size
        return Found(np.frombuffer(marks, np.uint64) if marks else np.zeros(0, np.uint64), errors, fingerprint, end)

    def _foreign(self, number: int) -> ValueError:
        return ValueError(f"{self.path}: line {number} is no answer of npgpt2 batch; give another file with -o")

    def cut(self, size: int) -> None:
        """Leave no more than so many bytes of the file."""
        self._file.truncate(size)
        self._size = size

    def write(self, line: Line, status: int, body: dict[str, Any]) -> None:
        """Add an answer, which is in the file within a second if `sync` is called all along."""
        self._pending += answer_line(line, status, body)
        self.sync()

    def sync(self, now: bool = False) -> None:
        """Write what has come since the last time, and wait for the disk; where that was just now, do nothing."""
        due = now or len(self._pending) >= STEP_BYTES or monotonic() - self._synced >= STEP
        if not self._pending or not due:
            return
        data, written, self._pending = self._pending, 0, bytearray()
        if os.stat(self.path).st_size != self._size:
            raise ValueError(f"{self.path}: was changed by another program meanwhile; run again to go on")
        try:
            with naming_full_disk(self.path):
                while written < len(data):
                    written += self._file.write(memoryview(data)[written:])
                os.fsync(self._file.fileno())
        except BaseException:
            with suppress(OSError):  # otherwise the next run cuts it
                self._file.truncate(self._size + data.rfind(b"\n", 0, written) + 1)
            raise
        self._size, self._synced = self._size + written, monotonic()

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self.sync(now=True)


def _heads(file: BinaryIO) -> Iterator[tuple[bytes, int, bool]]:
    """Of each line its beginning, its size, and whether it is whole: it has an end, and no zeros."""
    while head := file.readline(PIECE):
        size, piece, whole = len(head), head, b"\0" not in head
        while not piece.endswith(b"\n") and (piece := file.readline(PIECE)):
            size, whole = size + len(piece), whole and b"\0" not in piece
        yield head, size, whole and piece.endswith(b"\n")
