"""What npgpt2's settings make of logits, against Hugging Face's transformers: each setting, and random chains of them,
one step after another as in transformers' own list, and in its own loop.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from distributions import probabilities
from transformers.generation import logits_process as theirs

from npgpt2 import Engine
from npgpt2.samplers import FILTERS, PROCESSORS, Written
from npgpt2.sampling import Sampling

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

V, ENDS = 300, [7, 299]
# What each setting is on, where a random chain has it. Biases are of float32, to which transformers rounds them.
VALUES = {
    "logit_bias": [{3: 2.5, 250: -1.25}, dict.fromkeys(range(40), -100.0), {7: 100.0}],
    "repetition_penalty": [0.7, 1.05, 1.2, 2.0, 5.0],
    "presence_penalty": [-0.5, 0.6, 2.0],
    "frequency_penalty": [-0.25, 0.3, 1.0],
    "no_repeat_ngram_size": [1, 2, 3, 4, 8],
    "min_tokens": [1, 20, 100],
    "temperature": [0.1, 0.7, 1.3, 3.0],
    "top_k": [1, 2, 10, 40, 299, 1000],
    "top_p": [1e-6, 0.1, 0.5, 0.9, 0.999],
    "min_p": [0.001, 0.02, 0.1, 0.5, 1.0],
    "typical_p": [1e-6, 0.05, 0.2, 0.6, 0.95, 0.999],
}


class OpenAIs(theirs.LogitsProcessor):
    """Presence and frequency, which transformers hasn't, as vLLM computes them, and llama.cpp."""

    def __init__(self, presence, frequency, prompt):
        self.presence, self.frequency, self.prompt = presence, frequency, prompt

    def __call__(self, ids, scores):
        counts = torch.bincount(ids[0, self.prompt :], minlength=scores.shape[-1]).to(scores)
        return scores - self.frequency * counts - self.presence * (counts > 0)


def their_steps(settings, prompt):
    """The same settings as transformers has them, in its order: `GenerationMixin._get_logits_processor`."""
    given, steps = settings.get, theirs.LogitsProcessorList()
    if bias := given("logit_bias"):
        steps.append(theirs.SequenceBiasLogitsProcessor({(token,): float(value) for token, value in bias.items()}))
    if given("repetition_penalty"):
        steps.append(theirs.RepetitionPenaltyLogitsProcessor(given("repetition_penalty")))
    if given("presence_penalty") or given("frequency_penalty"):
        steps.append(OpenAIs(given("presence_penalty", 0), given("frequency_penalty", 0), prompt))
    if given("no_repeat_ngram_size"):
        steps.append(theirs.NoRepeatNGramLogitsProcessor(given("no_repeat_ngram_size")))
    if given("min_tokens"):
        steps.append(theirs.MinNewTokensLengthLogitsProcessor(prompt, given("min_tokens"), ENDS))
    if not given("temperature"):
        return steps
    steps.append(theirs.TemperatureLogitsWarper(float(given("temperature"))))
    for name, warper in (
        ("top_k", theirs.TopKLogitsWarper),
        ("top_p", theirs.TopPLogitsWarper),
        ("min_p", theirs.MinPLogitsWarper),
        ("typical_p", theirs.TypicalLogitsWarper),
    ):
        if given(name):
            steps.append(warper(given(name)))
    return steps


