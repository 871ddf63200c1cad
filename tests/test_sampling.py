"""What changes logits, what narrows the choice, and the draw, against their definitions."""

import pickle
from collections import Counter
from dataclasses import fields
from math import exp, inf, log

import numpy as np
import pytest
from distributions import probabilities
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from npgpt2.engine import Limits, Settings
from npgpt2.samplers import FILTERS, PROCESSORS, Candidates, Written
from npgpt2.sampling import RANGES, WHOLE, Sampling, SamplingSettings, draw, hashed, waits

# What SplitMix64 gives first for the seeds 0 and 1234567, as in Java's and other libraries' tests.
SPLITMIX64 = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
}
# The numbers of (seed 42, sample 7, place 1000) and (0, 0, 0): NumPy keeps what its SeedSequence gives.
RECORDED = [10035723528716314215, 3177686997658539410]
LOGITS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))


def plain_probabilities(logits, temperature, top_k, top_p):
    """Word for word what the README says, one token at a time."""
    logits = [float(x) / temperature for x in logits]
    if top_k:
        kth = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        logits = [x if x >= kth else -np.inf for x in logits]
    weights = [np.exp(x - max(logits)) for x in logits]
    probabilities = [w / sum(weights) for w in weights]
    kept, reached = set(), 0.0
    for token in sorted(range(len(logits)), key=lambda token: -probabilities[token]):
        if reached >= top_p:
            break
        kept.add(token)
        reached += probabilities[token]
    if top_p == 1:
        kept = set(range(len(logits)))
    total = sum(probabilities[token] for token in kept)
    return [p / total if token in kept else 0.0 for token, p in enumerate(probabilities)]


@given(LOGITS, st.floats(0.05, 20), st.integers(0, 45), st.sampled_from([1.0, 0.999, 0.9, 0.63, 0.5, 0.07, 1e-9]))
def test_probabilities_follow_the_definition(logits, temperature, top_k, top_p):
    actual = probabilities(Sampling(temperature, top_k, top_p), logits)
    expected = plain_probabilities(logits, temperature, top_k, top_p)
    if 0 < top_p < 1 and (np.array(expected) > 0).sum() != (actual > 0).sum():
        # Sums in another order can differ in the last bit, which counts where the set reaches p exactly.
        reached = np.sort(plain_probabilities(logits, temperature, top_k, 1.0))[::-1].cumsum()
        assert np.abs(reached - top_p).min() < 1e-12
    else:
        np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_temperature_0_is_greedy_and_takes_the_first_of_equals():
    assert {Sampling(0).choose(np.float32([1, 3, 3, 2]), np.uint64(number)) for number in range(20)} == {1}


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-9])
def test_the_smallest_temperatures_are_greedy_too(temperature):
    np.testing.assert_array_equal(probabilities(Sampling(temperature), np.float32([-7, 9, 2])), [0, 1, 0])


def test_a_large_temperature_makes_everything_equally_likely():
    np.testing.assert_allclose(probabilities(Sampling(1e300), np.float32([-7, 9, 2])), [1 / 3] * 3)


def test_top_k_keeps_ties_at_the_kth_value():
    np.testing.assert_allclose(probabilities(Sampling(1, top_k=2), np.float32([5, 1, 1, 1, 0])) > 0, [1, 1, 1, 1, 0])


def test_top_k_larger_than_the_vocabulary_keeps_all():
    assert (probabilities(Sampling(1, top_k=99), np.float32([1, 2, 3])) > 0).all()


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125])).astype(np.float32)
    kept = [np.count_nonzero(probabilities(Sampling(1, top_p=p), logits)) for p in (0.1, 0.49, 0.51, 0.74, 0.76, 0.9)]
    assert kept == [1, 1, 2, 2, 3, 4]


def test_top_p_counts_after_top_k():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    # Among the two that top-k leaves, the first has 0.4 / 0.7 = 0.57.
    np.testing.assert_allclose(probabilities(Sampling(1, top_k=2, top_p=0.55), logits), [1, 0, 0, 0])


# ---- The draw


def chi_square_within(seen, expected):
    """Whether counts are as expected (N,), up to what chance brings once in 10,000 times: chi-square, of which Wilson
    and Hilferty found in 1931 that its cube root is nearly normal.
    """
    freedom = len(expected) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    return ((seen - expected) ** 2 / expected).sum() < bound


