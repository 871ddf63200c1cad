"""Writing a model file, in the form that `reader.py` can map into memory. Only what converts a model needs it."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npgpt2.files import replacing
from npgpt2.model import HParams
from npgpt2.vocabulary import SpecialTokens
from npgpt2.weights.archive import CHUNK
from npgpt2.weights.int8 import SCALES, by_output, is_quantizable, quantize
from npgpt2.weights.reader import ALIGNMENT, DTYPES, SPECIAL_FILE, VOCABULARY_FILES


def write(
    path: Path,
    hparams: HParams,
    arrays: Iterable[tuple[str, npt.NDArray[np.float32]]],
    vocabulary: tuple[bytes, bytes] | None,
    dtype: str = "float32",
    special: SpecialTokens | None = None,
) -> None:
    """Write a model file; it appears at `path` once it is complete and on disk.

    arrays: pairs of name and float32 array, taken one at a time, so that a generator keeps memory small ·
    vocabulary: the contents of `encoder.json` and `vocab.bpe`, or None · dtype: float32; float16, which takes half
    the space and is widened into memory when it is used; or int8, which rounds the matrices to a quarter of the space
    and is computed with as it is · special: what the vocabulary's two files don't say. The same input gives the same
    bytes.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        members = dict(zip(VOCABULARY_FILES, vocabulary, strict=True)) if vocabulary else {}
        members = {"hparams.json": json.dumps(hparams._asdict()).encode()} | members
        if special is not None:
            members[SPECIAL_FILE] = special.to_json()
        for name, data in members.items():
            archive.writestr(_zip_info(name), data)
        for name, array in arrays:
            if dtype == "int8" and is_quantizable(name):
                values, scales = quantize(by_output(name, array))
                _write_array(archive, name, by_output(name, values), "int8", at=file.tell())
                _write_array(archive, name + SCALES, scales, "float32", at=file.tell())
            else:
                _write_array(archive, name, array, "float32" if dtype == "int8" else dtype, at=file.tell())
            del array  # before the next one is made


def _zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3  # Unix, so that the file is the same whichever system writes it
    return info


def _write_array(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any], dtype: str, at: int) -> None:
    """Add an array to the zip file, which is `at` bytes long, so that its numbers are aligned."""
    member = _zip_info(f"{name}.npy")
    # The data starts behind a local header of 30 bytes, the name, and an extra field: number 0xD935, which Android's
    # zipalign uses for this, its length, the alignment, and as many zeros as it takes. The .npy header that comes
    # first is itself a multiple of 64 bytes long.
    padding = -(at + 30 + len(member.filename) + 6) % ALIGNMENT
    member.extra = struct.pack("<HHH", 0xD935, 2 + padding, ALIGNMENT) + bytes(padding)
    # The matrices of linear layers lie in the file by columns (Fortran's order, as the .npy header says), since
    # decoding multiplies one row by them: a dot product with each column in turn reads memory 1.2 to 1.5 times as
    # fast as adding up scaled rows.
    by_columns = name.endswith("/w")
    with archive.open(member, "w") as out:
        descr = DTYPES[dtype]
        header = {"descr": descr, "fortran_order": by_columns, "shape": array.shape}
        np.lib.format.write_array_header_1_0(out, header)  # type: ignore[no-untyped-call, unused-ignore]
        rows = array.T if by_columns else array
        step = max(1, CHUNK // prod(rows.shape[1:]))
        for start in range(0, len(rows), step):
            with np.errstate(over="ignore"):
                piece = np.ascontiguousarray(rows[start : start + step], descr)
            if dtype == "float16" and not np.isfinite(piece).all():
                raise ValueError(f"variable {name} has values that are too large for float16; write float32")
            out.write(piece.data)
