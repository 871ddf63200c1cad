"""What a trace says happened, against the model's own logits and against the formulas."""

import numpy as np
import pytest
from builders import arrays_of, random_tokens
from watching import traced

import npgpt2
from npgpt2.kernels.attention import QUERY_BLOCK


@pytest.fixture(scope="module", params=["float32", "int8"])
def any_model(request, tiny):
    return npgpt2.load(tiny, dtype=None if request.param == "float32" else request.param)


# One token; few, which have a product of their own; more than attention takes at once; a full window.
LENGTHS = [1, 2, 7, QUERY_BLOCK + 3, 192]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_logits_are_those_of_the_model_bit_for_bit(any_model, length):
    tokens = random_tokens(any_model, length)
    expected = any_model.logits(tokens)
    for asked in ({}, {"attention": True}, {"residual": True}, {"attention": True, "residual": True}):
        np.testing.assert_array_equal(any_model.trace(tokens, **asked).logits, expected)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_lens_of_the_last_layer_is_the_logits_bit_for_bit(any_model, length):
    trace = any_model.trace(random_tokens(any_model, length), residual=True)
    np.testing.assert_array_equal(trace.lens(-1), trace.logits)
    np.testing.assert_array_equal(trace.lens(any_model.hparams.n_layer - 1), trace.logits)
    assert np.abs(trace.lens(0) - trace.logits).max() > 0.1


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_of_attention_add_up_to_1_and_see_nothing_that_comes_later(any_model, length):
    attention = any_model.trace(random_tokens(any_model, length), attention=True).attention
    assert attention.shape == (2, 4, length, length)
    assert attention.dtype == np.float32
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(attention, np.tril(attention))
    assert attention.min() >= 0


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_and_residual_are_those_of_the_formulas(any_model, length):
    tokens = random_tokens(any_model, length)
    trace = any_model.trace(tokens, attention=True, residual=True)
    attention, residual = traced(arrays_of(any_model.weights), any_model.hparams, tokens)
    np.testing.assert_allclose(trace.attention, attention, rtol=0, atol=1e-5)
    np.testing.assert_allclose(trace.residual, residual, rtol=0, atol=1e-4)


def test_only_what_was_asked_for_is_kept(model):
    tokens = random_tokens(model, 5)
    assert [model.trace(tokens).attention, model.trace(tokens).residual] == [None, None]
    assert model.trace(tokens, attention=True).residual is None
    assert model.trace(tokens, residual=True).attention is None
    with pytest.raises(ValueError, match="residual=True"):
        model.trace(tokens, attention=True).lens(0)


def test_a_trace_takes_the_memory_that_its_arrays_need(tiny, allocated_peak):
    model = npgpt2.load(tiny, threads=1)  # with more, their peaks would come at the same time, or not
    tokens = random_tokens(model, 192)
    L, H, T, C = 2, 4, 192, 48
    plain = allocated_peak(lambda: model.logits(tokens))
    assert allocated_peak(lambda: model.trace(tokens)) < plain + 10_000
    with_all = allocated_peak(lambda: model.trace(tokens, attention=True, residual=True))
    assert with_all < plain + 4 * L * H * T * T + 4 * L * T * C + 10_000


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "shape"),
        ([[1, 2]], "single sequence"),
        ([520], "token 520 is not in the vocabulary"),
        ([0] * 193, "193 tokens are more than the model's n_ctx of 192"),
    ],
)
def test_what_cannot_be_read_is_refused(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model.trace(tokens)
