"""What a trace says happened, against the model's own logits and against the naive attention of a single position."""

import naive
import numpy as np
import pytest
from builders import random_tokens

import npgpt2
from npgpt2 import model as forward_pass
from npgpt2.kernels import threads
from npgpt2.kernels.kernels import QUERY_BLOCK, causal_attention


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
def test_attention_and_residual_are_those_of_the_naive_forward_pass(any_model, length):
    tokens = random_tokens(any_model, length)
    trace = any_model.trace(tokens, attention=True, residual=True)
    attention, residual = naive.trace(any_model.weights, any_model.hparams, tokens)
    np.testing.assert_allclose(trace.attention, attention, rtol=0, atol=1e-5)
    np.testing.assert_allclose(trace.residual, residual, rtol=0, atol=1e-4)


def test_only_what_was_asked_for_is_kept(model):
    tokens = random_tokens(model, 5)
    assert [model.trace(tokens).attention, model.trace(tokens).residual] == [None, None]
    assert model.trace(tokens, attention=True).residual is None
    assert model.trace(tokens, residual=True).attention is None
    with pytest.raises(ValueError, match="residual=True"):
        model.trace(tokens, attention=True).lens(0)


def test_a_trace_takes_the_memory_that_its_arrays_need(model, allocated_peak, monkeypatch):
    monkeypatch.setattr(threads, "count_threads", lambda: 1)  # whose peaks would come at the same time, or not
    tokens = random_tokens(model, 192)
    L, H, T, C = 2, 4, 192, 48
    plain = allocated_peak(lambda: model.logits(tokens))
    assert allocated_peak(lambda: model.trace(tokens)) < plain + 10_000
    with_all = allocated_peak(lambda: model.trace(tokens, attention=True, residual=True))
    assert with_all < plain + 4 * L * H * T * T + 4 * L * T * C + 10_000


def test_a_trace_runs_the_kernels_once(model, monkeypatch):
    """One forward pass: as many attentions as layers, and one product with the vocabulary."""
    calls = []
    head = forward_pass.head
    monkeypatch.setattr(
        forward_pass, "causal_attention", lambda *a: (calls.append("attention"), causal_attention(*a))[1]
    )
    monkeypatch.setattr(forward_pass, "head", lambda *a: (calls.append("head"), head(*a))[1])
    model.trace([1, 2, 3], attention=True, residual=True)
    assert calls == ["attention", "attention", "head"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "shape"),
        ([[1, 2]], "single sequence"),
        ([520], "token 520 is not in the vocabulary"),
        ([0.5], "integers"),
        ([0] * 193, "193 tokens are more than the model's n_ctx of 192"),
    ],
)
def test_what_cannot_be_read_is_refused(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model.trace(tokens)
