"""OpenAI's released GPT-2 checkpoints, fetched over HTTP so that a broken connection costs nothing but time.

What has arrived of a file lies beside it as `NAME.part` and takes the file's name once it is complete and on disk;
until then every try, in this run of the program or a later one, goes on where the last one stopped. What can be seen to
be damaged is fetched again. Turning a checkpoint into a model file is not done here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from time import sleep
from typing import NoReturn
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from npgpt2.bars import Bar
from npgpt2.checks import as_path, wrong_type
from npgpt2.convert.checkpoint import Checkpoint, latest
from npgpt2.files import naming_full_disk, read_bounded
from npgpt2.models import ALIASES, MODELS
from npgpt2.weights import parse_hparams

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
# The vocabulary is the same for all models.
SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# Those with a known hash come first: a login page that answers in the server's place is found out before any file
# is kept.
PREFIX = "model.ckpt"
INDEX, META, DATA = f"{PREFIX}.index", f"{PREFIX}.meta", f"{PREFIX}.data-00000-of-00001"
FILES = (*SHA256, "checkpoint", "hparams.json", INDEX, META, DATA)

PAUSES = (1, 2, 4, 8, 16)  # seconds before each further try
TIMEOUT = 30  # seconds without a byte
CHUNK = 2**18
# A connection that breaks each time before this many new bytes will not bring a whole checkpoint either.
PROGRESS = 2**16
# 18 digits are plenty, and Python refuses to parse numbers of thousands.
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


class _BrokenTry(ConnectionError):
    """A failure that another try may get past."""


def fetch_checkpoint(name: str, folder: str | Path, base_url: str = BASE_URL) -> None:
    """Fetch the checkpoint `name`, one of `MODELS` or `ALIASES`, into `folder`, which is for this model alone.

    Files that are already there are kept, unless they are damaged. A server that can't be reached or breaks off again
    and again raises OSError, and calling once more goes on where that stopped. An unknown name, a URL that isn't http
    or https, or a file that arrives damaged twice raises ValueError.

    >>> fetch_checkpoint("125M", Path("models"))
    Traceback (most recent call last):
    ...
    ValueError: no GPT-2 model is called '125M'; choose from 124M, 355M, 774M, 1558M, or the older names 117M, 345M
    """
    folder = as_path("folder", folder)
    for argument, value in (("name", name), ("base_url", base_url)):
        if not isinstance(value, str):
            raise wrong_type(argument, value, "a string")
    model = ALIASES.get(name, name)
    if model not in MODELS:
        choices = f"choose from {', '.join(MODELS)}, or the older names {', '.join(ALIASES)}"
        raise ValueError(f"no GPT-2 model is called {name!r}; {choices}")
    if not re.match("https?://[^/]", base_url, re.IGNORECASE):
        raise ValueError(f"{base_url!r} can't be downloaded from; give a URL like {BASE_URL}")
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        fetch_file(f"{base_url.rstrip('/')}/{model}/{file}", folder / file)


def remove_checkpoint(folder: str | Path) -> None:
    """Delete the files that `fetch_checkpoint` put into `folder`, and the folder itself if nothing else is in it."""
    folder = as_path("folder", folder)
    for file in FILES:
        (folder / file).unlink(missing_ok=True)
    # A folder that isn't empty, or is a link to one elsewhere, is the user's.
    with contextlib.suppress(OSError):
        folder.rmdir()


def fetch_file(url: str, path: Path, pauses: tuple[float, ...] = PAUSES) -> None:
    """Fetch `url` to `path` unless that exists; what fails its check, also of what is there, is fetched again, once.

    A connection that breaks is tried again after each of the `pauses` (seconds). These start anew when a try brought
    the file `PROGRESS` bytes further than it has ever been in this call, so a slow connection may break as often as it
    likes, but no server can keep this going without getting anywhere.
    """
    for again in (True, False):
        if not path.exists():
            _fetch(url, path, pauses)
        try:
            return check(path)
        except ValueError as error:
            path.unlink()
            if not again:
                advice = f"{url} sent it damaged, and it was deleted; try again later, or another server (--base-url)"
                raise ValueError(f"{error}; {advice}") from None


def _fetch(url: str, path: Path, pauses: tuple[float, ...]) -> None:
    """Fetch `url` to `path`, which isn't there."""
    with Bar(desc=path.name, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        transfer = _Transfer(url, path.with_name(f"{path.name}.part"), bar)
        furthest, failures = 0, 0
        while True:
            try:
                transfer.attempt()
                break
            except _BrokenTry as error:
                if transfer.size() >= furthest + PROGRESS:
                    furthest, failures = transfer.size(), 0
                if failures == len(pauses):
                    advice = "run the same command again to go on where it stopped"
                    raise ConnectionError(f"{url}: {error}, after {failures + 1} tries; {advice}") from None
                bar.set_postfix_str(f"trying again in {pauses[failures]} s: {error}")
            sleep(pauses[failures])
            failures += 1
    with naming_full_disk(transfer.part), open(transfer.part, "ab") as file:
        os.fsync(file.fileno())
    os.replace(transfer.part, path)


def check(path: Path) -> None:
    """Raise ValueError where one of a checkpoint's files can be seen to be damaged, by its hash if that is known, or
    by what it and those that were fetched before it say.
    """
    name, checkpoint = path.name, path.with_name(PREFIX)
    if name in SHA256:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != SHA256[name]:
            raise ValueError(f"{name}: SHA-256 is {digest.hexdigest()}, where {SHA256[name]} is expected")
    elif name == "checkpoint":
        found = None
        with contextlib.suppress(ValueError):
            found = latest(path)
        if found != PREFIX:
            raise ValueError(f"{path}: doesn't name {PREFIX!r}, which is beside it")
    elif name == "hparams.json":
        parse_hparams(read_bounded(path), str(path))
    elif name == INDEX:
        Checkpoint(checkpoint)
    elif name == DATA:
        opened = Checkpoint(checkpoint)
        for variable in opened.entries:
            if variable.startswith("model/"):
                opened.read(variable)


@dataclass
class _Transfer:
    """One file on its way: `part` holds what has arrived, `total` is the length that the last answer promised."""

    url: str
    part: Path
    bar: Bar
    total: int | None = None

    def size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def attempt(self) -> None:
        """Ask for what is missing and append it to `part`, which is complete when this returns."""
        offset = self.size()
        headers = {"User-Agent": "npgpt2"} | ({"Range": f"bytes={offset}-"} if offset else {})
        try:
            response = urlopen(Request(self.url, headers=headers), timeout=TIMEOUT)
        except HTTPError as error:
            with error:
                return self._refused(error, offset)
        except (InvalidURL, UnicodeError) as error:
            raise ValueError(f"{self.url!r} is not a valid URL ({error}); check the base URL") from None
        except (OSError, HTTPException) as error:
            raise _BrokenTry(_reason(error)) from None
        with response:
            offset = self._promised(response, offset)
            self.bar.set_postfix_str("", refresh=False)
            self.bar.reset(self.total)
            # What was there before is no part of this connection's speed.
            self.bar.initial = self.bar.n = self.bar.last_print_n = offset
            self.bar.refresh()
            # Reading has a `try` of its own, so that an error from writing, such as a full disk, is never retried.
            with naming_full_disk(self.part), open(self.part, "ab" if offset else "wb") as file:
                while True:
                    try:
                        # read1 hands over what is there, where read would lose it if the connection broke.
                        chunk = response.read1(CHUNK)
                    except (OSError, HTTPException) as error:
                        raise _BrokenTry(_reason(error)) from None
                    if not chunk:
                        break
                    file.write(chunk)
                    self.bar.update(len(chunk))
        size, total = self.size(), self.total or 0
        if size > total:
            self._start_over(f"{self.part} has {size:,} bytes, where {total:,} are expected")
        if size < total:
            raise _BrokenTry(f"the connection broke after {size:,} of {total:,} bytes")

    def _refused(self, error: HTTPError, offset: int) -> None:
        """Return if `part` turns out to be complete, raise otherwise."""
        if error.code == 416 and offset:
            content_range = error.headers.get("Content-Range")
            if content_range != f"bytes */{offset}" or self.total not in (None, offset):
                self._start_over(f"the server says that {offset:,} bytes are too many ({content_range!r})")
        elif error.code in (408, 429) or error.code >= 500:
            raise _BrokenTry(f"the server answered with status {error.code}")
        else:
            advice = "the name may be wrong on this mirror" if error.code == 404 else "check the base URL"
            raise OSError(f"{self.url}: the server answered with status {error.code}; {advice}")

    def _promised(self, response: HTTPResponse, offset: int) -> int:
        """Return the offset at which the answer's bytes belong, and set `total`."""
        if response.status not in (200, 206) or response.length is None:
            what = f"status {response.status} and Content-Length {response.headers.get('Content-Length')!r}"
            raise OSError(f"{self.url}: the server answered with {what}, where a file is expected; try another server")
        if response.status == 200:
            self.total = response.length
            return 0
        content_range = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(content_range)
        start, end, total = map(int, match.groups()) if match else (-1, -1, -1)
        fits = start == offset and end - start + 1 == response.length
        if not fits or self.total not in (None, total):
            asked = f"{offset} of {self.total or 'unknown'}"
            self._start_over(f"asked to go on at byte {asked}, the server sent {content_range!r}")
        self.total = total
        return start

    def _start_over(self, reason: str) -> NoReturn:
        self.part.unlink(missing_ok=True)
        raise _BrokenTry(reason)


def _reason(error: Exception) -> str:
    """The cause of a failed connection, without urllib's wrapping."""
    return str(getattr(error, "reason", error)) or type(error).__name__
