"""A draft model: that it changes how often the large model reads, and nothing else, whatever it guesses."""

import os
import pickle

import numpy as np
import pytest
from builders import random_arrays, random_model, write_model, zero_arrays

import npgpt2
from npgpt2 import GPT2, Engine, HParams
from npgpt2.engine import Slots, run
from npgpt2.engine.drafts import FIRST_REST, MOST_GUESSES, TRIAL, Draft
from npgpt2.kernels import time_of_pass
from npgpt2.samplers import Written

SIZES = HParams(n_vocab=30, n_ctx=40, n_embd=16, n_head=2, n_layer=2)
# What each setting is on, where a random request has it.
VALUES = {
    "temperature": [0.3, 1.0, 2.0],
    "top_k": [2, 10],
    "top_p": [0.6, 0.95],
    "min_p": [0.05],
    "typical_p": [0.5],
    "logit_bias": [{3: 2.0, 4: -100.0}],
    "repetition_penalty": [1.3],
    "presence_penalty": [0.8],
    "frequency_penalty": [0.3],
    "no_repeat_ngram_size": [3],
    "min_tokens": [20],
}


@pytest.fixture(scope="module")
def large():
    return random_model(SIZES, seed=1)


def with_draft(model, draft):
    return GPT2(model.weights, model.hparams, model._tokenizer, draft=draft)


@pytest.fixture
def reads(monkeypatch):
    """What each pass reads, as (the matrices it goes over, its tokens), in order."""
    passes, read = [], Slots.read

    def note(self, matrices, tokens, spans, wanted):
        passes.append((matrices, list(tokens)))
        return read(self, matrices, tokens, spans, wanted)

    monkeypatch.setattr(Slots, "read", note)
    return passes


@pytest.fixture
def free(monkeypatch):
    """Guesses that cost nothing, so that as many are made as can be."""
    monkeypatch.setattr(Draft, "_drafting", 0.0)
    monkeypatch.setattr(Draft, "_reading", lambda self, rows: 0.0)
    monkeypatch.setattr(Draft, "_checking", [1.0] * (MOST_GUESSES + 1))


def nudged(model, scale):
    """A model like another, which often says the same."""
    rng = np.random.default_rng(0)
    arrays = model.weights.items()
    return GPT2({name: array + scale * rng.standard_normal(array.shape, "f") for name, array in arrays}, model.hparams)


def broken(model):
    """A model that computes no numbers."""
    return GPT2({**model.weights, "ln_f/g": np.full_like(model.weights["ln_f/g"], np.nan)}, model.hparams)


DRAFTS = {
    "itself": lambda model: model,
    "one like it": lambda model: nudged(model, 0.02),
    "another": lambda model: random_model(SIZES._replace(n_embd=8, n_layer=1), seed=2),
    "a shorter window": lambda model: random_model(SIZES._replace(n_ctx=12), seed=1),
    "a window of one": lambda model: random_model(SIZES._replace(n_ctx=1), seed=1),
    "a longer window": lambda model: random_model(SIZES._replace(n_ctx=64), seed=1),
    "a broken one": broken,
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.usefixtures("free")
def test_tokens_are_the_same_as_without_a_draft(large, name):
    """At random settings, and past the window."""
    drafted = with_draft(large, DRAFTS[name](large))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        settings = {name: values[rng.integers(len(values))] for name, values in VALUES.items() if rng.random() < 0.4}
        settings |= {"seed": seed, "length": int(rng.integers(1, 90))}
        prompt = rng.integers(0, SIZES.n_vocab, rng.integers(1, 30)).tolist()
        plain = large.generate_tokens(prompt, **settings).tolist()
        assert drafted.generate_tokens(prompt, **settings).tolist() == plain, settings


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 1}, {"temperature": 4.0, "seed": 1}])
def test_texts_what_ends_them_and_log_probabilities_are_the_same(model, settings):
    drafted = GPT2(model.weights, draft=nudged(model, 0.01))
    for prompt in ("", "A language model ", "It has"):
        for stop in ((), ("next", ".")):
            asked = settings | {"length": 60, "stop": stop, "logprobs": 2, "prompt_logprobs": 1}
            ours, plain = (one.stream(prompt, **asked) for one in (drafted, model))
            assert "".join(ours) == "".join(plain)
            assert ours.request.finish_reason == plain.request.finish_reason
            assert ours.request.tokens == plain.request.tokens
            for mine, theirs in zip(ours.request.logprobs, plain.request.logprobs, strict=True):
                assert mine.token == theirs.token
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 3.0, "seed": 3, "top_k": 9}])
def test_a_draft_that_is_always_right_saves_most_passes(large, free, reads, settings):
    """Also at a temperature, since both draw by the same numbers; and it reads each token once."""
    draft = GPT2(large.weights, large.hparams)
    large = with_draft(large, draft)
    large.generate_tokens([1, 2, 3], length=33, guess=True, **settings)
    passes = [tokens for matrices, tokens in reads if matrices is large.matrices]
    drafted = [tokens for matrices, tokens in reads if matrices is draft.matrices]
    assert len(passes) < 6
    assert sum(map(len, drafted)) <= 3 + 33 + len(passes)
    reads.clear()
    large.generate_tokens([1, 2, 3], length=33, guess=False, **settings)
    assert len(reads) == 33


