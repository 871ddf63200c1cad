"""The vectorised checksum: against RFC 3720's examples, and against a version that goes a byte and a bit at a time."""

import numpy as np
import pytest

from npgpt2.convert.crc32c import CRC_CHUNK, CRC_DISTANCES, crc32c, unmask

# x^32 + x^28 + … + 1, the highest power as the highest bit.
CASTAGNOLI = 0x11EDC6F41
# A SCSI read command, the last example of RFC 3720 appendix B.4.
READ_COMMAND = bytes.fromhex(
    "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018 28000000 00000000 02000000 00000000"
)


def bitwise(state, byte):
    """The checksum's state after one more byte, bit by bit."""
    state ^= byte
    for _ in range(8):
        state = (state >> 1) ^ (0x82F63B78 * (state & 1))
    return state


def naive_prefixes(message, lengths):
    """The checksums of the first n bytes of a message, for every n in `lengths`, from one pass over it."""
    table = [bitwise(0, byte) for byte in range(256)]
    checksums, state, start = {}, 0xFFFFFFFF, 0
    for length in sorted(lengths):
        for byte in message[start:length]:
            state = (state >> 8) ^ table[(state ^ byte) & 0xFF]
        start = length
        checksums[length] = state ^ 0xFFFFFFFF
    return checksums


@pytest.mark.parametrize(
    ("message", "checksum"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (READ_COMMAND, 0xD9963A56),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_rfc_3720(message, checksum):
    assert crc32c(message) == checksum
    state = 0xFFFFFFFF
    for byte in message:
        state = bitwise(state, byte)
    assert state ^ 0xFFFFFFFF == checksum


def test_equals_the_naive_version_around_every_boundary():
    reach = CRC_DISTANCES[-1]
    # One lookup a byte up to here; folded by single bytes; folded by 64; in chunks, the second of which takes up what
    # folding the first one left.
    boundaries = [CRC_DISTANCES[0], CRC_DISTANCES[1], 64 * reach, 65 * reach, CRC_CHUNK, CRC_CHUNK + 64 * reach]
    lengths = {*range(65), *range(5680, 5701), 2 * reach, 3 * reach + 1, 100_000}
    lengths |= {boundary + offset for boundary in boundaries for offset in (-4, -1, 0, 1, 2, 5)}
    message = np.random.default_rng(0).integers(256, size=max(lengths), dtype=np.uint8)
    for length, checksum in naive_prefixes(message.tobytes(), lengths).items():
        assert crc32c(message[:length]) == checksum, length


def test_a_message_of_several_chunks():
    """Zeros in front of a message change the state in a way that can be computed by itself, bit by bit."""
    size = 2 * CRC_CHUNK + 12345
    tail = bytes(range(256))
    message = np.zeros(size + len(tail), np.uint8)
    message[size:] = np.frombuffer(tail, np.uint8)
    table = [bitwise(0, byte) for byte in range(256)]
    state = 0xFFFFFFFF
    for _ in range(size):
        state = (state >> 8) ^ table[state & 0xFF]
    for byte in tail:
        state = (state >> 8) ^ table[(state ^ byte) & 0xFF]
    assert crc32c(message) == state ^ 0xFFFFFFFF


def test_every_single_bit_counts():
    message = np.random.default_rng(1).integers(256, size=70 * 5685, dtype=np.uint8)
    whole = crc32c(message)
    for position in [*range(0, len(message), 9973), len(message) - 1]:
        message[position] ^= 1 << position % 8
        assert crc32c(message) != whole, position
        message[position] ^= 1 << position % 8
    assert crc32c(message) == whole


def test_the_message_is_left_as_it_was():
    message = np.random.default_rng(2).integers(256, size=500_000, dtype=np.uint8)
    before = message.copy()
    message.flags.writeable = False
    crc32c(message)
    np.testing.assert_array_equal(message, before)


def test_works_piece_by_piece(allocated_peak):
    message = np.ones(40 * 2**20, np.uint8)
    assert allocated_peak(lambda: crc32c(message)) < 3 * CRC_CHUNK


def test_the_distances_are_those_of_a_multiple_of_the_polynomial():
    near, middle, far = CRC_DISTANCES
    remainder = 1 << far | 1 << far - near | 1 << far - middle | 1
    while remainder.bit_length() >= CASTAGNOLI.bit_length():
        remainder ^= CASTAGNOLI << remainder.bit_length() - CASTAGNOLI.bit_length()
    assert remainder == 0


def test_unmask_undoes_leveldb_s_mask():
    assert unmask(0xA282EAD8) == 0
    for crc in [0, 1, 0xFFFFFFFF, 0x80000000, *np.random.default_rng(3).integers(2**32, size=100).tolist()]:
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        assert unmask(masked) == crc