TEN_ALIKE, BY_SEED = np.zeros(10, np.float32), Sampling(1, seed=3)


def drawn_at(places, sampling=BY_SEED, logits=TEN_ALIKE):
    numbers = sampling.numbers()
    return np.array([sampling.choose(logits, numbers(place)) for place in places])


@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 3.0}])
def test_draws_have_the_probabilities_computed(settings):
    sampling, logits = Sampling(**{"temperature": 1.0, "seed": 3} | settings), np.float32([1, 0, 2, -3, 0.5, 1.5])
    expected = 20_000 * probabilities(sampling, logits)
    seen = np.bincount(drawn_at(range(20_000), sampling, logits), minlength=6)
    assert seen[expected == 0].sum() == 0
    assert chi_square_within(seen[expected > 0], expected[expected > 0])


def test_a_large_vocabulary_is_drawn_as_likely_as_it_is():
    tokens, edges = np.arange(50_257), np.linspace(0, 50_257, 21).astype(int)  # of twenty runs of tokens
    p = np.random.default_rng(0).exponential(size=tokens.size) ** 3
    p /= p.sum()
    numbers = Sampling(seed=0).numbers()
    drawn = np.array([draw(tokens, p, numbers(place)) for place in range(2000)])
    seen, _ = np.histogram(drawn, edges)
    assert chi_square_within(seen, 2000 * np.diff(np.append(0, np.cumsum(p))[edges]))


@pytest.mark.parametrize("pair", ["seeds", "samples", "places", "far places"])
def test_what_is_drawn_by_other_numbers_is_independent(pair):
    """Pairs of draws from ten tokens, a hundred kinds, are all as often as each other."""
    one, other = {
        "seeds": (drawn_at(range(5000)), drawn_at(range(5000), Sampling(1, seed=4))),
        "samples": (drawn_at(range(5000)), drawn_at(range(5000), Sampling(1, seed=3, sample=1))),
        "places": (drawn_at(range(5000)), drawn_at(range(1, 5001))),
        "far places": (drawn_at(range(5000)), drawn_at(range(2**40, 2**40 + 5000))),
    }[pair]
    assert chi_square_within(np.bincount(10 * one + other, minlength=100), np.full(100, 50.0))


def test_first_draws_of_seeds_and_samples_that_follow_each_other_are_independent():
    for samplings in ([Sampling(1, seed=i) for i in range(5000)], [Sampling(1, seed=1, sample=i) for i in range(5000)]):
        drawn = np.array([drawn_at([0], sampling)[0] for sampling in samplings])
        assert chi_square_within(np.bincount(drawn, minlength=10), np.full(10, 500.0))
        pairs = np.bincount(10 * drawn[:-1] + drawn[1:], minlength=100)
        assert chi_square_within(pairs, np.full(100, 4999 / 100))


def test_tokens_wait_independently_of_each_other():
    """In ten parts of equal probability, each token's time is in each as often, and so are pairs of tokens' times."""
    numbers = Sampling(seed=5).numbers()
    times = np.array([waits(np.arange(8), np.ones(8), numbers(place)) for place in range(10_000)])
    parts = np.floor(10 * np.exp(-times)).astype(int)
    for one in range(8):
        assert chi_square_within(np.bincount(parts[:, one], minlength=10), np.full(10, 1000.0))
        for other in range(one):
            pairs = np.bincount(10 * parts[:, one] + parts[:, other], minlength=100)
            assert chi_square_within(pairs, np.full(100, 100.0))


def test_numbers_are_those_of_splitmix64():
    for seed, first in SPLITMIX64.items():
        assert hashed(np.uint64(seed), np.arange(3)).tolist() == first
        assert [int(hashed(np.uint64(seed), i)) for i in range(3)] == first


def test_a_bit_of_number_or_value_changes_half_of_the_hash():
    """Each bit of the result changes in half of all cases, for each bit that went in: strict avalanche."""
    numbers, values = np.random.default_rng(0).integers(0, 2**63, (2, 2000)).astype(np.uint64)
    before = hashed(numbers, values)
    for bit in np.uint64(1) << np.arange(64, dtype=np.uint64):
        for after in (hashed(numbers ^ bit, values), hashed(numbers, values ^ bit)):
            changed = np.unpackbits((before ^ after)[:, None].view(np.uint8), axis=1).mean(0)
            assert abs(changed - 0.5).max() < 0.07  # six standard deviations


