"""The forward pass: what others recorded, formulas beside kernels, and all ways of reading the same tokens."""

import numpy as np
import pytest
from builders import arrays_of, random_model

import npgpt2
from npgpt2 import GPT2, HParams, formulas, kernels
from npgpt2.convert import convert
from npgpt2.engine import Slots, Span
from npgpt2.model import forward

FIXTURES = ["tiny", "finetuned", "dtypes", "hf", "hf-sharded", "tiny in int8"]


@pytest.fixture(scope="module", params=[*FIXTURES, "storyteller", "storyteller in int8"])
def any_model(request, fixtures, tmp_path_factory):
    name, _, dtype = request.param.partition(" in ")
    if name == "storyteller":
        return npgpt2.load(dtype=dtype or None)
    output = tmp_path_factory.mktemp("models") / f"{request.param}.npz"
    return npgpt2.load(convert(fixtures / name, output, dtype=dtype or "float32").path)


def random_tokens(model, length, seed=0):
    return np.random.default_rng(seed).integers(model.hparams.n_vocab, size=length)


def read(slots, model, pieces, starts):
    """One pass over a piece of each sequence, in the slot of its number: the logits after each token, by sequence."""
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]) > 1)
    spans = [Span(i, starts[i], starts[i] + len(pieces[i])) for i in order]
    tokens = np.concatenate([pieces[i] for i in order])
    logits = slots.read(model.matrices, tokens, spans, range(len(tokens)))
    ends = np.cumsum([len(pieces[i]) for i in order])[:-1]
    return dict(zip(order, np.split(logits, ends), strict=True))


@pytest.mark.parametrize("name", ["tiny", "finetuned", "hf", "hf-sharded"])
def test_logits_equal_those_that_tensorflow_or_transformers_recorded(name, fixtures, tmp_path):
    recorded = np.load(fixtures / name / "expected.npz")
    model = npgpt2.load(convert(fixtures / name, tmp_path / "model.npz").path)
    by_formulas = [forward(model.weights, model.hparams, row) for row in recorded["tokens"]]
    for logits in (model.logits(recorded["tokens"]), np.array(by_formulas)):
        assert logits.shape == recorded["logits"].shape
        np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=2e-4)


def test_greedy_tokens_equal_those_that_tensorflow_recorded(model, fixtures):
    recorded = np.load(fixtures / "tiny" / "expected.npz")
    read = recorded["tokens"].shape[1]
    generated = model.generate_tokens(recorded["tokens"], length=recorded["greedy"].shape[1] - read)
    np.testing.assert_array_equal(generated, recorded["greedy"][:, read:])
    np.testing.assert_allclose(model.logits(recorded["greedy"])[:, -1], recorded["last_logits"], rtol=0, atol=2e-4)


def test_formulas_and_kernels_give_the_same_logits(any_model):
    """At every position of a full window, and at one, a few, and more than attention takes at once."""
    weights, hparams = arrays_of(any_model.weights), any_model.hparams
    for length in sorted({1, 2, 7, min(70, hparams.n_ctx), hparams.n_ctx}):
        tokens = random_tokens(any_model, length)
        expected = forward(weights, hparams, tokens)
        assert expected.dtype == np.float32
        np.testing.assert_allclose(any_model.logits(tokens), expected, rtol=0, atol=1e-4)


def test_formulas_run_with_any_mapping_of_arrays():
    model = random_model(HParams(n_vocab=9, n_ctx=8, n_embd=6, n_head=3, n_layer=2))
    tokens = np.arange(8)
    logits = forward(dict(model.weights), model.hparams, tokens, kernels=formulas)
    np.testing.assert_allclose(model.logits(tokens), logits, rtol=0, atol=1e-5)


