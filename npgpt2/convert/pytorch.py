"""Reads what `torch.save` writes, without PyTorch: names, numbers, and where the tensors lie in the file.

The file is a zip of a pickle and of raw arrays, the storages, of which the tensors are views. Before PyTorch 1.6 it was
five pickles, one behind the other, and then the storages. What pickles can say is in `pickles.py`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from npgpt2.convert.pickles import ITEM_SIZES, Machine, View
from npgpt2.weights.archive import Archive, Damaged

Bytes = npt.NDArray[np.uint8]

# A checkpoint of 1558M and its optimizer takes 233 kB.
PICKLE_LIMIT = 4 * 2**20
# How many times as large as the file its tensors may be: they can repeat a few numbers without end.
LARGEST_EXPANSION = 16
FLOATS = ("float32", "float16", "bfloat16", "float64")
# Under which names programs that train save the model beside other things: nanoGPT, Lightning, PyTorch's tutorials.
STATE_DICTS = ("model", "state_dict", "model_state_dict")

# The beginnings of the two kinds of files; the older one's is a pickle of a number.
ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


class Tensor(NamedTuple):
    """A tensor and the file that it is in."""

    file: PyTorchFile
    view: View

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def transposed(self) -> Tensor:
        """The same numbers, with the dimensions in the opposite order."""
        return self._replace(view=self.view.transposed)

    def read(self, name: str) -> tuple[Bytes, str]:
        """Its bytes, little-endian and without gaps, and its type, which must be a float; errors call it `name`."""
        if self.view.dtype not in FLOATS:
            raise ValueError(f"{self.file.path}: tensor {name} has type {self.view.dtype}, not {', '.join(FLOATS)}")
        return self.file.read(self.view), self.view.dtype


class _Zip(Archive):
    def broken(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what[:300]}; download it again, or save it again")


def pointer(path: Path) -> ValueError:
    """The error for what git keeps in the place of a large file."""
    return ValueError(f"{path}: is Git LFS's note of a file that wasn't fetched; fetch it with: git lfs pull")


class PyTorchFile:
    """What `torch.save` wrote: `saved` is that, with a `View` for each tensor, whose numbers are read when asked for.

    Files that are damaged, or hold anything but plain values, containers and tensors, raise ValueError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved: Any
        self._find: Callable[[str], tuple[int, int]]  # where the storage of a key begins in the file, and its size
        with open(path, "rb") as file:
            begins = file.read(len(LEGACY))
            if begins.startswith(ZIP):
                self._open_zip()
            elif begins == LEGACY:
                self._open_legacy(file)
            elif begins.startswith(b"version "):
                raise pointer(path)
            else:
                raise ValueError(f"{path}: not a file that torch.save writes, or cut short")

    def _run(self, machine: Machine, data: io.BytesIO) -> Any:
        try:
            return machine.run(data)
        except ValueError as error:
            raise ValueError(f"{self.path}: pickle: {error}") from None

    def _open_zip(self) -> None:
        self._zip, self._checked = _Zip(self.path), set[str]()
        pickles = [name for name in self._zip if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise ValueError(f"{self.path}: a zip file, but not one that torch.save writes (it has no data.pkl)")
        root = pickles[0].removesuffix("data.pkl")
        self._find = lambda key: self._member(f"{root}data/{key}")
        texts = {}
        for name, limit in ((f"{root}byteorder", 6), (pickles[0], PICKLE_LIMIT)):
            if name in self._zip:
                at, size = self._member(name)
                if size > limit:
                    raise self._zip.broken(f"{name} has {size:,} bytes, more than the {limit:,} that it can have")
                texts[name] = bytes(self._zip.bytes[at : at + size])
        if texts.get(f"{root}byteorder", b"little") != b"little":
            raise ValueError(f"{self.path}: was written on a big-endian machine, which is not supported")
        self.saved = self._run(Machine(), io.BytesIO(texts[pickles[0]]))

    def _member(self, name: str) -> tuple[int, int]:
        """Where a member of the zip file begins, and its size; its checksum is verified, once."""
        member = self._zip.find(name, shortened(name))
        if member.deflated:
            raise self._zip.broken(f"{name} is compressed, which torch.save doesn't do")
        # PyTorch can be told to leave checksums out (set_crc32_options), and then writes 0.
        if name not in self._checked and member.checksum:
            try:
                for _ in self._zip.pieces(member):
                    pass
            except Damaged as error:
                raise self._zip.broken(f"{name} is damaged ({error})") from None
            self._zip.forget(member)
        self._checked.add(name)
        return member.start, member.size

    def _open_legacy(self, file: BinaryIO) -> None:
        """Read the pickles, and note where each storage lies: behind them, in the order of the last pickle's keys."""
        file.seek(0)
        data, machine = io.BytesIO(file.read(PICKLE_LIMIT)), Machine()
        _magic, version, system, self.saved, keys = (self._run(machine, data) for _ in range(5))
        if version != 1001 or type(system) is not dict or type(keys) is not list:
            raise ValueError(f"{self.path}: not a file that torch.save writes, or damaged")
        if system.get("little_endian") is not True:
            raise ValueError(f"{self.path}: was written on a big-endian machine, which is not supported")
        places, at, end = {}, data.tell(), file.seek(0, 2)
        for key in keys:
            storage = machine.storages.get(key) if type(key) is str else None
            if storage is None:
                raise ValueError(f"{self.path}: holds numbers that belong to no tensor; it is damaged")
            if at + 8 + storage.size > end:
                break
            file.seek(at)
            if int.from_bytes(file.read(8), "little") * ITEM_SIZES.get(storage.dtype or "", 1) != storage.size:
                raise ValueError(f"{self.path}: holds another number of numbers than its tensors have; it is damaged")
            places[key] = at + 8, storage.size
            at += 8 + storage.size
        if len(places) != len(machine.storages):
            raise ValueError(f"{self.path}: {end:,} bytes, cut short before the end of its numbers")
        self._find = places.__getitem__

    def state_dict(self) -> dict[str, Tensor]:
        """The model's tensors by name: what was saved, or what that has under one of the names in `STATE_DICTS`."""
        if type(self.saved) is not dict:
            raise ValueError(f"{self.path}: holds no tensors by name, as a model's state_dict() has them")
        inner = [self.saved[name] for name in STATE_DICTS if type(self.saved.get(name)) is dict]
        values = inner[0] if inner else self.saved
        views = {name: view for name, view in values.items() if type(name) is str and type(view) is View}
        size = sum(view.nbytes for view in views.values())
        if size > LARGEST_EXPANSION * self.path.stat().st_size:
            raise ValueError(
                f"{self.path}: its tensors repeat its numbers until they are {size:,} bytes; it is refused"
            )
        return {name: Tensor(self, view) for name, view in views.items()}

    def read(self, tensor: View) -> Bytes:
        """A tensor's bytes in the order of its dimensions. Of the file, only its own storage is read."""
        if 0 in tensor.shape:
            return np.empty(0, np.uint8)
        start, size = self._find(tensor.storage.key)
        if size != tensor.storage.size:
            wanted = tensor.storage.size
            raise ValueError(f"{self.path}: a storage has {size:,} bytes instead of {wanted:,}; it is damaged")
        item_size = ITEM_SIZES[tensor.dtype]
        with open(self.path, "rb") as file:
            file.seek(start + item_size * tensor.offset)
            data = np.fromfile(file, np.uint8, item_size * tensor.reach)
        if len(data) != item_size * tensor.reach:
            raise ValueError(f"{self.path}: cut short while it was read")
        # The stride of a dimension of one is never used, and can be any number.
        strides = [item_size * stride * (n > 1) for n, stride in zip(tensor.shape, tensor.strides, strict=True)]
        numbers: npt.NDArray[Any] = np.ndarray(tensor.shape, f"<u{item_size}", data, 0, strides)
        return np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
