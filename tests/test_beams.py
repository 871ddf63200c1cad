"""Beam search: the texts of a naive search, which reads everything anew; what is read and copied; what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from builders import SMALL, random_arrays, random_model
from commands import failed

import npgpt2
from npgpt2.engine import Slots
from npgpt2.model import HParams
from npgpt2.vocabulary import SpecialTokens

SIZES = HParams(n_vocab=24, n_ctx=16, n_embd=12, n_head=2, n_layer=2)


def log_softmax(logits):
    logits = np.asarray(logits, float)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def penalized(scores, before, penalty, n):
    """After a repetition penalty, and without what would make n tokens come twice."""
    scores = scores.copy()
    for token in set(before):
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    grams = {tuple(before[at : at + n]) for at in range(len(before) - n + 1)} if n else set()
    for token in range(len(scores)):
        if n and (*before[len(before) - n + 1 :], token) in grams:
            scores[token] = -np.inf
    return scores


def naive_search(
    model, prompt, beams, length, ends, length_penalty=1.0, early_stopping=False,
    repetition_penalty=1.0, no_repeat_ngram_size=0,
):  # fmt: skip
    """The texts and their scores, from the best on; and of each step how many texts go on, and from how many."""
    n_ctx = model.hparams.n_ctx
    running, ended, start, steps = [(0.0, [])], [], 0, []
    for n in range(1, length + 1):
        whole = len(prompt) + n - 1
        if whole - start > n_ctx:
            start = whole - n_ctx // 2
        longer = []
        for number, (score, text) in enumerate(running):
            scores = log_softmax(model.logits((prompt + text)[start:])[-1])
            scores = penalized(scores, prompt + text, repetition_penalty, no_repeat_ngram_size)
            longer += [(score + more, number, [*text, token]) for token, more in enumerate(scores) if more > -np.inf]
        longer.sort(key=lambda one: -one[0])
        last = n == length
        ended += [(score / n**length_penalty, text) for score, _, text in longer[:beams] if last or text[-1] in ends]
        ended = sorted(ended, key=lambda one: -one[0])[:beams]
        going_on = [one for one in longer if not (last or one[2][-1] in ends)][:beams]
        running = [(score, text) for score, _, text in going_on]
        steps.append((len(running), len({number for _, number, _ in going_on})))
        if len(ended) == beams and running:
            at = length if early_stopping == "never" and length_penalty > 0 else n
            if early_stopping is True or running[0][0] / at**length_penalty <= ended[-1][0]:
                break
    return [(text, score) for score, text in ended], steps


def case(model, seed):
    """A prompt, the tokens with which its texts end, often, and all that is asked, at random."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, SIZES.n_vocab, rng.integers(1, 10)).tolist()
    likely = np.argsort(-model.logits(prompt)[-1])
    ends = tuple(likely[2 : 2 + seed % 4].tolist())
    settings = {
        "beams": int(rng.integers(2, 7)),
        "length": int(rng.integers(1, 26)),  # past the window
        "length_penalty": [-1.0, 0.0, 1.0, 2.0][seed // 3 % 4],
        "early_stopping": [False, True, "never"][seed % 3],
        "repetition_penalty": float(rng.choice([1.0, 1.3])),
        "no_repeat_ngram_size": int(rng.choice([0, 2])),
    }
    return prompt, ends, settings


@pytest.fixture
def small():
    return random_model(SIZES, seed=1)


@pytest.fixture
def copies(monkeypatch):
    """What was copied from slot to slot: the first position, and the one behind the last."""
    made, copy = [], Slots.copy

    def note(self, source, target, length, start=0):
        made.append((start, length))
        copy(self, source, target, length, start)

    monkeypatch.setattr(Slots, "copy", note)
    return made


@pytest.mark.parametrize("seed", range(48))
def test_the_texts_are_those_of_a_search_that_reads_everything_anew(small, seed):
    prompt, ends, settings = case(small, seed)
    small.special = SpecialTokens(end=ends)
    expected, _ = naive_search(small, prompt, ends=ends, **settings)
    best = small.beam_search(prompt, **settings)
    found = [best, *best.others]
    assert [beam.tokens for beam in found] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([beam.score for beam in found], [score for _, score in expected], rtol=1e-4)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_a_search_goes_on_as_long_as_its_rule_says(length_penalty, early_stopping):
    """In a model that is so sure of some tokens that longer texts still win, with ends that are likely."""
    sure = random_model(SIZES, seed=1, scale=1.2)
    for seed in (3, 5, 22, 51, 61, 77):
        prompt = np.random.default_rng(seed).integers(0, SIZES.n_vocab, 5).tolist()
        ends = tuple(np.argsort(-sure.logits(prompt)[-1])[1:4].tolist())
        settings = {"beams": 2 + seed % 3, "length": 10, "length_penalty": length_penalty}
        settings["early_stopping"] = early_stopping
        sure.special = SpecialTokens(end=ends)
        expected, _ = naive_search(sure, prompt, ends=ends, **settings)
        best = sure.beam_search(prompt, **settings)
        assert [beam.tokens for beam in (best, *best.others)] == [tokens for tokens, _ in expected]


def test_what_is_found_is_likelier_than_what_is_likeliest_at_each_step(small):
    prompt, length = [5, 6], 8
    text = small.generate_tokens(prompt, length=length).tolist()
    scores = [log_softmax(small.logits(prompt + text[:n])[-1])[text[n]] for n in range(length)]
    assert small.beam_search(prompt, beams=1, length=length).score == pytest.approx(np.mean(scores), abs=1e-5)
    assert small.beam_search(prompt, beams=6, length=length).score > np.mean(scores) + 0.1


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2, "min_tokens": 5}, {"logit_bias": {3: 2}}]
)
def test_a_single_beam_writes_what_generate_does(small, model, settings, early_stopping):
    small.special = SpecialTokens(end=(3,))
    for seed in range(8):
        prompt = case(small, seed)[0]
        engine = npgpt2.Engine(small, text=False)
        request = engine.submit(prompt, length=20, **settings)
        while engine.busy:
            engine.step()
        found = small.beam_search(prompt, beams=1, length=20, early_stopping=early_stopping, **settings)
        assert found.tokens == request.tokens
        assert found.others == ()
    assert model.beam_search("So", beams=1, length=150, **settings).text == model.generate("So", length=150, **settings)