def test_the_more_guesses_are_right_the_fewer_passes_there_are(large, free, reads):
    counts = []
    for scale in (0, 0.01, 0.05, 0.2):
        drafted = with_draft(large, nudged(large, scale))
        reads.clear()
        drafted.generate_tokens([1, 2, 3], length=36, temperature=1, seed=1)
        counts.append(sum(matrices is drafted.matrices for matrices, _ in reads))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] / 3


def test_a_draft_that_is_always_wrong_is_left_alone_but_for_trials(large, reads, monkeypatch):
    monkeypatch.setattr(Draft, "_drafting", 0.1)
    always_0 = zero_arrays(SIZES) | {"ln_f/b": np.ones(16, "f")}
    always_0["wte"][0] = 1
    draft, length = GPT2(always_0, SIZES), 300
    tokens = with_draft(large, draft).generate_tokens([1, 2], length=length, temperature=1, seed=1, top_k=3)
    assert np.count_nonzero(tokens == 0) < length / 20
    guessed = sum(matrices is draft.matrices for matrices, _ in reads)
    assert guessed >= 2 * TRIAL  # it was tried again
    assert guessed < length / 3


def test_it_is_tried_again_later_and_used_again_once_it_is_right(large, free, reads):
    """A draft that rests costs nothing, and comes back by a trial."""
    draft = GPT2(large.weights, large.hparams)
    drafted = with_draft(large, draft)
    engine = Engine(drafted, slots=1, text=False)
    engine._draft._right, engine._draft._asked = 0.0, 32.0  # as after many that were wrong
    request = engine.submit([1, 2, 3], length=36 + FIRST_REST, temperature=1, seed=1)
    run(engine, [request])
    passes = [matrices is draft.matrices for matrices, _ in reads]
    assert not any(passes[:FIRST_REST])
    assert sum(passes) > 20


def test_a_draft_as_slow_as_the_model_guesses_nothing(large, reads):
    drafted = with_draft(large, GPT2(large.weights, large.hparams))
    drafted.generate_tokens([1, 2, 3], length=20)
    assert {matrices is drafted.matrices for matrices, _ in reads} == {True}


def test_a_long_prompt_is_not_read_for_a_short_text(large, reads, monkeypatch):
    monkeypatch.setattr(Draft, "_drafting", 0.05)
    monkeypatch.setattr(Draft, "_reading", lambda self, rows: 0.05 * rows)
    draft = GPT2(large.weights, large.hparams)
    drafted = with_draft(large, draft)
    for length, used in ((3, False), (15, True)):
        reads.clear()
        drafted.generate_tokens([1] * 20, length=length, temperature=1, seed=1)
        assert any(matrices is draft.matrices for matrices, _ in reads) == used


