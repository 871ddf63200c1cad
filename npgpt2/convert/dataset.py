"""Writes training sets: texts as arrays of tokens in one compressed `.npz`, as fine-tuning code reads them.

The layout is that of `encode.py` in the nshepperd and Tenoke forks of OpenAI's code: `arr_0`, `arr_1`, … each hold the
tokens of one or more texts, with `<|endoftext|>` after each that is followed by another or too short to end an array.
Here that is the token which the model was trained with, where the forks write the seven tokens of its letters.
"""

from __future__ import annotations

import glob
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from npgpt2.files import decode_utf8, replacing
from npgpt2.tokenizer import END_OF_TEXT, Tokenizer

Chunk = npt.NDArray[np.int32]


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
    for path in tqdm(paths, unit="file", desc="encode", disable=None):
        if path.suffix == ".npz":
            yield from _encoded_already(path, len(tokenizer))
            continue
        # Line breaks become "\n", as they do in a file that Python opens as text.
        text += decode_utf8(path.read_bytes(), str(path)).replace("\r\n", "\n").replace("\r", "\n")
        if len(text) >= combine:
            yield np.array(tokenizer.encode(text, allow_special=True), np.int32)
            text = ""
        else:
            text += END_OF_TEXT
    if text:
        yield np.array(tokenizer.encode(text, allow_special=True), np.int32)


def _encoded_already(path: Path, n_vocab: int) -> Iterator[Chunk]:
    try:
        with np.load(path) as archive:
            for name in archive.files:
                tokens = archive[name]
                if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                    raise ValueError(f"{name} is not a list of tokens")
                if tokens.size and not 0 <= tokens.min() <= tokens.max() < n_vocab:
                    raise ValueError(f"{name} holds tokens that are not in the vocabulary of {n_vocab}")
                yield tokens.astype(np.int32)
    except (ValueError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: not a training set ({error})") from None


def write_dataset(output: Path, patterns: Sequence[str], tokenizer: Tokenizer, combine: int = 50000) -> tuple[int, int]:
    """Encode texts into a training set; returns how many files and tokens it holds."""
    if tokenizer.end_of_text is None:
        raise ValueError("the vocabulary has no <|endoftext|>, which separates the texts of a training set")
    paths = [path for path in dict.fromkeys(find_texts(patterns)) if path.resolve() != output.resolve()]
    with replacing(output) as file:
        chunks = list(encode_texts(paths, tokenizer, combine))
        np.savez_compressed(file, *chunks)
    return len(paths), sum(chunk.size for chunk in chunks)
