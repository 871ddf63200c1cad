"""Temperature, top-k, top-p and the draw, against their definitions."""

from dataclasses import fields

import numpy as np
import pytest
from distributions import probabilities
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from npgpt2.engine import Limits, Settings
from npgpt2.sampling import Sampling, SamplingSettings

# NumPy keeps the streams of its bit generators: PCG64 seeded by SeedSequence.
RECORDED = [0.0015791460415535141, 0.9429375528828794]
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
    assert Sampling(0).choose(np.float32([1, 3, 3, 2]), Sampling(seed=0, sample=0).generator()) == 1


def test_greedy_sampling_draws_no_random_number():
    rng = Sampling(seed=0, sample=0).generator()
    Sampling(0).choose(np.float32([1, 2]), rng)
    assert rng.random() == Sampling(seed=0, sample=0).generator().random()


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


def test_draws_have_the_probabilities_computed():
    sampler, logits, rng = (
        Sampling(0.7, top_k=4),
        np.float32([1, 0, 2, -3, 0.5, 1.5]),
        Sampling(seed=3, sample=0).generator(),
    )
    drawn = np.bincount([sampler.choose(logits, rng) for _ in range(20000)], minlength=6) / 20000
    np.testing.assert_allclose(drawn, probabilities(sampler, logits), atol=0.012)
    assert drawn[3] == drawn[1] == 0


class Fixed:
    """A generator that gives one number."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


@pytest.mark.parametrize("number", [0.0, 0.5, np.nextafter(1, 0)])
def test_tokens_that_were_cut_off_are_never_drawn(number):
    logits = np.float32([-50, 1, 1, -50])
    assert Sampling(1, top_k=2).choose(logits, Fixed(number)) in (1, 2)


def first_number(seed, sample):
    return Sampling(seed=seed, sample=sample).generator().random()


def test_samples_of_a_seed_are_independent_of_each_other_and_repeatable():
    numbers = {(seed, sample): first_number(seed, sample) for seed in range(5) for sample in range(5)}
    assert len(set(numbers.values())) == 25
    assert numbers[4, 4] == first_number(4, 4)


def test_without_a_seed_numbers_differ():
    assert len({Sampling().generator().random() for _ in range(5)}) == 5


def test_random_numbers_are_the_same_on_every_machine_and_numpy():
    assert [first_number(42, 7), first_number(0, 0)] == pytest.approx(RECORDED, abs=0)


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
        Sampling().choose(np.float32([0, broken]), Sampling(seed=0, sample=0).generator())