def test_logits_rounded_otherwise_lead_to_the_same_draws():
    """As passes of other sizes round them, by 2e-6: of 3,000 draws from a large vocabulary, none differs."""
    rng, sampling = np.random.default_rng(0), Sampling(1, top_k=2000, seed=1)
    numbers, logits = sampling.numbers(), rng.normal(0, 3, 50_257).astype(np.float32)
    for place in range(3000):
        other = logits + rng.uniform(-2e-6, 2e-6, logits.size).astype(np.float32)
        assert sampling.choose(logits, numbers(place)) == sampling.choose(other, numbers(place))


def test_a_draw_depends_on_no_token_but_those_that_can_come():
    """Whatever else is cut off, the token that waited least still does."""
    logits, numbers = np.random.default_rng(0).normal(size=1000).astype(np.float32), Sampling(seed=1).numbers()
    for place in range(200):
        token = Sampling(1, top_k=500).choose(logits, numbers(place))
        kept = Sampling(1, top_k=500).candidates(logits)[0][::3]
        if token in kept:
            assert Sampling(1).choose(logits, numbers(place), among=kept) == token


@pytest.mark.parametrize("extreme", [0, 2**64 - 1])
def test_the_smallest_and_the_largest_hash_wait_for_a_time(extreme, monkeypatch):
    monkeypatch.setattr("npgpt2.sampling.hashed", lambda number, tokens: np.full(len(tokens), extreme, np.uint64))
    (time,) = waits(np.array([0]), np.array([0.5]), np.uint64(0))
    assert 0 < time < 100


def test_what_has_become_impossible_is_never_drawn():
    assert {*drawn_at(range(500), Sampling(1e-9, seed=0), np.float32([-50, 1, 1]))} == {1, 2}


def test_samples_of_a_seed_are_repeatable_and_others():
    pairs = [(seed, sample) for seed in range(5) for sample in range(5)]
    numbers = {(seed, sample): Sampling(seed=seed, sample=sample).numbers()(0) for seed, sample in pairs}
    assert len(set(numbers.values())) == 25
    assert numbers[4, 4] == Sampling(seed=4, sample=4).numbers()(0)


def test_without_a_seed_numbers_differ_but_stay_for_a_text():
    sampling = Sampling()
    assert len({int(sampling.numbers()(0)) for _ in range(5)}) == 5
    numbers = sampling.numbers()
    assert numbers(3) == numbers(3) != numbers(4)


def test_random_numbers_are_the_same_on_every_machine_and_numpy():
    assert [int(Sampling(seed=42, sample=7).numbers()(1000)), int(Sampling(seed=0).numbers()(0))] == RECORDED


