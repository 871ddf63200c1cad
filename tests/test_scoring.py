"""Scores of texts: what each token costs, in which windows, and what the figures are made of."""

import json
import math
import re

import numpy as np
import pytest
from builders import random_model, random_tokens
from commands import failed
from hypothesis import given
from hypothesis import strategies as st

from npgpt2 import HParams
from npgpt2.engine import Slots
from npgpt2.kernels import prepare
from npgpt2.samplers import Written
from npgpt2.sampling import Sampling
from npgpt2.study.score import POSITIONS, Score, surprises


def by_hand(model, tokens, stride):
    """Whole windows, each from scratch, and of each what no window before has counted."""
    n_ctx, bits, counted = model.hparams.n_ctx, [], 0
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + n_ctx + 1]
        if len(window) < 2:
            break
        logits = model.logits(window[:-1]).astype(np.float64)
        nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), window[1:]]
        bits += list(nats[counted - start :] / math.log(2))
        counted = start + len(window) - 1
        if start + n_ctx + 1 >= len(tokens):
            break
    return bits


@pytest.mark.parametrize("length", [2, 63, 64, 65, 66, 191, 192, 193, 194, 288, 289, 290, 1000])
@pytest.mark.parametrize("stride", [None, 1, 50, 96, 191, 192])
def test_every_token_is_counted_once_in_its_window(model, length, stride):
    if stride == 1:
        length = min(length, 200)
    tokens = random_tokens(model, length).tolist()
    found = list(surprises(model.matrices, model.hparams, iter(tokens), stride))
    assert [token for token, _ in found] == tokens[1:]
    np.testing.assert_allclose([bits for _, bits in found], by_hand(model, tokens, stride or 96), rtol=0, atol=1e-4)


def test_a_model_that_divides_its_passes_scores_texts_past_its_window():
    model = random_model(HParams(n_vocab=40, n_ctx=40, n_embd=512, n_head=4, n_layer=1), scale=0.05)
    tokens = random_tokens(model, 100).tolist()
    for prepared in (model.matrices, prepare(model.weights, threads=3)):
        bits = [bits for _, bits in surprises(prepared, model.hparams, tokens)]
        np.testing.assert_allclose(bits, by_hand(model, tokens, 20), rtol=0, atol=1e-3)


def test_a_text_of_one_token_or_none_has_nothing_to_predict(model):
    assert (
        list(surprises(model.matrices, model.hparams, [])) == list(surprises(model.matrices, model.hparams, [5])) == []
    )


def test_only_the_logits_that_are_needed_are_computed_at_once(model, monkeypatch):
    shapes, read = [], Slots.read
    monkeypatch.setattr(Slots, "read", lambda *args: (shapes.append((out := read(*args)).shape), out)[1])
    list(surprises(model.matrices, model.hparams, random_tokens(model, 1000).tolist()))
    assert max(rows for rows, _ in shapes) == POSITIONS


@pytest.mark.parametrize("stride", [0, -1, 193])
def test_strides_out_of_range_are_refused(model, stride):
    with pytest.raises(ValueError, match=f"stride is {stride}, where 1 to the model's n_ctx of 192 is expected"):
        model.score("A language model", stride)


def test_a_text_begins_after_end_of_text(model, monkeypatch):
    text = "A language model plays one small game.\n"
    tokens = model.tokenizer.encode(text)
    score = model.score(text)
    assert score.tokens == len(tokens)
    assert score.bits == pytest.approx(sum(by_hand(model, [model.tokenizer.end_of_text, *tokens], 96)), abs=1e-3)
    monkeypatch.setattr(model.tokenizer, "end_of_text", None)
    score = model.score(text)
    assert score.tokens == len(tokens) - 1
    assert score.bits == pytest.approx(sum(by_hand(model, tokens, 96)), abs=1e-3)


# ---- Figures


def test_figures_are_what_their_names_say():
    score = Score(bits=300.0, tokens=100, words=60, characters=150, bytes=200)
    assert (score.bits_per_byte, score.bits_per_character) == (1.5, 2.0)
    assert score.perplexity_per_token == pytest.approx(8)
    assert score.perplexity_per_word == pytest.approx(32)
    twice = score + score
    assert (twice.bits, twice.tokens, twice.bits_per_byte) == (600, 200, 1.5)
    assert Score(bits=1e6, tokens=1, words=1).perplexity_per_word == math.inf
    assert Score(bits=1e6, tokens=1, words=1).perplexity_per_token == math.inf


