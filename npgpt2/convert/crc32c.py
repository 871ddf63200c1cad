"""The checksum of TensorFlow's checkpoints, vectorised: CRC-32C (Castagnoli), RFC 3720 appendix B.4.

A message is a polynomial over the field of two elements, whose coefficients are its bits, and its checksum is the
remainder of dividing it by another of degree 32. NumPy has no instruction for that, but it can add polynomials (XOR),
and that is enough: see CRC_DISTANCES.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def _crc_table() -> list[int]:
    """The remainder of every byte: the classic table, for the reflected polynomial 0x82F63B78."""
    table = list(range(256))
    for _ in range(8):
        table = [(value >> 1) ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


CRC_TABLE = _crc_table()
# The polynomial divides x^5685 + x^1362 + x^426 + 1, and therefore, squaring, every (x^n)^5685 + … + 1 with n a power
# of two. A piece of the message can thus be removed by adding it (XOR) at these three distances behind itself. That is
# one operation on a whole slice of up to the first distance, where a table would take one lookup a byte.
CRC_DISTANCES = (5685 - 1362, 5685 - 426, 5685)
CRC_CHUNK = 4 * 2**20


def _fold(message: Bytes, grain: int) -> Bytes:
    """Shorten a message to at most 5685 * `grain` bytes with the same remainder, overwriting it on the way."""
    step, middle, reach = (distance * grain for distance in CRC_DISTANCES)
    start = 0
    while (size := min(step, len(message) - start - reach)) > 0:
        piece = message[start : start + size]
        for distance in (step, middle, reach):
            message[start + distance : start + distance + size] ^= piece
        start += size
    return message[start:]


def crc32c(data: Bytes | bytes) -> int:
    """The CRC-32C (Castagnoli) checksum, RFC 3720 appendix B.4; several GB/s for large arrays.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    message: Bytes = np.frombuffer(data, np.uint8)
    rest: Bytes = np.empty(0, np.uint8)
    crc = 0xFFFFFFFF
    if len(message) > CRC_DISTANCES[-1]:
        # Starting from all ones is the same as starting from zero with the first 32 bits inverted.
        crc = 0
        for start in range(0, len(message), CRC_CHUNK):
            chunk = np.concatenate([rest, message[start : start + CRC_CHUNK]])
            if start == 0:
                chunk[:4] ^= 0xFF
            rest = _fold(chunk, 64)
        message = _fold(rest, 1)
    for byte in message.tolist():
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def unmask(crc: int) -> int:
    """Undo the rotation by 15 bits and the addition by which LevelDB and TensorFlow disguise stored checksums."""
    crc = (crc - 0xA282EAD8) & 0xFFFFFFFF
    return ((crc << 15) | (crc >> 17)) & 0xFFFFFFFF