# ---- What is read, and what is copied


def test_the_prompt_is_read_once_and_each_step_is_one_pass_of_all_beams(small, passes):
    small.beam_search([1, 2, 3, 4, 5], beams=4, length=9)
    assert passes == [[5], *[[1] * 4] * 8]


def test_copies_are_made_where_beams_fork_and_of_what_their_slots_lack(small, copies):
    prompt = [1, 2, 3, 4, 5, 6, 7]
    _, steps = naive_search(small, prompt, 4, 9, ())
    small.beam_search(prompt, beams=4, length=9)
    assert len(copies) == sum(texts - parents for texts, parents in steps) > 3
    assert copies[:3] == [(0, 7)] * 3  # the prompt, to each of the other slots
    assert all(start >= 7 for start, _ in copies[3:])


def test_past_the_window_what_texts_begin_with_alike_is_read_once(small, passes):
    """Of 16 positions the last 8 tokens are seen when those are used up: read by the first, copied for the others."""
    prompt = list(range(15))
    small.beam_search(prompt, beams=3, length=5)
    assert passes[0] == [15]
    assert passes[1] == [1] * 3
    first, *others = passes[2:5]
    assert first == [8]
    assert all(len(read) == 1 and read[0] <= 2 for read in others)
    assert passes[5:] == [[1] * 3] * 2


def test_no_copy_is_made_for_a_single_beam(small, copies):
    small.beam_search([1, 2], beams=1, length=40)
    assert copies == []


def test_progress_is_told_of_each_step(small):
    told = []
    small.beam_search([1, 2], beams=3, length=7, progress=told.append)
    assert told == [1] * 7


