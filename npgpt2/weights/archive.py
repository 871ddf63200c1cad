"""A zip file that is mapped into memory: where its members lie, and their bytes, within bounds and checked.

zipfile reads the directory, and no more. Members that it read would come from a position in the file that a forked
process shares with its parent, and from behind a lock that it can inherit taken, by a thread that it hasn't got.
"""

from __future__ import annotations

import codecs
import io
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from npgpt2.forks import whole
from npgpt2.models import open_model

# Bytes that are checked at once: few enough to stay in the cache for what is done with them next.
CHUNK = 2**20
# Compressed bytes that are expanded at once. What of them doesn't fit into a CHUNK is copied.
COMPRESSED_CHUNK = 2**16
# A member's compression, as zip files number it.
STORED, DEFLATED = 0, 8
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # its signature, and the lengths of the name and of the extra field behind it
# Bits of a member's flags by which it isn't plainly there.
_REFUSED = {0x1: "it is encrypted", 0x20: "it is a patch", 0x40: "it is encrypted"}


class Damaged(Exception):
    """A member's bytes are not what the directory says."""


class Member(NamedTuple):
    """A member of the file, as its directory says, which may lie about all but that it ends before the file does."""

    name: str
    start: int  # where its bytes begin in the file
    size: int  # and how many they are there
    expanded: int  # how many they are once they are expanded
    checksum: int
    deflated: bool

    @property
    def end(self) -> int:
        """Where its bytes end in the file."""
        return self.start + self.size


class _Written(NamedTuple):
    """Which file it is, and when and how long it was written."""

    file: tuple[int, int]
    size: int
    time: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Written:
        return cls((status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns)


class Archive:
    """A zip file, mapped into memory. What is damaged raises ValueError, which says what to do.

    It holds nothing that changes: threads and forked processes can use it without knowing of each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = path.absolute()  # now, since the program may go to another folder
        with whole("import"):
            import zipfile  # here, since it takes a twentieth of what `import npgpt2` does

            codecs.lookup("cp437")  # a module, which zipfile asks for at the first name
        # What zipfile raises on files that are damaged, or packed in a way that it doesn't know.
        errors = (zipfile.BadZipFile, struct.error, RuntimeError, EOFError, OSError, OverflowError, ValueError)
        with open_model(path) as file:  # what the system refuses has the system's own message
            self._opened = None if isinstance(file, io.BytesIO) else _Written.of(os.fstat(file.fileno()))
            try:
                with zipfile.ZipFile(file) as directory:
                    infos = directory.infolist()
            except errors as error:
                raise self.broken(f"not a model file, or cut short ({error})") from None
            if isinstance(file, io.BytesIO):
                self._map, self.bytes = None, memoryview(file.getvalue())
            else:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.bytes = memoryview(self._map)
                with suppress(AttributeError, OSError):  # decoding is 2 % faster with large pages, if there are any
                    self._map.madvise(mmap.MADV_HUGEPAGE)
        self._infos = {info.filename: info for info in infos}
        if len(self._infos) != len(infos):
            raise self.broken("two members have the same name")

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that stand for all members' contents, by the checksums that they are held to."""
        with whole("import"):
            from hashlib import blake2b  # here, since what generates doesn't need it

        members = sorted((info.filename, info.CRC, info.file_size) for info in self._infos.values())
        return blake2b(repr(members).encode(), digest_size=8).hexdigest()

    def check_unchanged(self) -> None:
        """Raise ValueError where the file was written to after it was opened; another that has its name now is no
        change.
        """
        try:
            now = _Written.of(os.stat(self._place))
        except OSError:  # it has no name any more
            return
        if self._opened and now != self._opened and now.file == self._opened.file:
            raise ValueError(f"{self.path}: was changed while it was open; load it again")

    def broken(self, what: str) -> ValueError:
        """An error about this file."""
        try:
            self.check_unchanged()
        except ValueError as error:
            return error
        # What zipfile and NumPy say can quote 64 KB of the file.
        return ValueError(f"{self.path}: {what[:300]}; convert or download the model again")

    def __len__(self) -> int:
        return len(self._infos)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def find(self, name: str, title: str) -> Member:
        """Locate a member, which must be there, packed in one of NumPy's two ways; errors call it `title`."""
        info = self._infos.get(name)
        if info is None:
            raise self.broken(f"{name} is missing from it")
        if info.compress_type not in (STORED, DEFLATED):
            raise self.broken(f"{name} is compressed by method {info.compress_type}, which NumPy doesn't use")
        for bit, reason in _REFUSED.items():
            if info.flag_bits & bit:
                raise self.broken(f"{title} can't be read ({reason})")
        at = info.header_offset  # of any size, and negative too where the directory says nonsense
        local = self.bytes[at : at + _LOCAL_HEADER.size] if at >= 0 else b""
        signature, *lengths = _LOCAL_HEADER.unpack(local) if len(local) == _LOCAL_HEADER.size else (b"", 0, 0)
        if signature != b"PK\x03\x04":
            raise self.broken(f"{title} has no zip header where one is expected")
        name_at = at + _LOCAL_HEADER.size
        if self.bytes[name_at : name_at + lengths[0]] != name.encode():
            raise self.broken(f"{title} can't be read (its header has another name)")
        deflated = info.compress_type == DEFLATED
        member = Member(name, name_at + sum(lengths), info.compress_size, info.file_size, info.CRC, deflated)
        if member.end > len(self.bytes):
            raise self.broken(f"{title} is cut short")
        return member

    def beginning(self, member: Member, limit: int) -> bytes:
        """The first bytes of a member, at most so many, unchecked; `Damaged` where they can't be expanded."""
        return b"".join(self._unchecked(member, min(limit, member.expanded)))

    def pieces(self, member: Member) -> Iterator[bytes | memoryview]:
        """A member's bytes, a CHUNK after the other: no more than it says that it has, but maybe fewer.

        Raises `Damaged` where they can't be expanded, or once all have come and their checksum is another.
        """
        checksum = 0
        for piece in self._unchecked(member, member.expanded):
            checksum = zlib.crc32(piece, checksum)
            yield piece
        if checksum != member.checksum:
            raise Damaged("its checksum is wrong")

    def _unchecked(self, member: Member, limit: int) -> Iterator[bytes | memoryview]:
        data = self.bytes[member.start : member.end]
        return _inflated(data, limit) if member.deflated else _slices(data[:limit], CHUNK)

    def forget(self, member: Member) -> None:
        """Let the system have the memory of a part of the file that isn't needed any more."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED") and member.size:
            start = member.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, member.end - start)


def _slices(data: memoryview, size: int) -> Iterator[memoryview]:
    return (data[start : start + size] for start in range(0, len(data), size))


def _inflated(data: memoryview, limit: int) -> Iterator[bytes]:
    """Expand deflated bytes, to no more than `limit` of them, whatever there is."""
    expander = zlib.decompressobj(-zlib.MAX_WBITS)
    for compressed in _slices(data, COMPRESSED_CHUNK):
        unread: bytes | memoryview = compressed
        while limit and not expander.eof:
            wanted = min(limit, CHUNK)
            try:
                piece = expander.decompress(unread, wanted)
            except zlib.error as error:
                raise Damaged(str(error)) from None
            yield piece
            limit -= len(piece)
            unread = expander.unconsumed_tail
            if len(piece) < wanted:  # there was room for more, so that all of `compressed` is in it
                break
