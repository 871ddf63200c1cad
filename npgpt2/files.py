"""Files that may be hostile are read within bounds; files that are written appear whole or not at all.

Used by everything that touches the disk. It knows nothing of models.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl

    HAS_LOCKS = True
except ImportError:  # Windows, where a file that is open can't be deleted
    HAS_LOCKS = False

# The largest real one is a vocabulary of 50,257 entries, 1 MB.
TEXT_FILE_LIMIT = 32 * 2**20
# How many values JSON may have, by the commas, colons and brackets in it, none of which stands for more than 90 bytes
# of memory. A vocabulary of 50,257 tokens and its merges have 250,000 in `tokenizer.json`; no other file has 20,000.
VALUES_LIMIT = 2**18
VOCABULARY_VALUES_LIMIT = 2**21
# What some editors put before a text in UTF-8 to say that it is. It is no part of the text.
BYTE_ORDER_MARK = "\ufeff"
# Bytes of a text that are read at once.
PIECE = 2**16


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the name `path` only when it is complete and on disk.

    The bytes go to a temporary name in the same folder. When the block ends normally they are flushed to disk and
    renamed to `path`; when it raises, they are removed and what `path` held before is untouched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "greeting.txt") as file:
    ...         _ = file.write(b"hello")
    ...     os.listdir(folder)
    ['greeting.txt']
    """
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, where a file is to be written")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path}: is a device or a pipe, which can't be replaced by a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, to write {path.name} in")
    clear_left_behind(path)
    temporary = _new_name(path)
    try:
        while (file := _create_locked(temporary)) is None:
            temporary = _new_name(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if HAS_LOCKS:  # while it is locked; elsewhere, a file that is open can't be renamed
                os.replace(temporary, path)
        if not HAS_LOCKS:
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # it may be that this name can't be used at all
            temporary.unlink()
        if isinstance(error, OSError) and (str(error.filename) == str(temporary) or _is_full_disk(error)):
            error.filename = str(path)
        raise


def clear_left_behind(path: Path) -> None:
    """Remove what `replacing` has left of writers of this file that were killed; those that live are left alone.

    A writer that lives holds a lock on its file, which the system lets go of when it dies, wherever it runs. Where
    there are no such locks, a file that is open can't be removed, and one that was written to a minute ago isn't about
    to be renamed.
    """
    pattern = f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"
    for left in path.parent.glob(pattern):
        with suppress(OSError):
            if left.is_symlink() or not left.is_file():
                continue
            if not HAS_LOCKS:
                if time.time() - left.stat().st_mtime > 60:
                    left.unlink()
                continue
            with open(left, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def _new_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")


def _create_locked(path: Path) -> BinaryIO | None:
    """Create a file that nobody takes for one that was left behind; None where somebody did before it was locked."""
    file = open(path, "xb")  # noqa: SIM115, the caller closes it
    if lock(file) and path.exists():  # without locks, nothing is cleared either
        return file
    file.close()
    return None


def lock(file: BinaryIO) -> bool:
    """Lock a file for as long as it is open; False where another program has. Where there are no locks, True."""
    if HAS_LOCKS:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a disk without locks
            pass
    return True


def _is_full_disk(error: OSError) -> bool:
    return error.errno in (ENOSPC, EFBIG, EDQUOT)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Errors of a disk that is full say which file didn't fit; Python's don't."""
    try:
        yield
    except OSError as error:
        if _is_full_disk(error):
            error.filename = str(path)
        raise


def read_bounded(path: Path, limit: int = TEXT_FILE_LIMIT) -> bytes:
    """Read a whole file of at most `limit` bytes; a longer one raises ValueError."""
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: larger than the {limit:,} bytes that such a file can have")
    return data


def read_packaged(package: str, name: str) -> bytes:
    """A file that comes with a package, wherever Python has the package from: a folder, a zip file, memory.

    Raises FileNotFoundError, which says what to do, where its loader hasn't got the file, or doesn't give files out.
    """
    from importlib import resources  # here, since they take long to import and are seldom needed
    from pkgutil import get_data

    with suppress(OSError, ValueError):  # which Python 3.10 raises where a loader knows no resources
        return (resources.files(package) / name).read_bytes()
    with suppress(OSError):  # older loaders have no resources, but data by their place
        if (data := get_data(package, name)) is not None:
            return data
    raise FileNotFoundError(f"{name} of {package} can't be read from where that was loaded; install npgpt2 in a folder")


def parse_json_object(
    data: bytes, source: str, most: int = VALUES_LIMIT, parse: Callable[[str], Any] = json.loads
) -> dict[str, Any]:
    """Parse UTF-8 JSON whose outermost value must be an object; `source` names it in errors (ValueError).

    most: how many values it may have, since each can take thirty times the memory of its text · parse: what makes
    values of the text, where `json.loads` takes too much for JSON

    >>> parse_json_object(b'{"n_ctx": 1024}', "hparams.json")
    {'n_ctx': 1024}
    """
    if sum(map(data.count, b",:[{")) > most:  # of those within strings too, which are few
        raise ValueError(f"{source}: has more values than the {most:,} that such a file can have")
    try:
        value = parse(data.decode("utf-8").removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source}: holds a JSON {type(value).__name__}, where an object is expected")
    return value


def read_text_pieces(file: BinaryIO, source: str, progress: Callable[[int], object]) -> Iterator[str]:
    """A file's text from UTF-8, piece by piece, without a byte order mark before it; ValueError says at which byte it
    isn't UTF-8.

    progress: called with the number of bytes of each piece, once it is done with.
    """
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    more = begins = True
    while more:
        data = file.read(PIECE)
        read, more = read + len(data), bool(data)
        try:
            text = decoder.decode(data, final=not more)
        except UnicodeDecodeError as error:
            raise _not_utf8(source, error, before=read - len(error.object)) from None
        yield text.removeprefix(BYTE_ORDER_MARK) if begins else text
        begins = begins and not text
        progress(len(data))


def decode_utf8(data: bytes, source: str) -> str:
    """Text from UTF-8, without a byte order mark before it; ValueError says at which byte it isn't UTF-8.

    >>> decode_utf8(codecs.BOM_UTF8 + b"Once", "story.txt")
    'Once'
    """
    try:
        return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise _not_utf8(source, error) from None


def _not_utf8(source: str, error: UnicodeDecodeError, before: int = 0) -> ValueError:
    """before: how many bytes of the source come before those that couldn't be decoded."""
    return ValueError(f"{source}: not UTF-8 at byte {before + error.start} (0x{error.object[error.start]:02x})")
