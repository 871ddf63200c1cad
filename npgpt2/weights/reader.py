"""The model file: one `.npz` with everything that a run needs, opened without reading it.

An `.npz` is a zip file of `.npy` files. Ours stores each of the model's variables uncompressed, with its numbers at an
offset that is a multiple of 64 bytes, so that the file can be mapped into memory and used as it lies there: nothing is
copied, and processes that run the same model share its pages. `hparams.json` says the model's sizes; `encoder.json`
and `vocab.bpe` are its vocabulary, where known, and `special_tokens.json` what those two don't say, if there is any.
`writer.py` writes such files.
"""

from __future__ import annotations

import ast
import io
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from npgpt2.checks import as_path
from npgpt2.files import TEXT_FILE_LIMIT
from npgpt2.model import variable_shapes
from npgpt2.vocabulary import SpecialTokens
from npgpt2.weights.archive import CHUNK, Archive, Damaged, Member
from npgpt2.weights.hparams import HPARAMS_LIMIT, parse_hparams
from npgpt2.weights.int8 import SCALES, by_output, is_quantizable, quantize

# A cache line, and the widest vector register.
ALIGNMENT = 64
# Trained weights don't compress, and text not much. What grows by more than this was made to exhaust memory.
LARGEST_COMPRESSION = 20
# NumPy's own headers take 118 bytes; its reader accepts no more than this either.
NPY_HEADER_LIMIT = 10_000
# The types in which a model file can hold its arrays, as NumPy describes them in it. int8 is for matrices alone, each
# with the scales of its rows beside it: see `int8.py`.
DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "|i1"}
VOCABULARY_FILES = ("encoder.json", "vocab.bpe")
SPECIAL_FILE = "special_tokens.json"
# What reading a header of nonsense raises.
_HEADER_ERRORS = (
    Damaged, struct.error, ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError, OverflowError
)  # fmt: skip


def all_finite(array: npt.NDArray[Any]) -> bool:
    """Whether no value is NaN or infinite; looks at a piece at a time, so that no mask of the array's size is made.

    array: float32 or float16, of any shape.

    >>> all_finite(np.float32([1, 2])), all_finite(np.float16([1, np.nan]))
    (True, False)
    """
    flat = array.ravel(order="K")  # a view, in the order of memory
    pieces = (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))
    if flat.dtype == np.float16:  # by their bits, since np.isfinite takes five times as long
        return all(((piece.view(np.uint16) & 0x7C00) != 0x7C00).all() for piece in pieces)
    return all(np.isfinite(piece).all() for piece in pieces)


class _Stored(NamedTuple):
    """An array as the file has it."""

    member: Member  # first the .npy header, then the numbers
    header_size: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Literal["C", "F"]  # whether the last index of a matrix changes fastest, or the first

    @property
    def start(self) -> int:
        """Where its numbers begin in the file, if it isn't compressed."""
        return self.member.start + self.header_size