def test_rows_that_are_wanted_are_those_of_all_rows(model):
    tokens = random_tokens(model, 9)
    whole = forward(model.weights, model.hparams, tokens)
    for wanted in ([8], [0, 3], [], slice(4, 6)):
        rows = wanted if isinstance(wanted, slice) else np.array(wanted, int)
        logits = forward(model.weights, model.hparams, tokens, wanted=rows)
        np.testing.assert_allclose(logits, whole[rows], atol=1e-5)


def test_prefill_and_token_by_token_decoding_agree(any_model):
    tokens = random_tokens(any_model, any_model.hparams.n_ctx)
    slots = Slots(any_model.hparams, 1)
    steps = [read(slots, any_model, [tokens[t : t + 1]], [t])[0] for t in range(len(tokens))]
    np.testing.assert_allclose(np.concatenate(steps), any_model.logits(tokens), rtol=0, atol=1e-4)


def test_sequences_that_are_read_together_agree_with_each_alone(any_model):
    """In pieces of any size, until all are at n_ctx, so that passes hold single tokens, pieces, or both."""
    n_ctx = any_model.hparams.n_ctx
    rng = np.random.default_rng(1)
    sequences = [random_tokens(any_model, n_ctx, seed) for seed in range(5)]
    expected = [any_model.logits(sequence) for sequence in sequences]
    slots, starts = Slots(any_model.hparams, 5), [0] * 5
    while min(starts) < n_ctx:
        sizes = [min(n_ctx - start, int(rng.choice([0, 1, 1, 5, n_ctx // 2]))) for start in starts]
        pieces = [sequences[i][starts[i] : starts[i] + sizes[i]] for i in range(5)]
        spans = [i for i in range(5) if sizes[i]]
        if not spans:
            continue
        order = sorted(spans, key=lambda i: (sizes[i] > 1, i))
        tokens = np.concatenate([pieces[i] for i in order])
        placed = [Span(i, starts[i], starts[i] + sizes[i]) for i in order]
        logits = slots.read(any_model.matrices, tokens, placed, range(len(tokens)))
        wanted = np.concatenate([expected[i][starts[i] : starts[i] + sizes[i]] for i in order])
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]


def test_decoding_reads_only_what_it_needs_of_the_cache(model, allocated_peak):
    """A decoded token allocates no more than its own rows: nothing grows with n_vocab times T, or with the weights."""
    slots = Slots(model.hparams, 1)
    slots.read(model.matrices, random_tokens(model, 100), [Span(0, 0, 100)], [99])
    peak = allocated_peak(lambda: slots.read(model.matrices, [1], [Span(0, 100, 101)], [0]))
    assert peak < 64 * 1024


def test_prefill_computes_logits_for_the_rows_that_are_wanted_alone(allocated_peak):
    hparams = HParams(n_vocab=5000, n_ctx=100, n_embd=8, n_head=2, n_layer=1)
    model = random_model(hparams)
    slots = Slots(hparams, 1)
    peak = allocated_peak(lambda: slots.read(model.matrices, np.arange(100), [Span(0, 0, 100)], [99]))
    assert peak < 100 * 5000 * 4 / 4


def test_a_model_of_fewer_layers_is_made_of_the_same_weights(model):
    shorter = GPT2(model.weights, model.hparams._replace(n_layer=1), model.tokenizer)
    tokens = random_tokens(model, 5)
    np.testing.assert_allclose(shorter.logits(tokens), model.trace(tokens, residual=True).lens(0), atol=1e-4)
    assert shorter.generate("A", length=1)


def test_weights_that_no_file_describes_need_hparams(model):
    with pytest.raises(TypeError, match="need hparams"):
        GPT2(dict(model.weights))


def test_kernels_leave_the_models_arrays_alone():
    model = random_model(HParams(n_vocab=9, n_ctx=8, n_embd=6, n_head=3, n_layer=2))
    before = {name: array.copy() for name, array in model.weights.items()}
    with kernels.sharing_work(model.matrices, 8):
        forward(model.matrices, model.hparams, np.arange(8), kernels=kernels)
    for name, array in model.weights.items():
        np.testing.assert_array_equal(array, before[name])
