"""Guessing tokens ahead: what is guessed, and that it changes how often the model reads, and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt2 import GPT2, HParams
from npgpt2.engine import guesses
from npgpt2.engine.guesses import CONTEXT, LONGEST_GUESS, Lookup
from npgpt2.model import variable_shapes

LOOP = "one two three four five six seven eight nine ten "


def naive_guess(tokens):
    """The latest place where the last tokens were before, by looking everywhere."""
    n = len(tokens)
    for at in range(n - 1, CONTEXT - 1, -1):
        if tokens[at - CONTEXT : at] == tokens[n - CONTEXT :]:
            same = CONTEXT
            while same < LONGEST_GUESS and same < at and tokens[at - same - 1] == tokens[n - same - 1]:
                same += 1
            repeated = tokens + tokens[at:] * LONGEST_GUESS
            return repeated[at : at + same]
    return []


@given(st.lists(st.integers(0, 2), max_size=60))
def test_guesses_are_what_came_the_last_time(tokens):
    assert Lookup(tokens).guess() == naive_guess(tokens)


SETTINGS = [
    {},
    {"repetition_penalty": 1.02},
    {"frequency_penalty": 0.1, "no_repeat_ngram_size": 30},
    *({"temperature": t, "top_k": 20, "seed": seed} for t in (0.3, 1.0, 3.0) for seed in (1, 2)),
]


@pytest.mark.parametrize("context", [1, CONTEXT])
@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_are_the_same_as_without_guesses(model, monkeypatch, settings, context):
    """Also where most guesses are wrong: with a context of one token, and past n_ctx."""
    monkeypatch.setattr(guesses, "CONTEXT", context)
    tokens = model.tokenizer.encode(LOOP * 2)
    settings = settings | {"length": 2 * model.hparams.n_ctx}
    plain = model.generate_tokens(tokens, **settings, guess=False)
    np.testing.assert_array_equal(model.generate_tokens(tokens, **settings), plain)


@pytest.mark.parametrize("settings", SETTINGS)
def test_texts_and_what_ends_them_are_the_same_as_without_guesses(model, settings):
    settings = settings | {"length": 120, "stop": ["next", "."]}
    for prompt in ("", LOOP * 3, "A language model " * 4):
        assert model.generate(prompt, **settings) == model.generate(prompt, **settings, guess=False)


def test_a_text_that_repeats_is_read_several_tokens_at_a_time(passes):
    """By a model that always says its last token again: one-hot embeddings, and layers that add nothing."""
    hparams = HParams(n_vocab=8, n_ctx=128, n_embd=8, n_head=1, n_layer=1)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in variable_shapes(hparams).items()}
    echo = GPT2(arrays | {"wte": np.eye(8, dtype="f"), "ln_f/g": np.ones(8, "f")}, hparams)
    assert echo.generate_tokens([3], length=100).tolist() == [3] * 100
    lengths = [sum(new) for new in passes]
    assert lengths[: CONTEXT + 1] == [1] * CONTEXT + [1 + CONTEXT]
    assert max(lengths) == 1 + LONGEST_GUESS
    assert len(lengths) < CONTEXT + 100 / LONGEST_GUESS
    passes.clear()
    assert echo.generate_tokens([3], length=100, guess=False).tolist() == [3] * 100
    assert len(passes) == 100


def test_what_was_guessed_wrong_leaves_nothing_behind(model, passes, monkeypatch):
    """Every guess is wrong: the model reads as many times as without, and each time from where it was."""
    monkeypatch.setattr(Lookup, "guess", lambda self: [519] * 3)
    length = model.hparams.n_ctx + 20
    tokens = model.generate_tokens([1, 2, 3], length=length)
    assert len(passes) == length
    np.testing.assert_array_equal(tokens, model.generate_tokens([1, 2, 3], length=length, guess=False))


def test_guesses_are_checked_against_the_text_up_to_each(passes):
    """By the model that says its last token again: after ten in a row, a ban makes it say another, guessed or not."""
    hparams = HParams(n_vocab=8, n_ctx=128, n_embd=8, n_head=1, n_layer=1)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in variable_shapes(hparams).items()}
    wte = np.eye(8, dtype="f") + np.triu(np.full((8, 8), 0.001, "f"), 1)
    echo = GPT2(arrays | {"wte": wte, "ln_f/g": np.ones(8, "f")}, hparams)
    plain = echo.generate_tokens([3], length=60, no_repeat_ngram_size=11, guess=False).tolist()
    assert plain[:10] == [3] * 10
    assert plain[10] != 3
    passes.clear()
    assert echo.generate_tokens([3], length=60, no_repeat_ngram_size=11).tolist() == plain
    assert len(passes) < 50


def test_sequences_that_are_read_together_are_not_guessed(model, passes):
    model.generate_tokens([model.tokenizer.encode(LOOP * 3), model.tokenizer.encode(LOOP * 3)], length=5)
    assert passes[2:-1] == [[1, 1]] * 3


def test_no_number_is_drawn_for_a_guess(model):
    """The random numbers are those of the tokens in order, whatever was guessed."""
    settings = {"temperature": 0.5, "length": 60, "seed": 7, "ignore_eot": True}
    texts = list(model.samples(LOOP * 4, 3, **settings))
    assert texts == list(model.samples(LOOP * 4, 3, **settings, guess=False))