PIECES = st.lists(st.text(alphabet="ab \n\xe9\u3000\U0001f642'lst1.", max_size=6), max_size=8)


@given(PIECES)
def test_lengths_of_a_text_in_pieces_are_those_of_the_whole(pieces):
    score, text = Score(), "".join(pieces)
    assert "".join(score.counted(pieces)) == text
    assert (score.words, score.characters, score.bytes) == (len(text.split()), len(text), len(text.encode()))


@given(pieces=PIECES)
def test_tokens_of_a_text_in_pieces_are_those_of_the_whole(model, pieces):
    found = [token for tokens in model.tokenizer.encode_pieces(pieces) for token in tokens]
    assert found == model.tokenizer.encode("".join(pieces))


def test_a_single_word_in_many_pieces_takes_no_longer_than_its_length_asks_for(model, monkeypatch):
    """It is split anew only when it has doubled: 1,000 pieces are looked at in some 20 steps."""
    from npgpt2 import tokenizer

    looked_at = []

    class Words:
        def findall(self, text):
            looked_at.append(len(text))
            return words.findall(text)

    words = tokenizer.WORDS
    monkeypatch.setattr(tokenizer, "WORDS", Words())
    assert [t for tokens in model.tokenizer.encode_pieces(["a" * 100] * 1000) for t in tokens]
    assert sum(looked_at) < 6 * 100_000


def test_pieces_are_scored_like_the_whole(model):
    text = "A language model plays one small game: it reads some words and guesses the next.\n" * 9
    whole, pieces = model.score(text), model.score(iter(text[i : i + 7] for i in range(0, len(text), 7)))
    assert whole == pieces


def test_memory_does_not_grow_with_the_text(model, allocated_peak):
    def score(repeats):
        return allocated_peak(lambda: model.score(f"{i} A language model plays.\n" for i in range(repeats)))

    short, long = score(100), score(800)
    assert long < short + 50_000


# ---- The command


def rows(out):
    return [line.split() for line in out.splitlines()]


def test_score_prints_a_row_for_each_file_and_the_total(run, model, tmp_path):
    texts = {"a.txt": "A language model plays one small game.\n", "b.txt": "It has no eyes \u2014 and no ears.\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    status, out, err = run("score", *(tmp_path / name for name in texts), "-m", "MODEL")
    assert (status, err) == (0, "")
    assert rows(out)[0] == ["file", "tokens", "bits/byte", "bits/char", "perpl/token", "perpl/word"]
    scores = [model.score(text) for text in texts.values()]
    for row, score in zip(rows(out)[1:], [*scores, scores[0] + scores[1]], strict=True):
        assert row[1:4] == [f"{score.tokens}", f"{score.bits_per_byte:.4f}", f"{score.bits_per_character:.4f}"]
        assert row[4:] == [f"{score.perplexity_per_token:,.2f}", f"{score.perplexity_per_word:,.1f}"]
    assert rows(out)[3][0] == "total"


def test_score_of_standard_input_token_by_token(run, model):
    text = "A language model"
    status, out, _ = run("score", "-", "-m", "MODEL", "--per-token", stdin=text.encode())
    assert status == 0
    tokens = model.tokenizer.encode(text)
    assert [(int(line[1]), json.loads(" ".join(line[2:]))) for line in rows(out.replace('" ', '"_'))[:-2]] == [
        (token, model.tokenizer.decode([token]).replace(" ", "_")) for token in tokens
    ]
    assert sum(float(line[0]) for line in rows(out)[:-2]) == pytest.approx(model.score(text).bits, abs=1e-3)


def test_score_as_json(run, model):
    out = run("score", "-", "-m", "MODEL", "--json", "--per-token", stdin=b"A language model")[1]
    *tokens, summary = map(json.loads, out.splitlines())
    assert [token["text"] for token in tokens] == ["A", " language", " model"]
    score = model.score("A language model")
    assert summary["file"] == "-"
    assert summary["bits"] == pytest.approx(score.bits)
    assert summary["perplexity_per_word"] == pytest.approx(score.perplexity_per_word)
    assert {**vars(score)}.keys() <= summary.keys()


def test_score_takes_a_stride(run, model):
    text = "A language model plays one small game: it reads some words. " * 20
    out = run("score", "-", "-m", "MODEL", "--stride", "192", "--json", stdin=text.encode())[1]
    assert json.loads(out)["bits"] == pytest.approx(model.score(text, 192).bits) != model.score(text).bits
    assert failed(run("score", "-", "-m", "MODEL", "--stride", "193", stdin=b"A"), 1, "stride is 193")


def test_score_refuses_what_is_not_utf8(run, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"x" * 70_000 + b"caf\xe9 au lait")
    status, _, err = run("score", tmp_path / "latin.txt", "-m", "MODEL")
    assert status == 1
    assert "latin.txt: not UTF-8 at byte 70003 (0xe9)" in err


def test_next_shows_the_distribution(run, model):
    status, out, err = run("next", "A language model plays one", "-m", "MODEL", "--top", "3")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 3
    assert out.splitlines()[0].split()[2:3] == ['"']
    logits = model.logits(model.tokenizer.encode("A language model plays one"))[-1].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-probabilities)[:3]
    assert [int(line[1]) for line in rows(out)] == best.tolist()
    assert [line[0] for line in rows(out)] == [f"{probability:.2%}" for probability in probabilities[best]]


