"""What has been read: every sequence's keys and values in each layer, in slots of one array that are used again.

A slot has room for a full window of n_ctx positions. The system gives memory for them once they are written to, so that
slots cost nothing until they are used: 74 kB a position in 124M.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from npgpt2 import kernels, model
from npgpt2.formulas import Array
from npgpt2.kernels import BYTES_WORTH, THREAD_WORTH, Matrices, causal_attention, decode_attention, share
from npgpt2.model import HParams, Ids

# Bytes of keys and values that are worth reading for nothing, to save a call of `decode_attention`: about what memory
# brings in its time: `python tools/tune.py cache` measures both.
CALL_WORTH = 200_000


class Span(NamedTuple):
    """New positions of a sequence, a row of the pass each: `start` to `stop` in a slot."""

    slot: int
    start: int
    stop: int


class Slots:
    """Room for the keys and values of several sequences.

    k, v: (n_layer, n_slots, H, n_ctx, D) float32. MemoryError where the system has no room for so many.
    """

    def __init__(self, hparams: HParams, n_slots: int) -> None:
        self._hparams = hparams
        head = hparams.n_embd // hparams.n_head
        shape = (hparams.n_layer, n_slots, hparams.n_head, hparams.n_ctx, head)
        self.k, self.v = _memory_for(shape), _memory_for(shape)

    def read(self, matrices: Matrices, tokens: Sequence[int], spans: Sequence[Span], wanted: Sequence[int]) -> Array:
        """Read the next tokens of some sequences in one pass, with the fast kernels, and keep what they leave behind.

        tokens: (N,), a row each · spans: where these stand, in the order of `Reading` · wanted: the M rows whose logits
        are needed → (M, V)
        """
        memory = Reading(self, spans)
        with kernels.sharing_work(matrices, len(tokens), len(spans)):
            return model.forward(
                matrices,
                self._hparams,
                np.array(tokens),
                memory.positions,
                memory,
                np.array(wanted, np.intp),
                kernels,
            )

    def copy(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Let another slot begin with the same positions; those before `start` are the same already."""
        for array in (self.k, self.v):
            array[:, target, :, start:length] = array[:, source, :, start:length]

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Forget values that may not be finite, since weights of 0 don't hide those. Others may stay behind."""
        if start < stop:
            self.v[:, slot, :, start:stop] = 0


def _memory_for(shape: tuple[int, ...]) -> Array:
    """An array whose pages take no memory until they are written to.

    Those that np.empty gives are of 2 MB, which would all be written to by the first positions.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    if sys.platform == "linux":  # so that the system doesn't count what may never be used
        private["flags"] |= 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    try:
        memory = mmap.mmap(-1, 4 * prod(shape), **private)  # type: ignore[arg-type, unused-ignore]
    except OSError as error:
        wanted = f"{4 * prod(shape):,} bytes for the keys and values of {shape[1]} sequences"
        raise MemoryError(f"{wanted}; fewer slots, or a smaller batch, take less") from error
    with suppress(AttributeError, OSError):  # where the system would give large pages unasked
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)


class Run(NamedTuple):
    """Neighbours whose attention is one call: rows first to last, in slots from `slot` on, of up to S positions."""

    first: int
    last: int
    slot: int
    S: int
    hidden: npt.NDArray[np.bool_] | None  # (last - first, S): what is no position of the sequence


class Reading:
    """The memory of one pass, in which each sequence's new rows see what its slot holds, and are kept there.

    spans: the pass's rows, those of single positions first, in the order of their slots
    """

    def __init__(self, slots: Slots, spans: Sequence[Span]) -> None:
        self.positions: Ids = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        self._slots = slots
        self._singles = [span for span in spans if span.stop - span.start == 1]
        self._longer = spans[len(self._singles) :]
        self._runs: dict[tuple[int, int], list[Run]] = {}
        numbers = np.array(self._singles, np.intp).reshape(-1, 3)
        self._at = (numbers[:, 0], slice(None), numbers[:, 1])  # where their keys and values go, in a layer
        bytes_each = 8 * self._slots.k[0, 0, :, 0].size * max(numbers[:, 2], default=1)
        self._worth = max(1, BYTES_WORTH // bytes_each)  # how many of them are worth a thread

    def attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Attention of each row over its sequence's positions up to itself. q, k, v: (H, N, D) → (N, C)."""
        H, N, D = q.shape
        y = np.empty((N, H * D), np.float32)
        keys, values = self._slots.k[layer], self._slots.v[layer]  # (n_slots, H, n_ctx, D)
        if B := len(self._singles):
            q1, k1, v1 = (rows[:, :B].transpose(1, 0, 2) for rows in (q, k, v))  # 3 x (H, N, D) -> 3 x (B, H, D)
            self._attend_singles(q1, k1, v1, keys, values, y)
        for slot, start, stop in self._longer:
            rows = slice(B, B + stop - start)
            self._store(k[:, rows], keys[slot, :, start:stop], v[:, rows], values[slot, :, start:stop])
            y[rows] = causal_attention(q[:, rows], keys[slot, :, :stop], values[slot, :, :stop])
            B = rows.stop
        return y

    def _store(self, k: Array, keys: Array, v: Array, values: Array) -> None:
        def some_heads(first: int, last: int) -> None:
            keys[first:last], values[first:last] = k[first:last], v[first:last]

        share(len(k), some_heads, max(1, THREAD_WORTH // (16 * k[0].size)))  # most of it is waiting for new pages

    def _attend_singles(self, q: Array, k: Array, v: Array, keys: Array, values: Array, y: Array) -> None:
        """q, k, v: (B, H, D) · keys, values: (n_slots, H, n_ctx, D) · y: (N, C), whose first B rows are written."""
        keys[self._at], values[self._at] = k, v

        def some_sequences(first: int, last: int) -> None:
            for run in self._runs_of(first, last):
                at, rows = slice(run.slot, run.slot + run.last - run.first), slice(run.first, run.last)
                decode_attention(q[rows], keys[at, :, : run.S], values[at, :, : run.S], y[rows], run.hidden)

        share(len(q), some_sequences, self._worth)

    def _runs_of(self, first: int, last: int) -> list[Run]:
        """How the attention of some of the single positions is called; the same for all layers."""
        if (first, last) not in self._runs:
            worth = CALL_WORTH // (8 * self._slots.k[0, 0, :, 0].size)  # positions that take as long as a call
            runs: list[Run] = []
            for group in _neighbours(self._singles[first:last], worth):
                stops = np.array([span.stop for span in group])
                hidden = np.arange(stops.max()) >= stops[:, None] if _padding(group) else None
                row = runs[-1].last if runs else first
                runs.append(Run(row, row + len(group), group[0].slot, int(stops.max()), hidden))
            self._runs[first, last] = runs
        return self._runs[first, last]


def _neighbours(spans: Sequence[Span], worth: int) -> list[list[Span]]:
    """Spans of neighbouring slots together, as long as fewer positions are padding than `worth` for each saved call."""
    groups: list[list[Span]] = []
    for span in spans:
        longer = [*groups[-1], span] if groups and span.slot == groups[-1][-1].slot + 1 else []
        if longer and _padding(longer) <= worth * (len(longer) - 1):
            groups[-1] = longer
        else:
            groups.append([span])
    return groups


def _padding(spans: Sequence[Span]) -> int:
    """How many positions are read for nothing where spans are read as if all were as long as the longest."""
    stops = [span.stop for span in spans]
    return len(stops) * max(stops) - sum(stops)