def case(seed):
    """A prompt and a text of few different tokens, and logits, which transformers is given in float64."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 12, rng.integers(1, 40)).tolist()
    text = rng.integers(0, 12, rng.integers(0, 40)).tolist()
    return rng.normal(-1, rng.choice([1, 3, 8]), V), prompt, text


def chain(seed):
    rng = np.random.default_rng((seed, 1))
    settings = {name: values[rng.integers(len(values))] for name, values in VALUES.items() if rng.random() < 0.45}
    return {"temperature": 1.0} | settings


def compare(settings, logits, prompt, text):
    written = Written(prompt, V, ENDS)
    for token in text:
        written.append(token)
    ids = torch.tensor([prompt + text])
    scores = their_steps(settings, len(prompt))(ids, torch.from_numpy(logits)[None])[0]
    drawn = scores.softmax(-1).numpy()
    ours = probabilities(Sampling(**settings), logits, written)
    np.testing.assert_array_equal(ours > 0, drawn > 0, str(settings))
    np.testing.assert_allclose(ours, drawn, rtol=1e-6, atol=1e-15, err_msg=str(settings))
    greedy = settings | {"temperature": 0}
    scores = their_steps(greedy, len(prompt))(ids, torch.from_numpy(logits)[None])[0]
    assert Sampling(**greedy).choose(logits, np.uint64(0), written=written) == int(scores.argmax())
    return ours


def test_every_sampler_is_compared():
    assert set(VALUES) == {*PROCESSORS, *FILTERS}


@pytest.mark.parametrize("name", VALUES)
def test_each_sampler_gives_the_probabilities_of_transformers(name):
    for value in VALUES[name]:
        for seed in range(30):
            compare({"temperature": 1.0} | {name: value}, *case(seed))


def test_random_chains_of_samplers_give_the_probabilities_of_transformers():
    sizes = []
    for seed in range(1500):
        sizes.append(np.count_nonzero(compare(chain(seed), *case(seed))))
    assert 1 in sizes
    assert sum(size > 20 for size in sizes) > 300


def test_float32_logits_of_a_whole_vocabulary_are_sampled_as_transformers_does_in_float64():
    rng = np.random.default_rng(0)
    logits = rng.normal(-30, 4, 50257).astype(np.float32)
    prompt = rng.integers(0, 50257, 500).tolist()
    settings = {"temperature": 0.8, "repetition_penalty": 1.2, "min_p": 0.001, "typical_p": 0.9}
    scores = their_steps(settings, 500)(torch.tensor([prompt]), torch.from_numpy(logits.astype(np.float64))[None])[0]
    ours = probabilities(Sampling(**settings), logits, Written(prompt, 50257))
    np.testing.assert_array_equal(ours > 0, scores.softmax(-1).numpy() > 0)
    np.testing.assert_allclose(ours, scores.softmax(-1).numpy(), rtol=1e-6)


@pytest.mark.parametrize("typical_p", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5])
def test_tokens_as_likely_as_those_at_the_border_are_kept_as_transformers_keeps_them(min_p, typical_p):
    settings = {"temperature": 0.8, "typical_p": typical_p} | ({"min_p": min_p} if min_p else {})
    for seed in range(20):
        compare(settings, np.random.default_rng(seed).integers(0, 6, V).astype(float), [1], [])


def test_the_paper_would_keep_fewer_of_equally_typical_tokens_than_transformers_and_we():
    logits = np.log([0.3, *[0.1] * 7, *[1e-30] * (V - 8)])
    assert np.count_nonzero(compare({"temperature": 1.0, "typical_p": 0.25}, logits, [1], [])) == 7


@pytest.mark.parametrize("settings", [*([name] for name in VALUES), *[[*VALUES]] * 4])
def test_what_is_drawn_has_the_probabilities_of_transformers(settings, request):
    """Chi-square on 20,000 draws, of each setting and of chains of all: beyond what chance brings once in 10,000 times,
    though the seeds, and so the draws, are fixed.
    """
    seed = request.node.callspec.indices["settings"]
    rng = np.random.default_rng((seed, 2))
    mild = {"logit_bias": 1, "top_k": 3, "top_p": 3, "min_p": 1, "typical_p": 3, "temperature": 2}  # many can come
    values = {name: VALUES[name][mild.get(name, rng.integers(len(VALUES[name])))] for name in settings}
    settings = {"temperature": 1.0} | values
    logits, prompt, text = case(seed)
    logits = logits / 4
    written = Written(prompt, V, ENDS)
    for token in text:
        written.append(token)
    scores = their_steps(settings, len(prompt))(torch.tensor([prompt + text]), torch.from_numpy(logits)[None])[0]
    drawn = scores.softmax(-1).numpy()
    sampling = Sampling(**settings, seed=seed)
    numbers = sampling.numbers()
    drawn_here = [sampling.choose(logits, numbers(place), written=written) for place in range(20_000)]
    counts = np.bincount(drawn_here, minlength=V)
    assert counts[drawn == 0].sum() == 0
    often = drawn * 20_000 >= 5
    expected = np.append(drawn[often], drawn[~often].sum()) * 20_000
    seen = np.append(counts[often], counts[~often].sum())
    if expected[-1] < 5:  # too few for the statistic
        expected, seen = expected[:-1], seen[:-1]
    assert len(expected) > 10
    chi_square = ((seen - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    # Wilson & Hilferty 1931: the cube root of chi-square over its freedom is nearly normal; 3.72 is 1 in 10,000.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < bound


# ---- The loop


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One random model, here and there."""
    from npgpt2 import load
    from npgpt2.convert import convert

    sizes = {"vocab_size": V, "n_positions": 128, "n_embd": 32, "n_head": 2, "n_layer": 2}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=ENDS, initializer_range=0.3)
    ).eval()
    folder = tmp_path_factory.mktemp("pair")
    model.save_pretrained(folder)
    return load(convert(folder, folder / "model.npz", vocabulary=False).path), model