# ---- Text


def test_text_and_tokens_are_a_prompts_as_text_and_as_ids(model):
    found = model.beam_search("A language model", beams=3, length=4)
    assert found.text == model.tokenizer.decode(found.tokens) == " plays one small game"
    assert model.beam_search(model.tokenizer.encode("A language model"), beams=3, length=4) == found
    assert model.beam_search("", beams=2, length=3).text == model.generate("", length=3)


@pytest.mark.parametrize("skip_special", [None, True, False])
def test_the_token_that_ends_a_text_is_no_part_of_it(model, skip_special):
    end = model.tokenizer.end_of_text
    found = model.beam_search("So", beams=2, length=190, skip_special=skip_special, early_stopping=True)
    assert found.tokens[-1] == end
    assert found.tokens.count(end) == 1
    kept = found.tokens if skip_special is False else found.tokens[:-1]
    assert found.text == model.tokenizer.decode(kept)


def test_texts_go_on_past_the_end_where_that_is_asked_for(model):
    found = model.beam_search("So", beams=2, length=190, ignore_eot=True)
    assert len(found.tokens) == 190


def test_a_text_ends_before_a_stop_string_by_which_it_is_compared(model):
    found = model.beam_search("A language model", beams=3, length=20, stop=["game", "never"])
    assert found.text == " plays one small "
    assert len(found.tokens) == 4
    assert all(len(beam.tokens) <= 20 for beam in found.others)


def test_a_model_without_a_vocabulary_finds_tokens_alone(small):
    assert small.beam_search([1, 2], beams=2, length=3).text == ""
    with pytest.raises(ValueError, match="has no vocabulary"):
        small.beam_search([1, 2], beams=2, stop="a")
    with pytest.raises(ValueError, match="has no vocabulary"):
        small.beam_search("a", beams=2)


def test_rows_that_are_of_no_token_are_never_written():
    """They are the likeliest ones of this model."""
    arrays = random_arrays(SMALL)
    likely = int(npgpt2.GPT2(arrays, SMALL).logits([1, 2])[-1].argmax())
    model = npgpt2.GPT2(arrays, SMALL)
    model.drawable = np.delete(np.arange(SMALL.n_vocab), likely)
    found = model.beam_search([1, 2], beams=3, length=3)
    assert all(likely not in beam.tokens for beam in (found, *found.others))


