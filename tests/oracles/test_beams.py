"""Beam search against Hugging Face's transformers: random small models, whose texts end rarely, often or never, with
all that decides which texts go on, which end, and when to stop.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from builders import random_model
from transformers.generation import logits_process

from npgpt2.convert.huggingface import to_checkpoint_name
from npgpt2.model import HParams
from npgpt2.vocabulary import SpecialTokens

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()

PENALTIES, STOPS = [-1.0, 0.0, 1.0, 2.0], [False, True, "never"]
ENDS = ["none", "one", "three", "often"]
CASES = 96  # of each number of beams: all combinations of these, twice
PROCESSORS = {
    "logit_bias": [{3: 1.5, 11: -2.0}, {7: 3.0}],
    "repetition_penalty": [0.8, 1.2, 2.0],
    "presence_penalty": [-0.5, 1.0],
    "frequency_penalty": [-0.3, 0.5],
    "no_repeat_ngram_size": [2, 3],
    "min_tokens": [2, 5],
}


class OpenAIs(logits_process.LogitsProcessor):
    """Presence and frequency, which transformers hasn't."""

    def __init__(self, presence, frequency, prompt):
        self.presence, self.frequency, self.prompt = presence, frequency, prompt

    def __call__(self, ids, scores):
        counts = torch.stack([torch.bincount(row, minlength=scores.shape[-1]) for row in ids[:, self.prompt :]])
        return scores - self.frequency * counts - self.presence * (counts > 0)


def in_transformers(ours):
    """The same model there."""
    n_vocab, n_ctx, n_embd, n_head, n_layer = ours.hparams
    sizes = {"vocab_size": n_vocab, "n_positions": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for name, parameter in theirs.transformer.named_parameters():
            parameter.copy_(torch.tensor(ours.weights[to_checkpoint_name(name)]))
    return theirs


@pytest.fixture(scope="module")
def pairs():
    """Models here and there: small vocabularies, whose end tokens come often, a larger one, and one that is so sure of
    some tokens that longer texts still win.
    """
    found = []
    for seed, (n_vocab, scale) in enumerate([(30, 0.25), (40, 0.25), (300, 0.25), (30, 0.7)]):
        ours = random_model(HParams(n_vocab, 32, 24, 2, 2), seed, scale)
        found.append((ours, in_transformers(ours)))
    return found


def their_search(theirs, prompt, beams, length, ends, search, settings):
    """The texts that transformers finds, as new tokens with their scores, from the best on."""
    named = {name: value for name, value in settings.items() if name in ("repetition_penalty", "no_repeat_ngram_size")}
    if bias := settings.get("logit_bias"):
        named["sequence_bias"] = {(token,): value for token, value in bias.items()}
    if least := settings.get("min_tokens"):
        named["min_new_tokens"] = least
    penalties = OpenAIs(settings.get("presence_penalty", 0), settings.get("frequency_penalty", 0), len(prompt))
    out = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # or token 0 would be taken for padding
        max_new_tokens=length,
        do_sample=False,
        num_beams=beams,
        num_return_sequences=beams,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        logits_processor=logits_process.LogitsProcessorList([penalties]),
        return_dict_in_generate=True,
        output_scores=True,
        **(search if beams > 1 else {}),
        **named,
    )
    texts = []
    for sequence in out.sequences[:, len(prompt) :].tolist():
        last = next((at for at, token in enumerate(sequence) if token in ends), len(sequence) - 1)
        texts.append(sequence[: last + 1])
    if beams > 1:
        return list(zip(texts, out.sequences_scores.tolist(), strict=True))
    # There it is greedy search, which has no score: the same sum, divided in the same way.
    steps = theirs.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)[0].double()
    return [(texts[0], float(steps.sum()) / len(texts[0]) ** search["length_penalty"])]


def case(number, beams, pairs):
    """A model here and there, and all that is asked of it, at random; it is told with which tokens texts end."""
    rng = np.random.default_rng((number, beams))
    ours, theirs = pairs[rng.integers(len(pairs))]
    search = {"length_penalty": PENALTIES[number % 4], "early_stopping": STOPS[number % 3]}
    settings = {name: values[rng.integers(len(values))] for name, values in PROCESSORS.items() if rng.random() < 0.1}
    prompt = rng.integers(0, 30, rng.integers(1, 12)).tolist()
    likely = np.argsort(-ours.logits(prompt)[-1])[[1, 4]].tolist()
    ends = {"none": (), "one": (7,), "three": (0, 5, 29), "often": tuple(likely)}[ENDS[number // 12 % 4]]
    ours.special = SpecialTokens(end=ends)
    return ours, theirs, prompt, int(rng.integers(1, 16)), ends, search, settings


@pytest.mark.parametrize("beams", range(1, 7))
def test_texts_and_scores_are_those_of_transformers(pairs, beams):
    """All texts that ended, in their order. Scores grow with a text's length where the penalty is below 0, and float32
    has seven digits, so that 1e-4 is of the score where that is above 1.
    """
    seen = Counter()
    for number in range(CASES):
        ours, theirs, prompt, length, ends, search, settings = case(number, beams, pairs)
        expected = their_search(theirs, prompt, beams, length, ends, search, settings)
        best = ours.beam_search(prompt, beams=beams, length=length, **search, **settings)
        found = [(beam.tokens, beam.score) for beam in (best, *best.others)]
        what = (number, ends, length, search, settings)
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected], what
        for (_, score), (_, right) in zip(found, expected, strict=True):
            assert abs(score - right) <= 1e-4 * max(1, abs(right)), what
        seen["early" if len(best.tokens) < length else "full"] += 1
        seen["processed" if settings else "plain"] += 1
    assert min(seen.values()) > CASES // 10
    assert len(seen) == 4


@pytest.mark.parametrize("beams", [1, 3, 6])
def test_with_each_processor_texts_and_scores_are_those_of_transformers(pairs, beams):
    for name, values in PROCESSORS.items():
        for number, value in enumerate(values * 4):
            ours, theirs, prompt, length, ends, search, _ = case(1000 + number, beams, pairs)
            (tokens, score), *_ = their_search(theirs, prompt, beams, length, ends, search, {name: value})
            best = ours.beam_search(prompt, beams=beams, length=length, **search, **{name: value})
            assert best.tokens == tokens, (name, value)
            assert abs(best.score - score) <= 1e-4 * max(1, abs(score)), (name, value)
