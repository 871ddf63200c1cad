"""Who does the work of a forward pass: our threads, or BLAS's; and about how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from npgpt2.kernels.int8 import Matrices
from npgpt2.kernels.threads import THREAD_WORTH, count_threads, sharing
from npgpt2.kernels.ways import copies

# What a pass of one row takes: weights come from memory at so many bytes a second, and the calls of each layer take so
# many seconds. And how many times as long more rows take: `python tools/tune.py drafts` measures all three.
BANDWIDTH, CALLS = 2e10, 5e-5
ROWS = {1: 1.0, 2: 1.3, 4: 1.6, 8: 2.1, 16: 2.8, 32: 4.5, 128: 13.0, 512: 45.0}
# What a number in int8 takes, as bytes: widening it takes time too.
INT8_BYTES = 2.7


def time_of_pass(numbers: int, layers: int, rows: int, in_int8: bool = False) -> float:
    """About how many seconds a pass of one sequence's rows takes, to be compared with others.

    numbers: how many a model has, in all its layers · in_int8: whether they are

    >>> time_of_pass(10**9, 12, rows=8) < 3 * time_of_pass(10**9, 12, rows=1)
    True
    """
    fetching = numbers * (INT8_BYTES if in_int8 else 4) / BANDWIDTH
    return float(fetching * np.interp(rows, [*ROWS], [*ROWS.values()]) + layers * CALLS)


@contextmanager
def sharing_work(weights: Matrices, rows: int, sequences: int = 1) -> Iterator[None]:
    """Meanwhile, this thread's kernels work as is best for a pass of so many rows, of so many sequences.

    In a pass that is worth it they divide their work among our threads; in others BLAS divides each product by itself.
    Small products, and those of one row, are over before threads of Python's have met; in int8 they take longer. The
    rows of one sequence are guesses, between single rows, after which BLAS's threads stay awake for a while, in ours'
    way; or a prompt, often after a rest, from which ours wake more slowly: so it takes more of them. Two rows of
    several sequences are worth it only where BLAS makes no copies of what it multiplies. `python tools/tune.py passes`
    shows all of it.
    """
    largest = rows * 4 * weights.width**2  # multiplications, of the rows and a matrix (C, 4C)
    if weights.in_int8:
        worth = 2
    elif sequences > 1:
        worth = 8 if copies() else 4
    else:
        worth = 96
    divided = largest >= worth * THREAD_WORTH and (weights.in_int8 or rows > 1)
    divided = divided or (weights.threads or count_threads()) == 1  # which works as each of ours does
    # What overflows ends in logits that are not finite, which those who use them refuse with a message of their own.
    with np.errstate(over="ignore", invalid="ignore"), sharing(weights.threads, divided):
        yield
