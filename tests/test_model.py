"""The forward pass against the naive one, and against itself: all ways of reading the same tokens agree."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import naive
import numpy as np
import pytest

import npgpt2
from npgpt2.convert import convert
from npgpt2.model import Cache, HParams, forward, variable_shapes

FIXTURES = ["tiny", "finetuned", "dtypes", "hf", "hf-sharded", "tiny in int8"]


@pytest.fixture(scope="module", params=FIXTURES)
def any_model(request, fixtures, tmp_path_factory):
    output = tmp_path_factory.mktemp("models") / f"{request.param}.npz"
    name, _, dtype = request.param.partition(" in ")
    return npgpt2.load(convert(fixtures / name, output, dtype=dtype or "float32").path)


def random_tokens(model, length, seed=0):
    return np.random.default_rng(seed).integers(model.hparams.n_vocab, size=length)


def step_by_step(model, tokens):
    cache = Cache(model.hparams)
    return np.concatenate(
        [forward(model.matrices, model.hparams, [tokens[t : t + 1]], [cache]) for t in range(len(tokens))]
    )


@pytest.mark.parametrize("name", ["tiny", "finetuned", "hf", "hf-sharded"])
def test_logits_equal_those_that_tensorflow_or_transformers_recorded(name, fixtures, tmp_path):
    recorded = np.load(fixtures / name / "expected.npz")
    model = npgpt2.load(convert(fixtures / name, tmp_path / "model.npz").path)
    logits = model.logits(recorded["tokens"])
    assert logits.shape == recorded["logits"].shape
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=2e-4)


def test_greedy_tokens_equal_those_that_tensorflow_recorded(model, fixtures):
    recorded = np.load(fixtures / "tiny" / "expected.npz")
    read = recorded["tokens"].shape[1]
    generated = model.generate_tokens(recorded["tokens"], length=recorded["greedy"].shape[1] - read)
    np.testing.assert_array_equal(generated, recorded["greedy"][:, read:])
    np.testing.assert_allclose(model.logits(recorded["greedy"])[:, -1], recorded["last_logits"], rtol=0, atol=2e-4)


def test_logits_equal_the_naive_ones(any_model):
    tokens = random_tokens(any_model, min(48, any_model.hparams.n_ctx))
    expected = naive.logits(any_model.weights, any_model.hparams, tokens)
    np.testing.assert_allclose(any_model.logits(tokens), expected, rtol=0, atol=1e-4)


def test_prefill_and_token_by_token_decoding_agree(any_model):
    tokens = random_tokens(any_model, any_model.hparams.n_ctx)
    np.testing.assert_allclose(step_by_step(any_model, tokens), any_model.logits(tokens), rtol=0, atol=1e-4)


def test_a_ragged_batch_agrees_with_each_sequence_alone(any_model):
    n_ctx = any_model.hparams.n_ctx
    lengths = [n_ctx, 1, n_ctx // 2, 3]
    sequences = [random_tokens(any_model, length, seed) for seed, length in enumerate(lengths)]
    caches = [Cache(any_model.hparams) for _ in sequences]
    # In two steps of different sizes for each: the first token of all, then whatever is left.
    first = forward(any_model.matrices, any_model.hparams, [s[:1] for s in sequences], caches)
    longer = [i for i, s in enumerate(sequences) if len(s) > 1]
    rest = forward(
        any_model.matrices, any_model.hparams, [sequences[i][1:] for i in longer], [caches[i] for i in longer]
    )
    for i, sequence in enumerate(sequences):
        expected = any_model.logits(sequence)
        np.testing.assert_allclose(first[i], expected[0], rtol=0, atol=1e-4)
        if i in longer:
            np.testing.assert_allclose(rest[longer.index(i)], expected[-1], rtol=0, atol=1e-4)
        assert caches[i].length == len(sequence)


def test_all_positions_of_a_ragged_batch_lie_one_behind_the_other(model):
    sequences = [random_tokens(model, length, seed=length) for length in (3, 5)]
    caches = [Cache(model.hparams) for _ in sequences]
    packed = forward(model.weights, model.hparams, sequences, caches, all_positions=True)
    expected = np.concatenate([model.logits(sequence) for sequence in sequences])
    np.testing.assert_allclose(packed, expected, rtol=0, atol=1e-4)


def test_a_cache_refuses_more_than_n_ctx_positions(model):
    cache = Cache(model.hparams)
    cache.length = 190
    cache.check_room(2)
    with pytest.raises(ValueError, match="193 positions are more than the model's n_ctx of 192"):
        cache.check_room(3)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system doesn't say how much memory is in use")
def test_a_cache_takes_memory_for_the_positions_that_it_holds():
    """Every layer's and head's positions lie in pages of their own, which hold 16 of them, or up to 256."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    hparams = HParams(n_vocab=10, n_ctx=4096, n_embd=256, n_head=4, n_layer=8)
    cache, before, position = Cache(hparams), resident(), 2 * 8 * 256 * 4
    assert cache.k.nbytes == 4096 * position / 2
    for length in (256, 512, 2048):
        cache.k[:, :, :length], cache.v[:, :, :length] = 1, 1
        assert abs(resident() - before - length * position) < 10**6


def test_a_cache_that_there_is_no_memory_for_is_a_memory_error(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("npgpt2.model.mmap.mmap", refuse)
    with pytest.raises(MemoryError, match="32 bytes for a cache"):
        Cache(HParams(n_vocab=5, n_ctx=4, n_embd=2, n_head=1, n_layer=1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_fills_a_copy_of_the_cache():
    program = """if True:
        import os, sys
        from npgpt2.model import Cache
        from npgpt2.model import HParams
        cache = Cache(HParams(n_vocab=5, n_ctx=4, n_embd=2, n_head=1, n_layer=1))
        if not os.fork():
            cache.k[:] = 1
            os._exit(0)
        os.wait()
        sys.exit(int(cache.k.sum()))
    """
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_decoding_reads_only_what_it_needs_of_the_cache(model, allocated_peak):
    """A decoded token allocates no more than its own rows: nothing grows with n_vocab times T, or with the weights."""
    cache = Cache(model.hparams)
    forward(model.weights, model.hparams, [random_tokens(model, 100)], [cache])
    peak = allocated_peak(lambda: forward(model.weights, model.hparams, [np.array([1])], [cache]))
    assert peak < 64 * 1024


def test_prefill_computes_logits_for_the_last_position_alone(allocated_peak):
    hparams = HParams(n_vocab=5000, n_ctx=100, n_embd=8, n_head=2, n_layer=1)
    weights = {name: np.zeros(shape, np.float32) for name, shape in variable_shapes(hparams).items()}
    tokens = np.arange(100)
    peak = allocated_peak(lambda: forward(weights, hparams, [tokens], [Cache(hparams)]))
    assert peak < 100 * 5000 * 4 / 4
    assert forward(weights, hparams, [tokens], [Cache(hparams)]).shape == (1, 5000)