def test_it_rests_while_others_run_and_goes_on_when_one_is_left(large, free, reads):
    draft = GPT2(large.weights, large.hparams)
    drafted = with_draft(large, draft)
    engine = Engine(drafted, slots=2, text=False)
    settings = {"temperature": 1.0, "seed": 1}
    long, short = engine.submit([1, 2], length=36, **settings), engine.submit([3, 4], length=10, **settings)
    while short.finish_reason is None:
        engine.step()
    assert not any(matrices is draft.matrices for matrices, _ in reads)
    run(engine, [long])
    assert any(matrices is draft.matrices for matrices, _ in reads)
    for request, prompt in ((long, [1, 2]), (short, [3, 4])):
        expected = large.generate_tokens(prompt, length=len(request.tokens), **settings)
        assert request.tokens == expected.tolist()


@pytest.mark.usefixtures("free")
def test_requests_follow_each_other_and_are_cancelled(large):
    engine = Engine(with_draft(large, nudged(large, 0.02)), slots=1, text=False)
    settings = {"length": 30, "temperature": 1.0, "seed": 5}
    cancelled, second = engine.submit([1, 2, 3], **settings), engine.submit([1, 2, 4], **settings)
    for _ in range(3):
        engine.step()
    engine.cancel(cancelled)
    run(engine, [second])
    assert cancelled.finish_reason == "cancelled"
    expected = large.generate_tokens([1, 2, 3], **settings).tolist()
    assert cancelled.tokens == expected[: len(cancelled.tokens)]
    assert second.tokens == large.generate_tokens([1, 2, 4], **settings).tolist()


def test_a_broken_draft_is_hardly_asked(large, free, reads):
    draft = broken(large)
    drafted = with_draft(large, draft)
    drafted.generate_tokens([1, 2, 3], length=36, temperature=1, seed=1)
    assert sum(matrices is draft.matrices for matrices, _ in reads) <= 3


def test_a_pass_of_the_draft_that_fails_is_made_again(large, free, monkeypatch):
    draft = GPT2(large.weights, large.hparams)
    engine = Engine(with_draft(large, draft), slots=1, text=False)
    request = engine.submit([1, 2, 3], length=30, temperature=1, seed=1)
    read, failed = Slots.read, []

    def fails_once(self, matrices, tokens, spans, wanted):
        if matrices is draft.matrices and len(failed) < 3:
            failed.append(read(self, matrices, tokens, spans, wanted))
            raise MemoryError
        return read(self, matrices, tokens, spans, wanted)

    monkeypatch.setattr(Slots, "read", fails_once)
    for _ in range(3):
        with pytest.raises(MemoryError):
            run(engine, [request])
    run(engine, [request])
    assert request.tokens == large.generate_tokens([1, 2, 3], length=30, temperature=1, seed=1).tolist()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # of BLAS's threads, too
