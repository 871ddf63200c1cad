"""The model file: one `.npz` with everything that a run needs, opened without reading it.

An `.npz` is a zip file of `.npy` files. Ours stores each of the model's variables uncompressed, with its numbers at an
offset that is a multiple of 64 bytes, so that the file can be mapped into memory and used as it lies there: nothing is
copied, and processes that run the same model share its pages. `hparams.json` says the model's sizes; `encoder.json`
and `vocab.bpe` are its vocabulary, where known. `writer.py` writes such files.
"""

from __future__ import annotations

import ast
import mmap
import struct
import zipfile
import zlib
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from npgpt2.files import TEXT_FILE_LIMIT
from npgpt2.kernels.int8 import Int8, Quantized, QuantizedRows, quantize
from npgpt2.kernels.kernels import Array
from npgpt2.model import variable_shapes
from npgpt2.weights.hparams import parse_hparams

# A cache line, and the widest vector register.
ALIGNMENT = 64
# Pieces in which arrays are checked: small enough to stay in the cache from one check to the next.
CHUNK = 2**20
# Trained weights don't compress. A file that grows by more than this was made to exhaust memory.
LARGEST_COMPRESSION = 20
# NumPy's own headers take 118 bytes; its reader accepts no more than this either.
NPY_HEADER_LIMIT = 10_000
# What zipfile raises on files that are damaged, or packed in a way that it doesn't know.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, OSError, OverflowError, ValueError)
# The types in which a model file can hold its arrays, as NumPy describes them in it. int8 is for matrices alone, each
# with the scales of its rows beside it: see `quantize.py`.
DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "|i1"}
VOCABULARY_FILES = ("encoder.json", "vocab.bpe")


def all_finite(array: Array) -> bool:
    """Whether no value is NaN or infinite; looks at a piece at a time, so that no mask of the array's size is made."""
    flat = array.ravel(order="K")  # a view, in the order of memory
    return all(np.isfinite(flat[start : start + CHUNK]).all() for start in range(0, flat.size, CHUNK))


def is_quantizable(name: str) -> bool:
    """Whether a variable is a matrix that activations are multiplied by."""
    return name == "wte" or name.endswith("/w")


