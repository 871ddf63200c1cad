"""Writes training sets: texts as arrays of tokens in one compressed `.npz`, as fine-tuning code reads them.

The layout is that of `encode.py` in the nshepperd and Tenoke forks of OpenAI's code: `arr_0`, `arr_1`, … each hold the
tokens of one or more texts, with `<|endoftext|>` after each that is followed by another or too short to end an array.
Here that is the token which the model was trained with, where the forks write the seven tokens of its letters.
"""

from __future__ import annotations

import glob
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from npgpt2.bars import Bar
from npgpt2.checks import as_path, check_whole, is_sequence, wrong_type
from npgpt2.files import clear_left_behind, decode_utf8, replacing
from npgpt2.tokenizer import Tokenizer
from npgpt2.vocabulary import END_OF_TEXT

# What `np.savez` and `np.savez_compressed` write. Other methods are expanded without bounds.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# No file shrinks by more than this with the second; one that claims to has members that lie over each other.
LARGEST_COMPRESSION = 1032
# Tokens of a training set that are read at once, since it can hold a thousand times what its size lets expect.
PIECE = 2**18


class Chunk(NamedTuple):
    """An array of so many tokens, in pieces, which are to be taken before the next chunk is."""

    size: int
    pieces: Iterable[npt.NDArray[np.int32]]


def find_texts(patterns: Sequence[str]) -> list[Path]:
    """The files that paths mean: a file itself, all in a folder and its folders, or those that fit a pattern.

    A path that means no file raises FileNotFoundError. Sorted, so that the same files give the same training set.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
        else:
            files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not files:
            raise FileNotFoundError(f"{pattern}: no such file, nor a folder or pattern with files in it")
        found += files
    return found


def encode_texts(paths: Sequence[Path], tokenizer: Tokenizer, combine: int) -> Iterator[Chunk]:
    """The texts as arrays of tokens, short ones put together until they have `combine` characters.

    A file whose name ends in `.npz` is a training set already, whose arrays are taken over.
    """
    text = ""
    for path in Bar(paths, unit="file", desc="encode", disable=None):
        if path.suffix == ".npz":
            yield from _encoded_already(path, len(tokenizer))
            continue
        # Line breaks become "\n", as they do in a file that Python opens as text.
        text += decode_utf8(path.read_bytes(), str(path)).replace("\r\n", "\n").replace("\r", "\n")
        if len(text) >= combine:
            yield _encoded(text, tokenizer)
            text = ""
        else:
            text += END_OF_TEXT
    if text:
        yield _encoded(text, tokenizer)


def _encoded(text: str, tokenizer: Tokenizer) -> Chunk:
    tokens = np.array(tokenizer.encode(text, allow_special=True), np.int32)
    return Chunk(tokens.size, [tokens])


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What is raised of a file that is damaged, or no training set, says which it is."""
    try:
        yield
    except (ValueError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: not a training set ({str(error)[:300]})") from None


def _encoded_already(path: Path, n_vocab: int) -> Iterator[Chunk]:
    with _refusing(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        expanded, size = sum(member.file_size for member in members), path.stat().st_size
        if expanded > LARGEST_COMPRESSION * size:
            raise ValueError(f"{size:,} bytes that claim to hold {expanded:,}")
        for member in members:
            if member.compress_type not in METHODS:
                raise ValueError(f"{member.filename} is compressed in a way that NumPy doesn't use")
            with archive.open(member) as file:
                yield _read_tokens(file, member, path, n_vocab)


def _read_tokens(file: IO[bytes], member: zipfile.ZipInfo, path: Path, n_vocab: int) -> Chunk:
    """A member that has been opened, whose header is read at once, and its tokens when they are asked for."""
    name = member.filename.removesuffix(".npy")
    if name == member.filename or np.lib.format.read_magic(file) != (1, 0):  # type: ignore[no-untyped-call, unused-ignore]
        raise ValueError(f"{name} is not a list of tokens")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call, unused-ignore]
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(f"{name} is not a list of tokens")
    if not 0 <= shape[0] * dtype.itemsize <= member.file_size:
        raise ValueError(f"{name} is cut short")

    def pieces() -> Iterator[npt.NDArray[np.int32]]:
        with _refusing(path):
            for start in range(0, shape[0], PIECE):
                count = min(PIECE, shape[0] - start)
                tokens = np.frombuffer(file.read(count * dtype.itemsize), dtype)
                if tokens.size < count:
                    raise ValueError(f"{name} is cut short")
                if not 0 <= tokens.min() <= tokens.max() < n_vocab:
                    raise ValueError(f"{name} holds tokens that are not in the vocabulary of {n_vocab}")
                yield tokens.astype(np.int32)
            if file.read(1):  # by which zipfile also sees that this was the end, and compares the checksum
                raise ValueError(f"{name} holds more than its header says")

    return Chunk(shape[0], pieces())


def write_dataset(
    output: str | Path, patterns: Sequence[str], tokenizer: Tokenizer, combine: int = 50000
) -> tuple[int, int]:
    """Encode texts into a training set; returns how many files and tokens it holds."""
    output = as_path("output", output)
    check_whole("combine", combine, 1)
    if not is_sequence(patterns) or not all(isinstance(pattern, str | os.PathLike) for pattern in patterns):
        raise wrong_type("patterns", patterns, "a list of paths and patterns")
    if not isinstance(tokenizer, Tokenizer):
        raise wrong_type("tokenizer", tokenizer, "a Tokenizer")
    if tokenizer.end_of_text is None:
        raise ValueError("the vocabulary has no <|endoftext|>, which separates the texts of a training set")
    clear_left_behind(output)  # which would be texts too, in a folder of them
    paths = [path for path in dict.fromkeys(find_texts(patterns)) if path.resolve() != output.resolve()]
    total = 0
    # What `np.savez_compressed` does, but without holding all arrays at once.
    with replacing(output) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (size, pieces) in enumerate(encode_texts(paths, tokenizer, combine)):
            with archive.open(f"arr_{number}.npy", "w", force_zip64=True) as member:
                header = {"descr": "<i4", "fortran_order": False, "shape": (size,)}
                np.lib.format.write_array_header_1_0(member, header)  # type: ignore[no-untyped-call, unused-ignore]
                for piece in pieces:
                    member.write(piece.astype("<i4", copy=False).data)
            total += size
    return len(paths), total
