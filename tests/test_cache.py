"""The slots of keys and values: memory that is taken as positions are filled, and attention over all of them."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt2 import HParams, formulas
from npgpt2.engine import Reading, Slots, Span, cache
from npgpt2.kernels import threads

HPARAMS = HParams(n_vocab=5, n_ctx=12, n_embd=6, n_head=2, n_layer=2)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3)), min_size=1, max_size=6),
    worth=st.sampled_from([0, 100, 10**6]),
    count=st.integers(1, 3),
)
def test_every_row_sees_its_own_sequence_up_to_itself(lengths, worth, count):
    """Single positions and pieces, in slots of which some are left out, in calls of one or of many, by some threads."""
    slots = Slots(HPARAMS, 6)
    slots.k[:], slots.v[:] = random(*slots.k.shape), random(*slots.v.shape, seed=1)
    spans = [Span(slot, start, min(12, start + n)) for slot, (start, n) in enumerate(lengths) if n]
    spans.sort(key=lambda span: span.stop - span.start > 1)
    n = sum(span.stop - span.start for span in spans)
    if not n:
        return
    q, k, v = (random(2, n, 3, seed=seed) for seed in (2, 3, 4))
    with pytest.MonkeyPatch.context() as patch, threads.sharing(count):
        patch.setattr(cache, "CALL_WORTH", worth)
        patch.setattr(cache, "THREAD_WORTH", 1)
        patch.setattr(cache, "BYTES_WORTH", 1)
        y = Reading(slots, spans).attend(1, q, k, v)
    row = 0
    for slot, start, stop in spans:
        rows = slice(row, row := row + stop - start)
        np.testing.assert_array_equal(slots.k[1, slot, :, start:stop], k[:, rows])
        np.testing.assert_array_equal(slots.v[1, slot, :, start:stop], v[:, rows])
        own = slots.k[1, slot, :, :stop], slots.v[1, slot, :, :stop]
        np.testing.assert_allclose(y[rows], formulas.causal_attention(q[:, rows], *own), rtol=0, atol=1e-5)


def test_positions_are_those_of_the_spans():
    reading = Reading(Slots(HPARAMS, 3), [Span(2, 4, 5), Span(0, 3, 6)])
    assert reading.positions.tolist() == [4, 3, 4, 5]


def runs(lengths, slots=None):
    spans = [Span(slot, length - 1, length) for slot, length in zip(slots or range(9), lengths, strict=False)]
    n_ctx = max(lengths)
    hparams = HParams(n_vocab=5, n_ctx=n_ctx, n_embd=768, n_head=12, n_layer=1)
    return [(run.first, run.last) for run in Reading(Slots(hparams, 9), spans)._runs_of(0, len(spans))]


def test_neighbours_of_about_the_same_length_are_one_call():
    """With 768 numbers, 32 positions take as long as a call."""
    assert runs([500] * 4) == [(0, 4)]
    assert runs([500, 490, 510, 505]) == [(0, 4)]
    assert runs([500, 500, 10, 500]) == [(0, 2), (2, 3), (3, 4)]
    assert runs([500] * 3, slots=[0, 1, 3]) == [(0, 2), (2, 3)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system doesn't say how much memory is in use")
def test_slots_take_memory_for_the_positions_that_they_hold():
    """Every layer's and head's positions lie in pages of their own, which hold 16 of them, or up to 256."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    hparams = HParams(n_vocab=10, n_ctx=4096, n_embd=256, n_head=4, n_layer=8)
    slots, before, position = Slots(hparams, 16), resident(), 2 * 8 * 256 * 4
    assert slots.k.nbytes == 16 * 4096 * position / 2
    for length in (256, 512, 2048):
        slots.k[:, 3, :, :length], slots.v[:, 3, :, :length] = 1, 1
        assert abs(resident() - before - length * position) < 10**6


def test_slots_that_there_is_no_memory_for_are_a_memory_error(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(cache.mmap, "mmap", refuse)
    with pytest.raises(
        MemoryError,
        match="1,728 bytes for the keys and values of 3 sequences; fewer slots",
    ):
        Slots(HPARAMS, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_fills_a_copy_of_the_slots():
    program = """if True:
        import os, sys
        from npgpt2 import HParams
        from npgpt2.engine import Slots
        slots = Slots(HParams(n_vocab=5, n_ctx=4, n_embd=2, n_head=1, n_layer=1), 1)
        if not os.fork():
            slots.k[:] = 1
            os._exit(0)
        os.wait()
        sys.exit(int(slots.k.sum()))
    """
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