def test_settings_are_declared_alike_as_fields_and_as_keyword_arguments():
    """`SamplingSettings` and `Settings` are what editors complete; the two classes are what is checked."""
    assert {*SamplingSettings.__annotations__} == {field.name for field in fields(Sampling)}
    both = {field.name: field.type for field in (*fields(Sampling), *fields(Limits))}
    assert {name: kind.__forward_arg__ for name, kind in Settings.__annotations__.items()} == both


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"min_p": -0.1}, r"min_p is -0.1, where a number from 0 to 1 is expected \(0 keeps all\)"),
        ({"min_p": 1.01}, "min_p is 1.01"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"typical_p": 0}, r"typical_p is 0, where a number above 0 and up to 1 is expected \(1 keeps all\)"),
        ({"typical_p": 2}, "typical_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, where a number from 0.01 to 100 is expected"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5, where a number from -2 to 2 is expected"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3, where a number from -2 to 2 is expected"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1, where a whole number of at least 0 is expected"),
        ({"min_tokens": -1}, "min_tokens is -1, where a whole number of at least 0 is expected"),
        ({"logit_bias": {-1: 0}}, "logit_bias has 0 for token -1, where numbers from -100 to 100 for ids from 0 on"),
        ({"logit_bias": {5: 101}}, "logit_bias has 101 for token 5, where numbers from -100 to 100"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias has nan for token 5"),
        ({"seed": -1}, "seed is -1"),
        ({"sample": -1}, "sample is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_refused(broken):
    with pytest.raises(ValueError, match="not a number"):
        Sampling().choose(np.float32([0, broken]), np.uint64(0))


# ---- Processors, and chains of everything


def plain_changed(logits, prompt, text, ends, settings):
    """What the guide says of what changes logits, one token at a time."""
    changed, n = [], settings.get("no_repeat_ngram_size", 0)
    everything = [*prompt, *text]
    for token, z in enumerate(map(float, logits)):
        z += settings.get("logit_bias", {}).get(token, 0)
        if token in everything:
            theta = settings.get("repetition_penalty", 1)
            z = z * theta if z < 0 else z / theta
        z -= settings.get("presence_penalty", 0) * (token in text)
        z -= settings.get("frequency_penalty", 0) * text.count(token)
        longer = [*everything, token]
        if n and len(longer) > n and longer[-n:] in [everything[i : i + n] for i in range(len(everything) - n + 1)]:
            z = -inf
        if token in ends and len(text) < settings.get("min_tokens", 0):
            z = -inf
        changed.append(z)
    return changed


def softmax(logits):
    weights = [exp(z - max(logits)) for z in logits]
    return [w / sum(weights) for w in weights]


def plain_narrowed(logits, settings):
    """What the guide says of what narrows the choice, in its order: the probabilities of all tokens, 0 if cut off."""

    def keep(kept):
        return [z if token in kept else -inf for token, z in enumerate(logits)]

    logits = [z / settings.get("temperature", 1) for z in logits]
    if k := settings.get("top_k"):
        kth = sorted(logits, reverse=True)[:k][-1]
        logits = keep([token for token, z in enumerate(logits) if z >= kth])
    for name in ("top_p", "min_p", "typical_p"):
        p = softmax(logits)
        left = [token for token in range(len(p)) if p[token]]
        if name == "min_p":
            logits = keep([token for token in left if p[token] >= settings.get(name, 0) * max(p)])
            continue
        rank = {token: -p[token] for token in left}
        if name == "typical_p":
            entropy = -sum(p[token] * log(p[token]) for token in left)
            rank = {token: abs(-log(p[token]) - entropy) for token in left}
        kept, reached = [], 0.0
        for token in sorted(left, key=rank.get):
            if reached < settings.get(name, 1) or settings.get(name, 1) == 1:
                kept.append(token)
                reached += p[token]
        logits = keep(kept)
    return softmax(logits)


def written(prompt, text, n_vocab, ends=()):
    whole = Written(prompt, n_vocab, ends)
    for token in text:
        whole.append(token)
    return whole


# What each setting is on, where a random chain has it.
VALUES = {
    "temperature": [0.3, 0.9, 2.0],
    "top_k": [1, 3, 9, 40],
    "top_p": [0.2, 0.6, 0.95],
    "min_p": [0.01, 0.1, 0.5, 1.0],
    "typical_p": [0.05, 0.3, 0.7, 0.99],
    "logit_bias": [{0: -100.0, 3: 2.5, 19: -1.0}, {7: 100}],
    "repetition_penalty": [0.5, 1.2, 3.0],
    "presence_penalty": [-0.5, 1.5],
    "frequency_penalty": [-0.3, 0.7],
    "no_repeat_ngram_size": [1, 2, 3, 5],
    "min_tokens": [1, 4, 30],
}


def random_case(seed, n_vocab=20):
    """A chain of settings, logits, a prompt, a text and the tokens that end one, of which few are different."""
    rng = np.random.default_rng(seed)
    settings = {name: values[rng.integers(len(values))] for name, values in VALUES.items() if rng.random() < 0.5}
    prompt, text = (rng.integers(n_vocab // 2, size=rng.integers(0, 14)).tolist() for _ in range(2))
    return settings, rng.normal(0, 3, n_vocab).astype(np.float32), prompt, text, [0, n_vocab - 1]


def test_the_values_are_of_every_setting_of_both_rows():
    assert set(VALUES) == {*PROCESSORS, *FILTERS}


@pytest.mark.parametrize("name", VALUES)
def test_each_sampler_alone_follows_the_definition(name):
    for value in VALUES[name]:
        for seed in range(20):
            _, logits, prompt, text, ends = random_case(seed)
            settings = {"temperature": 1.0} | {name: value}
            changed = plain_changed(logits, prompt, text, ends, settings)
            actual = probabilities(Sampling(**settings), logits, written(prompt, text, 20, ends))
            np.testing.assert_allclose(actual, plain_narrowed(changed, settings), rtol=1e-9, atol=1e-15)


def test_random_chains_follow_the_definition():
    for seed in range(500):
        settings, logits, prompt, text, ends = random_case(seed)
        changed = plain_changed(logits, prompt, text, ends, settings)
        before = written(prompt, text, 20, ends)
        greedy = Sampling(**settings | {"temperature": 0})
        assert greedy.choose(logits, np.uint64(0), written=before) == np.argmax(changed), settings
        settings = {"temperature": 1.0} | settings
        actual, expected = probabilities(Sampling(**settings), logits, before), plain_narrowed(changed, settings)
        np.testing.assert_array_equal(actual > 0, np.array(expected) > 0, str(settings))
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 6))
def test_no_ngram_comes_twice_and_nothing_else_is_banned(tokens, n):
    logits = np.float32([0, 0, 0, 0])
    allowed = [*plain_changed(logits, tokens, [], [], {"no_repeat_ngram_size": n})]
    ids, _ = Sampling(1, no_repeat_ngram_size=n).candidates(logits, written=Written(tokens, 4))
    assert ids.tolist() == [token for token, z in enumerate(allowed) if z == 0]


def test_each_token_is_penalized_once_for_being_in_prompt_and_text():
    logits = np.float32([2, 2, -2, -2])
    drawn = Sampling(1, repetition_penalty=2).candidates(logits, written=written([0, 2], [0, 0, 2], 4))[1]
    np.testing.assert_allclose(np.log(drawn / drawn[1]), [-1, 0, -6, -4])


def test_presence_and_frequency_count_what_was_generated_alone():
    logits, before = np.zeros(4, np.float32), written([0, 0, 1], [1, 2, 2], 4)
    drawn = Sampling(1, presence_penalty=1, frequency_penalty=0.5).candidates(logits, written=before)[1]
    np.testing.assert_allclose(np.log(drawn / drawn[0]), [0, -1.5, -2, 0])


def test_typical_p_can_drop_the_likeliest_token_and_keeps_those_that_are_as_typical():
    logits = np.log([0.3, *[0.1] * 7]).astype(np.float32)  # the entropy is 1.97, -log 0.3 is 1.2 and -log 0.1 is 2.3
    assert Sampling(1, typical_p=0.25).candidates(logits)[0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert Sampling(1, typical_p=0.75).candidates(logits)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_min_p_of_1_keeps_those_as_likely_as_the_likeliest():
    assert Sampling(1, min_p=1).candidates(np.float32([1, 3, 3, 2]))[0].tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9, 1e300])
def test_filters_stand_all_temperatures(temperature):
    chain = Sampling(temperature, top_p=0.99, min_p=0.1, typical_p=0.9)
    tokens, drawn = chain.candidates(np.float32([-7, 9, 2]))
    assert tokens[np.argmax(drawn)] == 1 or temperature > 1
    assert drawn.sum() == pytest.approx(1)


def test_what_is_off_is_left_out():
    assert Sampling().steps(PROCESSORS) == Sampling().steps(FILTERS) == []
    off = {"top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "repetition_penalty": 1, "presence_penalty": 0}
    off |= {"frequency_penalty": 0, "no_repeat_ngram_size": 0, "min_tokens": 0, "logit_bias": {}}
    assert Sampling(**off).steps(PROCESSORS) == Sampling(**off).steps(FILTERS) == []
    assert Sampling(**off) == Sampling() == Sampling(logit_bias=None)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 40, "seed": 1}])