def by_output(name: str, matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A view of such a matrix with a row for each output; or, of one that is so already, as it is in the file."""
    return matrix if name == "wte" else matrix.T


class _Member(NamedTuple):
    """Where an array lies in the file."""

    info: zipfile.ZipInfo
    start: int  # of the member's data in the file: first the .npy header, then the numbers
    header_size: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Literal["C", "F"]  # whether the last index of a matrix changes fastest, or the first


def _quantized(name: str, values: Int8, scales: Array) -> Array:
    # The model does with it what it does with an array, and need not know.
    return cast(Array, QuantizedRows(values, scales) if name == "wte" else Quantized(values, scales))


class Weights(dict[str, Array]):
    """A model's variables by name: read-only float32 arrays, memory-mapped where the file allows it.

    dtype: int8 rounds the matrices of a float32 or float16 file; by default they are used as the file has them. Where
    they are int8, a `Quantized` stands in for the array.

    A variable is looked up in the file, checked against the checksum that the zip file keeps, and searched for
    NaN and infinity when it is first asked for; from then on this is an ordinary dictionary. Opening therefore takes
    milliseconds whatever the size, and nothing that was not checked is ever computed with. Damage raises ValueError.
    The file must not be changed while it is open; replacing it by renaming another over it is safe.
    """

    def __init__(self, path: Path, dtype: Literal["int8"] | None = None) -> None:
        super().__init__()
        if dtype not in ("int8", None):
            raise ValueError(f"dtype is {dtype!r}, where 'int8' is expected, or None for the type that the file has")
        self.path = path
        self._quantizes = dtype == "int8"
        open(path, "rb").close()  # what the system refuses has the system's own message
        try:
            self._zip = zipfile.ZipFile(path)
        except _ZIP_ERRORS as error:
            raise ValueError(
                f"{path}: not a model file, or cut short ({error}); convert or download it again"
            ) from None
        assert self._zip.fp is not None
        self._map = mmap.mmap(self._zip.fp.fileno(), 0, access=mmap.ACCESS_READ)
        with suppress(AttributeError, OSError):  # decoding is 2 % faster with large pages, where the system has them
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._infos = {info.filename: info for info in self._zip.infolist()}
        if len(self._infos) != len(self._zip.infolist()):
            raise self._broken("two members have the same name")
        if "hparams.json" not in self._infos:
            raise self._broken("hparams.json is missing from it; npgpt2 convert writes it")
        self.hparams = parse_hparams(self._read_small("hparams.json"), f"{path}: hparams.json")
        # Every layer takes some of the file's members, so that a claim of more layers ends here, before the names of
        # their variables are listed.
        if self.hparams.n_layer > len(self._infos):
            raise self._broken(f"n_layer is {self.hparams.n_layer}, but it holds {len(self._infos)} members")
        self.shapes = variable_shapes(self.hparams)
        self._members = {name: self._find(name, shape) for name, shape in self.shapes.items()}
        for name, member in list(self._members.items()):
            if member.dtype == np.int8:
                outputs = member.shape[0 if name == "wte" else 1]
                self._members[f"{name}/scales"] = self._find(f"{name}/scales", (outputs,))
        expanded = sum(member.info.file_size for member in self._members.values())
        if expanded > LARGEST_COMPRESSION * len(self._map):
            raise self._broken(f"{len(self._map):,} bytes that expand to {expanded:,}")

    def __missing__(self, name: str) -> Array:
        member = self._members[name]
        array = self._checked(name)
        if member.dtype == np.int8:
            array = _quantized(name, by_output(name, array), self._checked(f"{name}/scales"))
        elif self._quantizes and is_quantizable(name):
            array = _quantized(name, *quantize(by_output(name, array)))
            self._forget(member)
        self[name] = array
        return array

    def _checked(self, name: str) -> npt.NDArray[Any]:
        """An array of the file, once its checksum and its values are right."""
        member = self._members[name]
        array = self._mapped(name, member) if self._can_map(member) else self._copied(name, member)
        if member.dtype != np.int8 and not all_finite(array):
            raise self._broken(f"variable {name} holds values that are not finite numbers (NaN or infinity)")
        array.flags.writeable = False
        return array

    def _forget(self, member: _Member) -> None:
        """Let the system have the memory of a part of the file that isn't needed any more."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = member.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, member.start + member.info.compress_size - start)

    @property
    def dtype(self) -> str:
        """The types in which the file stores the model's variables: float32, float16, int8."""
        return " and ".join(sorted({member.dtype.name for member in self._members.values()}))

    @property
    def parameters(self) -> int:
        """How many numbers the model consists of."""
        return sum(prod(shape) for shape in self.shapes.values())

    def vocabulary(self) -> tuple[bytes, bytes] | None:
        """The contents of `encoder.json` and `vocab.bpe`, or None where the file has no vocabulary."""
        if not any(name in self._infos for name in VOCABULARY_FILES):
            return None
        encoder, bpe = (self._read_small(name) for name in VOCABULARY_FILES)
        return encoder, bpe

    def _broken(self, what: str) -> ValueError:
        # What zipfile says can quote 64 KB of the file.
        return ValueError(f"{self.path}: {what[:300]}; convert or download the model again")

    def _read_small(self, name: str) -> bytes:
        """Read a member that is text, which has a sensible size or is refused."""
        info = self._info(name)
        if info.file_size > TEXT_FILE_LIMIT:
            raise self._broken(f"{name} is larger than {TEXT_FILE_LIMIT:,} bytes")
        try:
            with self._zip.open(info) as file:
                text = file.read(info.file_size)  # read() would expand all that is there before it looks at the size
                file.read(1)  # at the end, zipfile compares the checksum
                return text
        except _ZIP_ERRORS as error:
            raise self._broken(f"{name} can't be read ({error})") from None

    def _info(self, name: str) -> zipfile.ZipInfo:
        """The zip file's entry for a member that must be there, in one of the two ways that NumPy writes them."""
        info = self._infos.get(name)
        if info is None:
            raise self._broken(f"{name} is missing from it")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._broken(f"{name} is compressed by method {info.compress_type}, which NumPy doesn't use")
        return info

    def _find(self, name: str, shape: tuple[int, ...]) -> _Member:
        """Locate a variable and read the header that says its type and shape, which must be `shape`."""
        info = self._info(f"{name}.npy")
        local = self._map[info.header_offset : info.header_offset + 30]
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise self._broken(f"variable {name} has no zip header where one is expected")
        start = info.header_offset + 30 + sum(struct.unpack_from("<HH", local, 26))
        try:
            with self._zip.open(info) as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f".npy version {version[0]}.{version[1]}")
                (size,) = struct.unpack("<H", file.read(2))
                if size > NPY_HEADER_LIMIT:
                    raise ValueError(f".npy header of {size:,} bytes")
                # What numpy.lib.format does too, at a tenth of the time; this is most of what opening a model takes.
                header = ast.literal_eval(file.read(size).decode("latin-1"))
                dtype, found = np.dtype(header["descr"]), header["shape"]
                order: Literal["C", "F"] = "F" if header["fortran_order"] else "C"
        except (*_ZIP_ERRORS, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
            raise self._broken(f"variable {name} can't be read ({error})") from None
        expected = list(DTYPES) if is_quantizable(name) else ["float32", "float16"]
        if dtype not in [np.dtype(DTYPES[name]) for name in expected]:
            raise self._broken(f"variable {name} has type {dtype}, where {' or '.join(expected)} is expected")
        if found != shape:
            raise self._broken(f"variable {name} has shape {found}, where hparams.json asks for {shape}")
        header_size = 10 + size
        if info.file_size != header_size + prod(shape) * dtype.itemsize:
            raise self._broken(f"variable {name} has {info.file_size} bytes, which don't hold shape {shape}")
        return _Member(info, start, header_size, shape, dtype, order)

    def _can_map(self, member: _Member) -> bool:
        stored = member.info.compress_type == zipfile.ZIP_STORED and not member.info.flag_bits & 1
        aligned = (member.start + member.header_size) % ALIGNMENT == 0
        return stored and aligned and member.dtype != np.float16

    def _mapped(self, name: str, member: _Member) -> npt.NDArray[Any]:
        """A view into the mapped file, once the checksum holds."""
        end = member.start + member.info.file_size
        if member.info.compress_size != member.info.file_size or end > len(self._map):
            raise self._broken(f"variable {name} is cut short")
        checksum = 0
        with memoryview(self._map) as view:
            for start in range(member.start, end, CHUNK):
                checksum = zlib.crc32(view[start : min(start + CHUNK, end)], checksum)
        if checksum != member.info.CRC:
            raise self._broken(f"variable {name} is damaged (its checksum is wrong)")
        flat = np.frombuffer(self._map, member.dtype, prod(member.shape), member.start + member.header_size)
        return flat.reshape(member.shape, order=member.order)

    def _copied(self, name: str, member: _Member) -> npt.NDArray[Any]:
        """A copy, for what is compressed, unaligned or float16; zipfile checks the checksum."""
        raw = np.empty(prod(member.shape), member.dtype)
        view = raw.view(np.uint8).data
        try:
            with self._zip.open(member.info) as file:
                file.read(member.header_size)
                for start in range(0, len(view), CHUNK):
                    view[start : start + CHUNK] = file.read(min(CHUNK, len(view) - start))
                file.read(1)  # at the end, zipfile compares the checksum
        except _ZIP_ERRORS as error:
            raise self._broken(f"variable {name} is damaged ({error})") from None
        numbers = raw if member.dtype == np.int8 else raw.astype(np.float32, copy=False)
        return numbers.reshape(member.shape, order=member.order)