def test_next_at_temperature_0_is_one_token_and_top_k_cuts_off(run):
    assert len(run("next", "A", "-m", "MODEL", "--temperature", "0")[1].splitlines()) == 1
    assert len(run("next", "A", "-m", "MODEL", "--top-k", "4")[1].splitlines()) == 4
    assert len(run("next", "-m", "MODEL", "--top", "600")[1].splitlines()) == 520
    assert failed(run("next", "A", "-m", "MODEL", "--top-p", "0"), 2, "top_p is 0.0")
    assert failed(run("next", "A", "--file", "b", "-m", "MODEL"), 2, "a prompt or --file")


def test_next_shows_what_all_settings_make_of_the_distribution(run, model):
    settings = {
        "min_p": 0.0001, "typical_p": 0.99, "repetition_penalty": 1.5, "presence_penalty": 1.0,
        "frequency_penalty": 1.0, "no_repeat_ngram_size": 2, "min_tokens": 1, "logit_bias": {65: 20.0, 66: 21.0},
    }  # fmt: skip
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "logit_bias"]
    options += ["--logit-bias=65=20", "--logit-bias", "66=21"]
    prompt = "A language model plays one game. A language model"
    shown = rows(run("next", prompt, "-m", "MODEL", "--top", "5", *options)[1])
    tokens = model.tokenizer.encode(prompt)
    written = Written(tokens, model.hparams.n_vocab, [519])
    expected = Sampling(1.0, **settings).likeliest(model.next_logits(prompt), 5, written=written)
    assert [(line[0], int(line[1])) for line in shown] == [(f"{p:.2%}", token) for token, p in expected]
    plain = rows(run("next", prompt, "-m", "MODEL", "--top", "1")[1])
    assert int(plain[0][1]) == model.tokenizer.encode(" plays")[0]  # which would be a pair of tokens that came before
    banned = rows(run("next", prompt, "-m", "MODEL", "--top", "520", "--no-repeat-ngram-size", "2")[1])
    assert plain[0][1] not in [line[1] for line in banned]
    ended = rows(run("next", " reach the last.", "-m", "MODEL", "--top", "520", "--min-tokens", "1")[1])
    assert len(ended) == 519


def test_next_goes_by_the_end_of_prompts_longer_than_the_window(run, model):
    for end in ("A language model plays one", "It has no"):
        prompt = "A language model plays one small game. " * 60 + end
        shown = run("next", prompt, "-m", "MODEL", "--top", "1")[1]
        assert json.loads(re.search('".*"', shown)[0]) == model.generate(prompt, length=1)


def test_an_empty_text_has_no_score(run):
    assert failed(run("score", "-", "-m", "MODEL", stdin=b""), 1, "-: has nothing to score")
