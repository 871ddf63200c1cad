"""Reads TensorFlow's checkpoint files (the "V2" format that `tf.train.Saver` writes) with NumPy alone.

A checkpoint called `model.ckpt` is a table, `model.ckpt.index`, that says for every variable its type, shape and
place, and data files, `model.ckpt.data-00000-of-00001` and so on, that hold the numbers one after another. Everything
that is read is checked against the CRC-32C checksums in these files. Which variables belong to GPT-2, and what becomes
of them, is in `sources.py`.

The formats are described by TensorFlow's `tensor_bundle.proto` and `tensor_bundle.h`, and by LevelDB's
`table_format.md`.
"""

from __future__ import annotations

import re
import struct
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from reprlib import repr as shortened

import numpy as np
import numpy.typing as npt

from npgpt2.convert.crc32c import crc32c, unmask
from npgpt2.files import read_bounded

Bytes = npt.NDArray[np.uint8]

# A real index takes 50 to 100 bytes a variable: under 200 kB for 1558M with an optimizer's variables.
INDEX_LIMIT = 2 * 2**20
# Keys share prefixes, so that without bounds on one and on all together a small file could make gigabytes of them.
KEY_LIMIT = 1024
KEYS_LIMIT = 2 * INDEX_LIMIT
# The `checkpoint` file beside it: a line for each checkpoint in the folder.
STATE_LIMIT = 2**20
# TensorFlow's own.
RANK_LIMIT = 254
TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_SIZE = 48
# Those members of TensorFlow's enum DataType (types.proto) that weights come in.
DTYPES = {1: "float32", 2: "float64", 14: "bfloat16", 19: "float16"}
ITEM_SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


# ---- Varints and protocol buffers


