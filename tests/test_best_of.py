"""The likeliest of several texts, by the mean of its tokens' log-probabilities."""

import numpy as np
import pytest
from commands import failed

from npgpt2.engine import Request, draws, mean_logprob
from npgpt2.sampling import Sampling

DRAWING = {"temperature": 3.5, "seed": 3, "length": 8, "ignore_eot": True}


def likelihood(model, prompt, tokens):
    """The mean of the tokens' log-probabilities, read anew."""
    before = model.tokenizer.encode(prompt)
    logits = model.logits(before + tokens).astype(float)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.mean([scores[len(before) - 1 + i, token] for i, token in enumerate(tokens)])


def drawn_alone(model, prompt, number):
    """One of the seed's samples: its text, and how likely it is."""
    stream = model.stream(prompt, **DRAWING, sample=number)
    return "".join(stream), likelihood(model, prompt, stream.request.tokens)


def test_it_is_the_likeliest_of_the_seeds_first_samples(model):
    drawn = [drawn_alone(model, "A language", i) for i in range(6)]
    best = max(drawn, key=lambda one: one[1])
    assert drawn.index(best) > 0
    assert model.generate("A language", best_of=6, **DRAWING) == best[0]
    assert model.generate("A language", best_of=6, logprobs=3, **DRAWING) == best[0]


def test_sample_i_of_n_has_the_draws_from_i_times_n_on(model):
    drawn = [drawn_alone(model, "A language", i) for i in range(12)]
    best = [max(drawn[i : i + 4], key=lambda one: one[1])[0] for i in (0, 4, 8)]
    assert len(set(best)) == 3
    assert [model.generate("A language", best_of=4, sample=i, **DRAWING) for i in range(3)] == best
    assert model.generate(["A language"] * 3, best_of=4, **DRAWING) == best
    for batch_size in (1, 3, 12, 50):
        assert list(model.samples("A language", 3, batch_size, best_of=4, **DRAWING)) == best
    assert list(model.samples("A language", 2, first=1, best_of=4, **DRAWING)) == best[1:]
    endless = model.samples("A language", 0, best_of=4, **DRAWING)
    assert [next(endless) for _ in range(3)] == best


def test_small_numbers_of_numpys_count_as_pythons(model):
    ours = model.generate(["A language"] * 2, best_of=100, temperature=3.5, seed=3, length=1)
    assert model.generate(["A language"] * 2, best_of=np.int8(100), temperature=3.5, seed=3, length=1) == ours
    drawn = model.samples("A", np.int8(2), np.int8(100), best_of=np.int8(100), temperature=3.5, seed=3, length=1)
    assert list(drawn) == list(model.samples("A", 2, 7, best_of=100, temperature=3.5, seed=3, length=1))


def test_best_of_one_is_the_sample_itself(model):
    assert model.generate("A language", best_of=1, **DRAWING) == model.generate("A language", **DRAWING)
    assert list(draws({"logprobs": None}, 3, 1)) == [{"logprobs": None, "sample": 3}]


def test_the_prompt_is_read_once(model, passes):
    prompt = model.tokenizer.encode("A language model plays one small game: guess what comes next")[:12]
    model.generate(prompt, best_of=5, **DRAWING)
    assert passes[0] == [12]
    assert all(set(read) == {1} for read in passes[1:])


def test_no_tokens_have_no_mean():
    assert mean_logprob(Request([1], Sampling(), None)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best_of": 0, "temperature": 1}, "best_of is 0, where a whole number of at least 1 is expected"),
        ({"best_of": 129, "temperature": 1}, "best_of is 129, where a whole number from 1 to 128 is expected"),
        ({"best_of": 2}, "best_of is 2, but all texts are the same at temperature 0; set a temperature"),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused_at_the_call(model, run, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate("A", **settings)
    with pytest.raises(ValueError, match=message):
        model.samples("A", **settings)


def test_the_command_prints_the_likeliest_of_each_samples_draws(run, model):
    options = ["--temperature", "3.5", "--seed", "3", "--length", "8", "--ignore-eot"]
    arguments = ["generate", "A language", "-m", "MODEL", *options]
    first, second = model.samples("A language", 2, best_of=4, **DRAWING)
    assert run(*arguments, "--best-of", "4")[:2] == (0, f"{first}\n")
    for more in ([], ["--batch-size", "2"]):
        out = run(*arguments, "--best-of", "4", "--nsamples", "2", *more)[1]
        head = "=" * 40
        assert out == f"{head} SAMPLE 1 {head}\n{first}\n{head} SAMPLE 2 {head}\n{second}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--best-of", "2"], "best_of is 2, but all texts are the same at temperature 0"),
        (["--best-of", "129", "--temperature", "1"], "best_of is 129"),
        (["--best-of", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_the_command_refuses_what_leaves_nothing_to_choose(run, options, message):
    assert failed(run("generate", "A", "-m", "MODEL", *options), 2, message, "--help")