class Weights(Mapping[str, npt.NDArray[Any]]):
    """A model's variables by name, as its file stores them: read-only arrays, memory-mapped where the file allows it.

    dtype: int8 rounds the matrices of a float32 or float16 file; by default they are used as the file has them.

    A variable is float32 of the shape that `shapes` says; float16 is widened. Where a matrix is in int8, its scales are
    a variable of their own beside it, float32 (n_out,), under its name and `/scales`; see `quantize`.

    Opening takes milliseconds whatever the size. An array is read, checked against the checksum that the zip file
    keeps, and searched for NaN and infinity when it is first asked for, so that nothing is computed with that wasn't
    checked; then it is kept. Damage raises ValueError, a name that the model doesn't have KeyError.

    Threads and forked processes can use it at any moment. A copy is the object itself, and a pickle the absolute path
    and `dtype`, by which the file is opened again.

    The file must not be written to while it is open, since it is read where it lies: what is written there is computed
    with, and where it is cut short, the system ends the process (SIGBUS). `check_unchanged` notices either, as `GPT2`
    does before each run, though not during one. Another file that takes its name, by being renamed to it, is safe, and
    all that npgpt2 writes is.

    >>> from npgpt2.models import BUNDLED_FILE
    >>> weights = Weights(BUNDLED_FILE, dtype="int8")
    >>> list(weights)[:3], len(weights)
    (['wte', 'wte/scales', 'wpe'], 101)
    >>> weights["wte"].dtype, weights["wte"].shape, weights["wte/scales"].shape
    (dtype('int8'), (4096, 256), (4096,))
    """

    def __init__(self, path: str | Path, dtype: Literal["int8"] | None = None) -> None:
        path = as_path("path", path)
        if dtype not in ("int8", None):
            raise ValueError(f"dtype is {dtype!r}, where 'int8' is expected, or None for the type that the file has")
        self.path = path
        self._settings = (path.absolute(), dtype)  # now, since the program may go to another folder
        self._archive = Archive(path)
        if "hparams.json" not in self._archive:
            raise self._archive.broken("hparams.json is missing from it; npgpt2 convert writes it")
        self.hparams = parse_hparams(self._text("hparams.json", HPARAMS_LIMIT), f"{path}: hparams.json")
        # Every layer takes some of the file's members, so that a claim of more layers ends here, before the names of
        # their variables are listed.
        if self.hparams.n_layer > len(self._archive):
            n_layer, members = self.hparams.n_layer, len(self._archive)
            raise self._archive.broken(f"n_layer is {n_layer}, but it holds {members} members")
        self.shapes = variable_shapes(self.hparams)
        self._stored = {name: self._find(name, shape) for name, shape in self.shapes.items()}
        self._rounded = {
            name
            for name, stored in self._stored.items()
            if dtype == "int8" and stored.dtype != np.int8 and is_quantizable(name)
        }
        self._variables: dict[str, str] = {}  # by the names of this mapping, those of the variables that they belong to
        for name, shape in self.shapes.items():
            self._variables[name] = name
            if self._stored[name].dtype == np.int8:
                n_out = shape[0 if name == "wte" else 1]
                self._stored[name + SCALES] = self._find(name + SCALES, (n_out,))
            if self._stored[name].dtype == np.int8 or name in self._rounded:
                self._variables[name + SCALES] = name
        expanded, size = sum(stored.member.expanded for stored in self._stored.values()), len(self._archive.bytes)
        if expanded > LARGEST_COMPRESSION * size:
            raise self._archive.broken(f"{size:,} bytes that expand to {expanded:,}")
        # There is no lock, which a forked process could inherit taken. Two threads that ask for the same array at once
        # both read it, and `setdefault` has them agree on one.
        self._kept: dict[str, npt.NDArray[Any]] = {}

    # ---- The mapping

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        array = self._kept.get(name)
        return self._read(name) if array is None else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    def __contains__(self, name: object) -> bool:
        return name in self._variables

    def __copy__(self) -> Weights:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Weights:
        return self

    def __reduce__(self) -> tuple[type[Weights], tuple[Path, Literal["int8"] | None]]:
        return type(self), self._settings

    def check_unchanged(self) -> None:
        """Raise ValueError where the file was written to after it was opened."""
        self._archive.check_unchanged()

    # ---- What the file says of itself

    @property
    def dtype(self) -> str:
        """The types in which the file stores the model's variables: float32, float16, int8."""
        return " and ".join(sorted({stored.dtype.name for stored in self._stored.values()}))

    @property
    def parameters(self) -> int:
        """How many numbers the model consists of."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def special(self) -> SpecialTokens | None:
        """What the file says of the model's tokens besides the two files of its vocabulary, if it does."""
        if SPECIAL_FILE not in self._archive:
            return None
        return SpecialTokens.parse(self._text(SPECIAL_FILE), self.hparams.n_vocab, f"{self.path}: {SPECIAL_FILE}")

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that stand for what the file holds, whatever it is called."""
        return self._archive.fingerprint()

    def vocabulary(self) -> tuple[bytes, bytes] | None:
        """The contents of `encoder.json` and `vocab.bpe`, or None where the file has no vocabulary."""
        if not any(name in self._archive for name in VOCABULARY_FILES):
            return None
        encoder, bpe = (self._text(name) for name in VOCABULARY_FILES)
        return encoder, bpe

    def _text(self, name: str, limit: int = TEXT_FILE_LIMIT) -> bytes:
        """Read a member that is text, which has a sensible size or is refused."""
        member = self._archive.find(name, name)
        if member.expanded > limit:
            raise self._archive.broken(f"{name} is larger than {limit:,} bytes")
        if member.deflated and member.expanded > LARGEST_COMPRESSION * member.size:
            raise self._archive.broken(f"{name} has {member.size:,} bytes that expand to {member.expanded:,}")
        try:
            text = b"".join(self._archive.pieces(member))
        except Damaged as error:
            raise self._archive.broken(f"{name} can't be read ({error})") from None
        self._archive.forget(member)
        return text

    # ---- Arrays

    def _find(self, name: str, shape: tuple[int, ...]) -> _Stored:
        """Locate an array and read the header that says its type and shape, which must be `shape`."""
        broken = self._archive.broken
        member = self._archive.find(f"{name}.npy", f"variable {name}")
        try:
            file = io.BytesIO(self._archive.beginning(member, 10 + NPY_HEADER_LIMIT))
            version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call, unused-ignore]
            if version != (1, 0):
                raise ValueError(f".npy version {version[0]}.{version[1]}")
            (size,) = struct.unpack("<H", file.read(2))
            if size > NPY_HEADER_LIMIT:
                raise ValueError(f".npy header of {size:,} bytes")
            # What numpy.lib.format does too, at a tenth of the time; this is most of what opening a model takes.
            header = ast.literal_eval(file.read(size).decode("latin-1"))
            dtype, found = np.dtype(header["descr"]), header["shape"]
            order: Literal["C", "F"] = "F" if header["fortran_order"] else "C"
        except _HEADER_ERRORS as error:
            raise broken(f"variable {name} can't be read ({error})") from None
        expected = list(DTYPES) if is_quantizable(name) else ["float32", "float16"]
        if dtype not in [np.dtype(DTYPES[name]) for name in expected]:
            raise broken(f"variable {name} has type {dtype}, where {' or '.join(expected)} is expected")
        if found != shape:
            raise broken(f"variable {name} has shape {found}, where hparams.json asks for {shape}")
        header_size = 10 + size
        if member.expanded != header_size + prod(shape) * dtype.itemsize:
            raise broken(f"variable {name} has {member.expanded} bytes, which don't hold shape {shape}")
        if not member.deflated and member.size != member.expanded:
            raise broken(f"variable {name} is cut short")
        return _Stored(member, header_size, shape, dtype, order)

    def _read(self, name: str) -> npt.NDArray[Any]:
        """Read an array, and what belongs to it where they are made together; keep it."""
        variable = self._variables[name]
        if variable not in self._rounded:
            return self._kept.setdefault(name, self._usable(name))
        values, scales = quantize(by_output(variable, self._checked(variable)))  # float16 too, without widening all
        self._archive.forget(self._stored[variable].member)
        for key, array in ((variable, by_output(variable, values)), (variable + SCALES, scales)):
            array.flags.writeable = False
            self._kept.setdefault(key, array)
        return self._kept[name]

    def _usable(self, name: str) -> npt.NDArray[Any]:
        """An array as it is given out: of the file if it is aligned there, float16 as float32."""
        stored, array = self._stored[name], self._checked(name)
        if stored.dtype == np.float16:
            array = array.astype(np.float32)
        elif not stored.member.deflated and stored.start % ALIGNMENT:
            array = array.copy(order="K")
        elif not stored.member.deflated:
            return array
        self._archive.forget(stored.member)
        array.flags.writeable = False
        return array

    def _checked(self, name: str) -> npt.NDArray[Any]:
        """An array as the file has it, and mapped if it isn't compressed, once its checksum and values are right."""
        stored = self._stored[name]
        try:
            if stored.member.deflated:
                flat = self._expanded(stored)
            else:
                for _ in self._archive.pieces(stored.member):  # for the checksum
                    pass
                flat = np.frombuffer(self._archive.bytes, stored.dtype, prod(stored.shape), stored.start)
        except Damaged as error:
            raise self._archive.broken(f"variable {name} is damaged ({error})") from None
        if stored.dtype != np.int8 and not all_finite(flat):
            what = f"variable {name} holds values that are not finite numbers (NaN or infinity)"
            raise self._archive.broken(what)
        flat.flags.writeable = False
        return flat.reshape(stored.shape, order=stored.order)

    def _expanded(self, stored: _Stored) -> npt.NDArray[Any]:
        """The numbers of an array that is compressed."""
        flat = np.empty(prod(stored.shape), stored.dtype)
        view = flat.view(np.uint8).data
        end = -stored.header_size
        for piece in self._archive.pieces(stored.member):
            start, end = end, end + len(piece)
            view[max(0, start) : max(0, end)] = piece[max(0, -start) :]
        if end != len(view):
            raise Damaged("it is cut short")
        return flat