# ---- What goes wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": 0}, "beams is 0, where a whole number of at least 1"),
        ({"beams": 129}, "beams is 129, where a whole number from 1 to 128"),
        ({"beams": 13}, "beams is 13, more than half of the model's 24 tokens"),
        ({"length_penalty": 10.5}, "length_penalty is 10.5, where a number from -10 to 10"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"early_stopping": "always"}, "early_stopping is 'always', where False, True or \"never\""),
        ({"length": 0}, "length is 0"),
        ({"logit_bias": {24: 1.0}}, "logit_bias has token 24"),
        ({"temperature": 0.7}, "temperature is 0.7, but beam search draws nothing; leave it out"),
        ({"top_k": 5}, "top_k is 5, but beam search draws nothing"),
        ({"top_p": 0.5}, "top_p is 0.5"),
        ({"min_p": 0.5}, "min_p is 0.5"),
        ({"typical_p": 0.5}, "typical_p is 0.5"),
        ({"seed": 1}, "seed is 1"),
        ({"sample": 1}, "sample is 1"),
        ({"logprobs": 0}, "logprobs is 0, but beam search reports none"),
        ({"prompt_logprobs": 0}, "prompt_logprobs is 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(small, passes, settings, message):
    with pytest.raises(ValueError, match=message):
        small.beam_search([1, 2], **settings)
    assert passes == []


def test_settings_at_their_defaults_are_taken(small):
    settings = {"temperature": 0, "top_k": 0, "top_p": 1, "seed": None, "sample": 0, "logprobs": None, "guess": False}
    assert small.beam_search([1, 2], length=3, **settings) == small.beam_search([1, 2], length=3)


def test_where_nothing_may_follow_texts_that_have_ended_are_found_or_it_is_said(small):
    """No token may come twice, so that none is left after 24."""
    with pytest.raises(ValueError, match="no token is left to choose: no_repeat_ngram_size"):
        small.beam_search([1, 2], beams=2, length=30, no_repeat_ngram_size=1, ignore_eot=True)
    small.special = SpecialTokens(end=(3,))
    found = small.beam_search([1, 2], beams=6, length=30, no_repeat_ngram_size=1, early_stopping="never")
    assert found.tokens[-1] == 3
    assert len({1, 2, *found.tokens}) == 2 + len(found.tokens)


def test_a_model_of_broken_weights_is_named():
    arrays = random_arrays(SMALL)
    arrays["ln_f/g"][0] = 3e38
    arrays["wte"] *= 1e3
    with pytest.raises(ValueError, match="the model computed a logit that is not a number"), np.errstate(all="ignore"):
        npgpt2.GPT2(arrays, SMALL).beam_search([1, 2], beams=2)


# ---- The command


def test_the_command_prints_what_the_library_finds(run, model, tmp_path):
    arguments = ["generate", "There is always", "-m", "MODEL", "--beams", "3", "--length", "12"]
    found = model.beam_search("There is always", beams=3, length=12)
    assert run(*arguments) == (0, f"{found.text}\n", "")
    assert run(*arguments, "--output", tmp_path / "found.txt") == (0, "", "")
    assert (tmp_path / "found.txt").read_text("utf-8") == f"{found.text}\n"


def test_the_commands_options_are_the_librarys_settings(run, model):
    options = ["--length-penalty", "-1", "--early-stopping", "never", "--no-repeat-ngram-size", "3", "--stop", "x"]
    options += ["--repetition-penalty", "1.3", "--min-tokens", "4", "--ignore-eot"]
    settings = {"length_penalty": -1.0, "early_stopping": "never", "no_repeat_ngram_size": 3, "stop": "x"}
    settings |= {"repetition_penalty": 1.3, "min_tokens": 4, "ignore_eot": True}
    out = run("generate", "So", "-m", "MODEL", "--beams", "4", "--length", "30", *options)[1]
    assert out == model.beam_search("So", beams=4, length=30, **settings).text + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beams", "2", "--temperature", "0.5"], "--temperature has no part in beam search, which draws nothing"),
        (["--beams", "2", "--top-k", "4"], "--top-k has no part"),
        (["--beams", "2", "--top-p", "0.4"], "--top-p has no part"),
        (["--beams", "2", "--min-p", "0.4"], "--min-p has no part"),
        (["--beams", "2", "--typical-p", "0.4"], "--typical-p has no part"),
        (["--beams", "2", "--seed", "0"], "--seed has no part"),
        (["--beams", "2", "--nsamples", "2"], "--nsamples has no part"),
        (["--beams", "2", "--nsamples", "0"], "--nsamples has no part"),
        (["--beams", "2", "--batch-size", "2"], "--batch-size has no part"),
        (["--beams", "2", "--best-of", "2"], "--best-of has no part"),
        (["--beams", "2", "--draft-model", "124M"], "--draft-model has no part"),
        (["--beams", "0"], "'0' is not a whole number of at least 1"),
        (["--beams", "129"], "beams is 129, where a whole number from 1 to 128 is expected"),
        (["--beams", "2", "--length-penalty", "11"], "length_penalty is 11.0"),
        (["--beams", "2", "--early-stopping", "maybe"], "'maybe'"),
        (["--length-penalty", "1"], "--length-penalty is for --beams, which isn't given"),
        (["--early-stopping", "false"], "--early-stopping is for --beams, which isn't given"),
    ],
)
def test_the_command_refuses_what_has_no_part_in_a_search(run, options, message):
    assert failed(run("generate", "A", "-m", "MODEL", *options), 2, message, "--help")