@pytest.mark.usefixtures("free")
def test_a_pickled_model_keeps_its_draft_and_a_forked_process_its_guesses(large):
    settings = {"length": 30, "temperature": 1.0, "seed": 1}
    expected = large.generate_tokens([1, 2, 3], **settings).tolist()
    again = pickle.loads(pickle.dumps(with_draft(large, nudged(large, 0.01))))
    assert isinstance(again.draft, GPT2)
    assert again.generate_tokens([1, 2, 3], **settings).tolist() == expected
    if not hasattr(os, "fork"):
        return
    engine = Engine(again, slots=1, text=False)
    request = engine.submit([1, 2, 3], **settings)
    for _ in range(3):
        engine.step()
    if (child := os.fork()) == 0:
        run(engine, [request])
        os._exit(0 if request.tokens == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    run(engine, [request])
    assert request.tokens == expected


# ---- How many are guessed


def drafting_for(layers, draft_layers, rate):
    """How many tokens are guessed where such a share is right, by a draft with fewer layers of GPT-2's size."""
    sizes = HParams(50257, 1024, 768, 12, layers)
    few = sizes._replace(n_layer=draft_layers)
    arrays = random_model(SIZES).matrices  # of which it is asked whether they are in int8
    draft = Draft(arrays, few, (arrays, sizes))
    draft._right, draft._asked = rate * 32, 32.0
    return draft._number()


def test_the_better_the_guesses_and_the_smaller_the_draft_the_more_are_made():
    by_rate = [drafting_for(100, 4, rate) for rate in (0.1, 0.5, 0.7, 0.9, 1.0)]
    assert by_rate == sorted(by_rate)
    assert by_rate[0] == 0
    assert by_rate[-1] > 6
    by_size = [drafting_for(100, layers, 0.8) for layers in (100, 50, 10, 2)]
    assert by_size == sorted(by_size)
    assert by_size[0] == 0


def test_passes_of_more_rows_and_of_larger_models_take_longer():
    times = [time_of_pass(10**9, 12, rows) for rows in (1, 2, 3, 8, 100, 1000)]
    assert times == sorted(times)
    assert time_of_pass(10**8, 12, 1) < time_of_pass(10**8, 12, 1, in_int8=True) * 4 < 4 * time_of_pass(10**9, 12, 1)


def test_what_is_added_to_a_copy_of_what_was_written_is_not_in_the_original():
    written = Written([1, 2], 10)
    other = written.copy()
    for token in range(3, 9):
        other.append(token)
    assert (written.tokens.tolist(), written.seen, written.counts, written.generated) == ([1, 2], {1, 2}, {}, 0)
    assert (other.tokens.tolist(), other.generated) == ([1, 2, *range(3, 9)], 6)


# ---- Which models


def test_a_draft_of_another_size_or_vocabulary_is_refused_by_name(large, model, tiny, tmp_path):
    other = random_model(SIZES._replace(n_vocab=31))
    with pytest.raises(ValueError, match=r"the model: can't be the draft of the model, .* n_vocab is 31 and 30"):
        with_draft(large, other)
    texts = model.weights.vocabulary()
    swapped = texts[0].replace(b'"A"', b'"none"').replace(b'"B"', b'"A"').replace(b'"none"', b'"B"')
    path = tmp_path / "other.npz"
    write_model(path, model.hparams, random_arrays(model.hparams), (swapped, texts[1]))
    with pytest.raises(ValueError, match=r"other.npz: can't be the draft of .*tiny.npz, since token 32 is b'B'"):
        npgpt2.load(tiny, draft=path)
    with pytest.raises(FileNotFoundError, match="no-such"):
        npgpt2.load(tiny, draft=tmp_path / "no-such.npz")


def test_a_draft_whose_file_was_written_to_is_refused_as_a_model_is(model, tiny, tmp_path):
    path = tmp_path / "draft.npz"
    path.write_bytes(tiny.read_bytes())
    drafted = GPT2(model.weights, draft=npgpt2.load(path))
    with open(path, "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"draft\.npz: was changed while it was open"):
        drafted.generate("A language", length=3)


def test_vocabularies_written_otherwise_are_the_same(tiny, model, tmp_path):
    texts = model.weights.vocabulary()
    path = tmp_path / "spaced.npz"
    write_model(path, model.hparams, random_arrays(model.hparams), (texts[0].replace(b", ", b",  "), texts[1] + b"\n"))
    assert npgpt2.load(tiny, draft=path).draft.hparams == model.hparams


@pytest.mark.usefixtures("free")
def test_commands_take_a_draft_and_print_the_same(run, tiny, tmp_path):
    options = ["--temperature", "1", "--seed", "1", "--length", "20"]
    for command in (["generate", "A language", *options], ["unconditional", "--nsamples", "1", *options]):
        plain = run(*command, "-m", "MODEL")
        assert plain[0] == 0
        assert run(*command, "-m", "MODEL", "--draft-model", tiny) == plain
    stdin = b"A language\n"
    plain = run("interactive", *options, "-m", "MODEL", stdin=stdin)
    assert run("interactive", *options, "-m", "MODEL", "--draft-model", tiny, stdin=stdin) == plain
    status, out, err = run("generate", "A", "-m", "MODEL", "--draft-model", "storyteller")
    assert (status, out) == (1, "")
    assert "storyteller.npz: can't be the draft of" in err
    assert err.count("\n") == 1