def test_what_is_off_costs_neither_memory_nor_a_look_at_the_settings(settings, monkeypatch, allocated_peak):
    n_vocab = 50_000
    logits, among = np.random.default_rng(0).normal(size=n_vocab).astype("f"), np.arange(n_vocab - 10)
    sampling = Sampling(**settings)
    number = np.uint64(1)
    sampling.choose(logits, number, among)
    monkeypatch.setattr(Sampling, "steps", None)  # which the first token has asked
    # Whether the logits are finite is a byte for each, those that can be drawn are copied, 4 bytes, and once by top-k.
    assert allocated_peak(lambda: sampling.choose(logits, number, among)) < 10.5 * n_vocab
    monkeypatch.setattr("npgpt2.sampling.PROCESSORS", None)
    monkeypatch.setattr("npgpt2.samplers.Written.tokens", None)
    sampling.choose(logits, number, among)


def test_what_was_written_takes_memory_for_the_text_alone(allocated_peak):
    prompt = list(range(100))
    assert allocated_peak(lambda: written(prompt, [1, 2], 10**9, [7])) < 50_000


def test_each_setting_has_its_range():
    others = {"logit_bias", "seed"}
    assert set(RANGES) | set(WHOLE) | others == {field.name for field in fields(Sampling)}


EXTREME = {
    "temperature": [0, 5e-324, 1.0, 1e300],
    "top_k": [0, 2],
    "top_p": [1e-300, 0.5, 1 - 2**-53, 1.0],
    "min_p": [0, 1],
    "typical_p": [1e-300, 0.5, 1 - 2**-53, 1.0],
    "logit_bias": [{}, dict.fromkeys(range(5), 100), dict.fromkeys(range(5), -100)],
    "repetition_penalty": [0.01, 1, 100],
    "no_repeat_ngram_size": [0, 1, 10**30],
    "min_tokens": [0, 10**30],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("logits", [[3e38, -3e38, 0, 1, -1], [-3e38] * 5, [3e38] * 5, [0] * 5, [1e-45, 0, 1e-38, 2, 1]])
def test_something_is_left_and_adds_up_to_1_at_the_ends_of_all_ranges(logits):
    before = written([0, 1, 2], [1, 2], 5, ends=[4])
    rng = np.random.default_rng(0)
    for _ in range(600):
        settings = {name: values[rng.integers(len(values))] for name, values in EXTREME.items()}
        tokens, drawn = Sampling(**settings, presence_penalty=2.0).candidates(np.float32(logits), written=before)
        assert tokens.size, settings
        assert drawn.sum() == pytest.approx(1), settings


def test_a_bias_for_a_row_that_no_token_has_brings_it_no_nearer():
    drawn = Sampling(1, logit_bias={1: 100}).candidates(np.zeros(3, "f"), np.array([0, 2]))
    assert (drawn[0].tolist(), drawn[1].tolist()) == ([0, 2], [0.5, 0.5])


def test_the_models_logits_stay_as_they_are():
    settings, logits, prompt, text, ends = random_case(0)
    settings = {name: values[0] for name, values in VALUES.items()}
    given = logits.copy()
    logits.flags.writeable = False
    Sampling(**settings).candidates(logits, written=written(prompt, text, 20, ends))
    np.testing.assert_array_equal(logits, given)


def test_a_processor_leaves_the_candidates_that_it_is_given_as_they_are():
    _, logits, prompt, text, ends = random_case(0)
    given = Candidates(np.arange(20), logits.astype(float), written(prompt, text, 20, ends))
    for name, process in PROCESSORS.items():
        changed = process(given, 30 if name == "min_tokens" else VALUES[name][0])
        assert not np.array_equal(changed.logits, given.logits)
        np.testing.assert_array_equal(given.logits, logits)


def test_among_the_tokens_that_can_be_drawn_processors_find_theirs():
    before, among = written([], [1, 4], 6), np.array([0, 1, 4, 5])
    tokens, drawn = Sampling(1, presence_penalty=2, logit_bias={5: 1}).candidates(np.zeros(6, "f"), among, before)
    assert tokens.tolist() == among.tolist()
    np.testing.assert_allclose(np.log(drawn / drawn[0]), [0, -2, -2, 1])


def test_where_no_token_is_left_the_settings_are_named():
    with pytest.raises(ValueError, match="no token is left to choose: no_repeat_ngram_size and min_tokens ban all"):
        Sampling(no_repeat_ngram_size=1).choose(np.float32([1, 2]), np.uint64(0), written=Written([0, 1], 2))


def test_a_bias_of_a_token_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="logit_bias has token 2, which is not in the vocabulary, from 0 to 1"):
        Sampling(logit_bias={2: 1.0}).candidates(np.float32([1, 2]))


def test_what_was_written_is_kept_up_as_tokens_come():
    tokens = np.random.default_rng(0).integers(50, size=1000).tolist()
    before = written(tokens[:10], tokens[10:], 60, ends=[59, 60, 10**9])
    assert (before.tokens.tolist(), before.generated, before.ends.tolist()) == (tokens, 990, [59])
    assert (before.counts, before.seen) == (Counter(tokens[10:]), set(tokens))


def test_settings_are_comparable_hashable_and_can_be_pickled():
    bias = {1: np.float32(2)}
    one, other = Sampling(min_p=0.1, logit_bias=bias), Sampling(min_p=np.float64(0.1), logit_bias={np.int64(1): 2})
    bias[5] = 1  # which the settings don't see
    assert one == other == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(other)
