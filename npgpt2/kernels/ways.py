"""Which way of multiplying a few rows is fastest, by the kind of kernels that OpenBLAS has for a processor.

`python tools/tune.py ways` measures all of them on a machine, and with `--write` puts its lines here. A kind that has
none gets what is never bad: tiles that stay in each thread's cache, and where BLAS's threads work, whole products.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from npgpt2.kernels.threads import is_sharing, openblas


class Way(NamedTuple):
    """How products of up to so many rows are made: in one of the ways of `matmul`, by tiles of so many bytes.

    "whole" has no tiles, and those of "small tiles" depend on the rows: their bytes are 0.
    """

    rows: int
    way: Literal["rows", "tiles", "small tiles", "whole"]
    tile_bytes: int


# Each part of a product, on one thread. More rows than the last has go as a whole.
ALONE = {
    "Haswell": [
        Way(2, "rows", 786432),
        Way(6, "rows", 262144),
        Way(16, "tiles", 786432),
    ],
    "SkylakeX": [
        Way(80, "small tiles", 0),
    ],
}
# A product that BLAS's threads do together, of two cores.
TOGETHER = {
    "Haswell": [
        Way(3, "rows", 2097152),
        Way(24, "tiles", 786432),
    ],
    "SkylakeX": [
        Way(6, "rows", 2097152),
        Way(48, "tiles", 786432),
    ],
}
# Kinds that have the same kernels for these products.
SAME = {"Zen": "Haswell", "Cooperlake": "SkylakeX", "SapphireRapids": "SkylakeX"}


def kind() -> str:
    """The kind of kernels at hand, after the processor that they were made for; "other" where BLAS is no OpenBLAS."""
    blas = openblas()
    return SAME.get(blas.kernels, blas.kernels) if blas else "other"


def copies() -> bool:
    """Whether BLAS copies small matrices before it multiplies them; with AVX-512, it multiplies them where they lie."""
    return kind() != "SkylakeX"


def way_for(rows: int) -> Way | None:
    """How this thread is to multiply so many rows, more than one; None as a whole."""
    ways = ALONE.get(kind(), [Way(24, "tiles", 786432)]) if is_sharing() else TOGETHER.get(kind(), [])
    way = next((way for way in ways if rows <= way.rows), None)
    return None if way is None or way.way == "whole" else way