class _Cursor:
    """Reads a byte string from front to back, and raises ValueError where it ends too early."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def __bool__(self) -> bool:
        return self.position < len(self.data)

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise ValueError("it ends too early")
        self.position += size
        return self.data[self.position - size : self.position]

    def varint(self) -> int:
        """An integer in groups of 7 bits, the lowest first; the top bit says that more follow."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF
        raise ValueError("it has an integer of more than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbered fields of a serialized protocol buffer message."""
    cursor = _Cursor(data)
    while cursor:
        number, wire_type = divmod(cursor.varint(), 8)
        if wire_type == 0:
            yield number, cursor.varint()
        elif wire_type == 2:
            yield number, cursor.take(cursor.varint())
        elif wire_type in (1, 5):
            yield number, int.from_bytes(cursor.take(8 if wire_type == 1 else 4), "little")
        else:
            raise ValueError(f"it has a field of unknown wire type {wire_type}")


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("it has text where a number is expected")
    return value


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("it has a number where a message is expected")
    return value


# ---- The table


def _read_block(table: bytes, handle: _Cursor) -> tuple[int, bytes]:
    """The block that a handle points to, its checksum verified: where it ends, and its contents."""
    offset, size = handle.varint(), handle.varint()
    end = offset + size + 5
    if end > len(table) - FOOTER_SIZE:
        raise ValueError(f"block at byte {offset} lies outside of the file")
    compression, stored = struct.unpack_from("<BI", table, offset + size)
    if crc32c(table[offset : offset + size + 1]) != unmask(stored):
        raise ValueError(f"block at byte {offset} is damaged (its checksum is wrong)")
    if compression:
        kind = "snappy" if compression == 1 else f"method {compression}"
        raise ValueError(f"block at byte {offset} is compressed ({kind}); save the checkpoint again with TensorFlow")
    return end, table[offset : offset + size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of key and value in a block; each key is stored as what it doesn't share with the one before."""
    if len(block) < 4 or (size := len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")) < 0:
        raise ValueError("it has a block without restart points")
    cursor = _Cursor(block[:size])
    key = b""
    while cursor:
        shared, unshared, value_size = cursor.varint(), cursor.varint(), cursor.varint()
        if shared > len(key) or shared + unshared > KEY_LIMIT:
            raise ValueError("it has a key that can't be right")
        key = key[:shared] + cursor.take(unshared)
        yield key, cursor.take(value_size)


def read_table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of key and value in a LevelDB table, in order; ValueError where it is damaged."""
    if len(table) < FOOTER_SIZE or int.from_bytes(table[-8:], "little") != TABLE_MAGIC:
        raise ValueError("it is not a TensorFlow checkpoint's index, or was cut short")
    footer = _Cursor(table[-FOOTER_SIZE:])
    _meta_index = footer.varint(), footer.varint()  # these tables leave it empty
    _, index = _read_block(table, footer)
    previous, previous_end, keys_size = None, 0, 0
    for _, handle in _entries(index):
        end, block = _read_block(table, _Cursor(handle))
        # Blocks lie one behind the other. Without this check, a small file could list one block a million times.
        if end - len(block) - 5 < previous_end:
            raise ValueError("it has blocks that overlap")
        previous_end = end
        for key, value in _entries(block):
            if previous is not None and key <= previous:
                raise ValueError("its keys are out of order")
            previous = key
            keys_size += len(key)
            if keys_size > KEYS_LIMIT:
                raise ValueError(f"its keys take more than {KEYS_LIMIT:,} bytes")
            yield key, value


# ---- The checkpoint


@dataclass(slots=True)
class Entry:
    """What the index says of a variable: `BundleEntryProto` in tensor_bundle.proto. A `sliced` one has no data here."""

    dtype: int = 0
    shape: tuple[int, ...] = ()
    shard: int = 0
    offset: int = 0
    size: int = 0
    crc: int = 0
    sliced: bool = False

    @classmethod
    def parse(cls, data: bytes) -> Entry:
        entry = cls()
        for number, value in _fields(data):
            if number == 1:
                entry.dtype = _int(value)
            elif number == 2:
                dims = [dict(_fields(_message(dim))) for n, dim in _fields(_message(value)) if n == 2]
                if len(dims) > RANK_LIMIT:
                    raise ValueError(f"it has a variable of {len(dims)} dimensions")
                entry.shape = tuple(_int(dim.get(1, 0)) for dim in dims)
            elif number == 3:
                entry.shard = _int(value)
            elif number == 4:
                entry.offset = _int(value)
            elif number == 5:
                entry.size = _int(value)
            elif number == 6:
                entry.crc = unmask(_int(value))
            elif number == 7:
                entry.sliced = True
        return entry


class Checkpoint:
    """A TensorFlow checkpoint: `entries` says what it holds, `read` fetches one variable.

    prefix: the checkpoint's path without `.index`. A damaged index raises ValueError, a missing one FileNotFoundError.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._index = prefix.with_name(prefix.name + ".index")
        table = read_bounded(self._index, INDEX_LIMIT)
        self.shards = 0
        self.entries: dict[str, Entry] = {}
        try:
            for key, value in read_table(table):
                if key:
                    self.entries[key.decode("utf-8", "backslashreplace")] = Entry.parse(value)
                else:
                    header = dict(_fields(value))
                    self.shards = _int(header.get(1, 0))
                    if header.get(2, 0) != 0:
                        raise ValueError("it was written on a big-endian machine, which is not supported")
        except ValueError as error:
            raise ValueError(f"{self._index}: {error}") from None
        if not self.shards:
            raise ValueError(f"{self._index}: it has no header")

    def read(self, name: str) -> tuple[Bytes, str]:
        """The bytes of a variable, little-endian, its checksum verified, and the name of its type."""
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise ValueError(f"{self._index}: variable {name} has TensorFlow's type number {entry.dtype}, not a float")
        if entry.size != prod(entry.shape) * ITEM_SIZES[dtype]:
            raise ValueError(f"{self._index}: variable {name} of shape {shortened(entry.shape)} has {entry.size} bytes")
        if not 0 <= entry.shard < self.shards:
            raise ValueError(f"{self._index}: variable {name} lies in part {entry.shard} of {self.shards}")
        path = self.prefix.with_name(f"{self.prefix.name}.data-{entry.shard:05}-of-{self.shards:05}")
        with open(path, "rb") as file:
            file.seek(0, 2)
            if entry.offset + entry.size > file.tell():
                raise ValueError(f"{path}: {file.tell():,} bytes, cut short before the end of variable {name}")
            file.seek(entry.offset)
            data = np.fromfile(file, np.uint8, entry.size)
        if len(data) != entry.size or crc32c(data) != entry.crc:
            raise ValueError(f"{path}: variable {name} is damaged (its checksum is wrong)")
        return data, dtype


_STATE_PATH = re.compile(rb'^[ \t]*model_checkpoint_path[ \t]*:[ \t]*"([^"\\\n]*(?:\\.[^"\\\n]*)*)"', re.MULTILINE)


def latest(state: Path) -> str:
    """The name, without folders, of the checkpoint that a `checkpoint` file calls the latest."""
    match = _STATE_PATH.search(read_bounded(state, STATE_LIMIT).removeprefix(BOM_UTF8))
    if match is None:
        raise ValueError(f"{state}: has no model_checkpoint_path; give the checkpoint's own path instead")
    # The path is quoted as in C: bytes outside of ASCII by their octal number, some others by a letter.
    letters = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}
    path = re.sub(
        rb"\\([0-3][0-7]{2}|.)",
        lambda quoted: bytes([int(quoted[1], 8)]) if len(quoted[1]) == 3 else letters.get(quoted[1], quoted[1]),
        match[1],
    )
    # It can come from any system, so that both kinds of slashes separate folders.
    return re.split(r"[/\\]", path.decode("utf-8", "replace"))[-1]


def find_prefix(source: Path) -> Path | None:
    """The checkpoint that a path means: a folder's latest, or the one whose prefix or file the path is.

    A folder's `checkpoint` file names the latest one, often by a path on the machine that trained it; the file of that
    name in this folder is the one. None where there is no checkpoint; ValueError where it can't be told which.
    """
    if not source.is_dir():
        prefix = source.with_name(re.sub(r"(?<=.)\.(index|meta|data-\d{5}-of-\d{5})$", "", source.name))
        return prefix if prefix.with_name(prefix.name + ".index").is_file() else None
    found = sorted(path.name.removesuffix(".index") for path in source.glob("*.index"))
    state = source / "checkpoint"
    if state.is_file():
        name = latest(state)
        if name not in found:
            raise FileNotFoundError(f"{source}: holds no {f'{name}.index'!r}, though {state} names it")
        return source / name
    if len(found) > 1:
        raise ValueError(f"{source}: holds {', '.join(found)}, and no file `checkpoint` to tell which; give one's path")
    return source / found[0] if found else None
