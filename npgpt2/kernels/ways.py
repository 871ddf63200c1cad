"""Which way of multiplying a few rows is fastest, by the kind of kernels that OpenBLAS has for a processor.

`python tools/tune.py ways` measures all of them on a machine, and writes its lines here. A kind that has none gets what
is never bad: some rows together by tiles that stay in the cache, and anything else as a whole.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from npgpt2.kernels.threads import is_sharing, openblas


class Way(NamedTuple):
    """How products of up to so many rows are made: in one of the ways of `matmul`, by tiles of so many bytes."""

    rows: int
    way: Literal["rows", "tiles", "small tiles"]
    tile_bytes: int


# Each part of a product, on one thread.
ALONE = {
    "Haswell": [Way(6, "rows", 262144), Way(8, "tiles", 786432)],
    "SkylakeX": [Way(80, "small tiles", 0)],
}
# A product that BLAS's threads do together.
TOGETHER = {
    "Haswell": [Way(4, "rows", 2097152), Way(32, "tiles", 786432)],
    "SkylakeX": [Way(6, "small tiles", 0)],
}
# Kinds that have the same kernels for these products.
SAME = {"Zen": "Haswell", "Cooperlake": "SkylakeX", "SapphireRapids": "SkylakeX"}


def kind() -> str:
    """The kind of kernels at hand, after the processor that they were made for; "other" where BLAS is no OpenBLAS."""
    blas = openblas()
    return SAME.get(blas.kernels, blas.kernels) if blas else "other"


def way_for(rows: int) -> Way | None:
    """How this thread is to multiply so many rows, more than one; None as a whole."""
    ways = ALONE.get(kind(), [Way(24, "tiles", 786432)]) if is_sharing() else TOGETHER.get(kind(), [])
    return next((way for way in ways if rows <= way.rows), None)