def in_their_names(settings):
    """Settings as transformers' `generate` takes them."""
    named = {name: value for name, value in settings.items() if name not in ("logit_bias", "min_tokens")}
    if bias := settings.get("logit_bias"):
        named["sequence_bias"] = {(token,): value for token, value in bias.items()}
    if least := settings.get("min_tokens"):
        named["min_new_tokens"] = least
    return named


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 1, "repetition_penalty": 1.1},
        {"logit_bias": {5: 2.0, 9: -3.0}, "repetition_penalty": 0.9, "no_repeat_ngram_size": 3},
        {"min_tokens": 60},
        {"min_tokens": 20, "repetition_penalty": 1.5},
    ],
)
def test_greedy_texts_are_those_of_transformers_own_loop(pair, settings):
    ours, model = pair
    named = in_their_names(settings)
    for seed in range(4):
        prompt = np.random.default_rng(seed).integers(0, V, 10).tolist()
        said = model.generate(
            torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=0, eos_token_id=ENDS, **named
        )[0, 10:].tolist()
        engine = Engine(ours, slots=1, text=False)
        request = engine.submit(prompt, length=60, **settings)
        while engine.busy:
            engine.step()
        assert request.tokens == said


def test_what_transformers_own_loop_draws_from_is_what_we_would_draw_from(pair):
    """From its logits, step by step, with all settings that it has at once, whose order is its own here. It computes in
    float32, so that now and then a token at the border is kept here and not there.
    """
    _, model = pair
    steps = differ = 0
    for seed in range(12):
        rng = np.random.default_rng((seed, 3))
        settings = {
            name: values[rng.integers(len(values))] for name, values in VALUES.items() if "_penalty" not in name
        }
        settings |= {"repetition_penalty": float(rng.choice([0.8, 1.3])), "top_k": 60, "top_p": 0.97, "typical_p": 0.9}
        prompt = rng.integers(0, 12, 10).tolist()
        torch.manual_seed(seed)
        said = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 10), max_new_tokens=40, do_sample=True,
            pad_token_id=0, eos_token_id=ENDS, return_dict_in_generate=True, output_scores=True, output_logits=True,
            **in_their_names(settings),
        )  # fmt: skip
        written = Written(prompt, V, ENDS)
        for token, logits, scores in zip(said.sequences[0, 10:].tolist(), said.logits, said.scores, strict=True):
            ours = probabilities(Sampling(**settings), logits[0].numpy(), written)
            drawn = scores[0].softmax(-1).numpy()
            if np.array_equal(ours > 0, drawn > 0):
                np.testing.assert_allclose(ours, drawn, rtol=1e-4, atol=1e-9, err_msg=str(settings))
            else:
                differ += 1
            steps += 1
            written.append(token)
    assert steps > 200
    assert differ <= steps // 100
