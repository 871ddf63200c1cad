"""The loop: whatever else is running, a request gives what it gives alone; and nothing of it stays behind."""

import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from builders import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import npgpt2
from npgpt2 import GPT2, Engine, HParams
from npgpt2.engine import Slots
from npgpt2.engine.sequence import Sequence
from npgpt2.engine.text import TextStream
from npgpt2.samplers import Written

HPARAMS = HParams(n_vocab=31, n_ctx=24, n_embd=16, n_head=2, n_layer=2)


@pytest.fixture(scope="module")
def small():
    """A model of random weights whose windows are soon full; it has no vocabulary."""
    return random_model(HPARAMS)


def finish(engine):
    """Run an engine until nothing is left; returns the events of each step."""
    steps = []
    while engine.busy:
        steps.append(engine.step())
    return steps


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(HPARAMS.n_vocab, size=n).tolist()


def alone(model, prompt, **settings):
    """What a request gives with an engine of its own, without guesses."""
    engine = Engine(model, slots=1, text=False)
    request = engine.submit(prompt, **settings | {"guess": False})
    finish(engine)
    return request


# ---- Schedules

SETTINGS = st.fixed_dictionaries(
    {"length": st.integers(1, 40), "guess": st.booleans()},
    optional={
        "temperature": st.sampled_from([0.3, 1.0, 2.5]),
        "top_k": st.integers(0, 6),
        "top_p": st.sampled_from([0.5, 0.95]),
        "min_p": st.just(0.02),
        "typical_p": st.just(0.9),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "frequency_penalty": st.just(0.2),
        "no_repeat_ngram_size": st.sampled_from([2, 4]),
        "seed": st.just(7),
        "sample": st.integers(0, 3),
        "logprobs": st.integers(0, 3),
        "prompt_logprobs": st.integers(0, 2),
    },
)
# Few different tokens, so that prompts share beginnings and texts repeat themselves.
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=50)
ASKED = st.tuples(PROMPTS, SETTINGS, st.integers(0, 12), st.none() | st.integers(0, 30))


@given(asked=st.lists(ASKED, max_size=7), slots=st.integers(1, 4), chunk=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_whatever_else_is_running_a_request_gives_what_it_gives_alone(small, asked, slots, chunk):
    """Requests come before some steps, and some are cancelled before others."""
    engine = Engine(small, slots=slots, chunk=chunk, text=False)
    requests, events = [], []
    to_submit = [(at, cancel, prompt, given) for prompt, given, at, cancel in asked]
    step = 0
    while to_submit or engine.busy:
        for entry in [entry for entry in to_submit if entry[0] <= step]:
            to_submit.remove(entry)
            _, cancel, prompt, given = entry
            if given.get("temperature") and "seed" not in given:
                given = given | {"seed": 1}
            if "prompt_logprobs" in given:
                prompt = prompt[: HPARAMS.n_ctx]
            requests.append((engine.submit(prompt, **given), cancel, given))
        for request, cancel, _ in requests:
            if cancel == step:
                engine.cancel(request)
        new = engine.step()
        assert engine.running <= slots
        events += new
        step += 1
    for request, cancel, given in requests:
        expected = alone(small, request.prompt, **given)
        own = [event for event in events if event.request is request]
        assert [event.token for event in own if event.token is not None] == request.tokens
        assert [event.finish_reason for event in own if event.finish_reason] == [request.finish_reason]
        if request.finish_reason == "cancelled":
            assert cancel is not None
            assert request.tokens == expected.tokens[: len(request.tokens)]
            continue
        assert request.finish_reason == "length"
        assert request.tokens == expected.tokens
        for ours, theirs in (
            (request.logprobs, expected.logprobs),
            (request.prompt_logprobs, expected.prompt_logprobs),
        ):
            assert [one.token for one in ours] == [one.token for one in theirs]
            for one, other in zip(ours, theirs, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-4)
    assert (engine.running, engine.waiting, engine.busy) == (0, 0, False)
    # Every slot is free again: as many can run at once as in the beginning.
    for i in range(slots):
        engine.submit(ids(3, seed=100 + i), length=2)
    engine.step()
    assert engine.running == slots


def test_greedy_tokens_follow_from_the_logits_of_the_formulas(small):
    """By hand, from scratch for each token, with the window that the documentation describes."""
    tokens, start = ids(5), 0
    for _ in range(60):
        if len(tokens) - start > HPARAMS.n_ctx:
            start = len(tokens) - HPARAMS.n_ctx // 2
        logits = npgpt2.model.forward(small.weights, HPARAMS, np.array(tokens[start:]))
        tokens.append(int(logits[-1].argmax()))
    for chunk in (1, 4, 64):
        engine = Engine(small, slots=2, chunk=chunk, text=False)
        first, second = engine.submit(tokens[:5], length=60), engine.submit(tokens[:30], length=35)
        finish(engine)
        assert first.tokens == tokens[5:]
        assert second.tokens == tokens[30:] or chunk  # its window begins elsewhere
        assert second.tokens == alone(small, tokens[:30], length=35).tokens


# ---- Steps


def test_a_prompt_is_read_in_chunks_while_others_write(small, passes):
    engine = Engine(small, slots=2, chunk=4, text=False)
    writing = engine.submit(ids(3), length=15)
    engine.step()
    engine.submit(ids(14, seed=1), length=3)
    written = [len(writing.tokens)]
    for _ in range(6):
        engine.step()
        written.append(len(writing.tokens))
    assert passes[:5] == [[3], [1, 4], [1, 4], [1, 4], [1, 2]]
    assert written == list(range(1, 8)), "those that write never wait"


def test_a_prompt_alone_is_read_at_once(small, passes):
    engine = Engine(small, slots=2, chunk=4, text=False)
    engine.submit(ids(20), length=2)
    finish(engine)
    assert passes == [[20], [1]]


def test_short_prompts_are_read_together(small, passes):
    engine = Engine(small, slots=3, text=False)
    for i in range(3):
        engine.submit([i, *ids(4, seed=i)], length=1)
    finish(engine)
    assert passes == [[5, 5, 5]]


def test_a_slot_that_is_left_serves_who_waits(small):
    engine = Engine(small, slots=1, text=False)
    requests = [engine.submit([i, 2], length=2) for i in range(3)]
    assert (engine.running, engine.waiting) == (0, 3)
    engine.step()
    assert (engine.running, engine.waiting) == (1, 2)
    finish(engine)
    assert [request.finish_reason for request in requests] == ["length"] * 3


# ---- What slots remember


@pytest.mark.parametrize("slots", [1, 2])
def test_what_begins_as_a_request_did_goes_on_from_there(small, passes, slots):
    engine = Engine(small, slots=slots, text=False)
    first = engine.submit(ids(10), length=4)
    finish(engine)
    passes.clear()
    again = engine.submit(ids(10) + first.tokens[:3] + [30, 29], length=3)
    finish(engine)
    assert passes[0] == [2]
    assert again.tokens == alone(small, again.prompt, length=3).tokens


def test_one_prompt_for_several_is_read_once(small, passes):
    engine = Engine(small, slots=3, text=False)
    requests = [engine.submit(ids(12), length=3, temperature=1.0, seed=5, sample=i) for i in range(3)]
    finish(engine)
    assert passes == [[12], [1, 1, 1], [1, 1, 1], [1, 1]]
    assert [request.tokens for request in requests] == [
        alone(small, ids(12), length=3, temperature=1.0, seed=5, sample=i).tokens for i in range(3)
    ]


def test_a_long_beginning_is_not_lost_to_a_request_that_shares_little_of_it(small, passes):
    engine = Engine(small, slots=2, text=False)
    engine.submit(ids(20), length=1)
    finish(engine)
    engine.submit([*ids(20)[:2], 30, 30], length=1)
    finish(engine)
    passes.clear()
    engine.submit([*ids(20), 1], length=1)
    finish(engine)
    assert passes == [[1]]


# ---- Ends


def test_a_request_ends_by_length_stop_or_the_end_of_the_text(model, fixtures):
    passage = (fixtures / "passage.txt").read_text("utf-8").rstrip("\n")
    engine = Engine(model, slots=4)
    length = engine.submit("A language model", length=4)
    stop = engine.submit("A language model", length=50, stop="small game")
    end = engine.submit(passage[:-20], length=50)
    onwards = engine.submit(passage[:-20], length=50, ignore_eot=True)
    finish(engine)
    assert (length.text, length.finish_reason, len(length.tokens)) == (" plays one small game", "length", 4)
    assert (stop.text, stop.finish_reason) == (" plays one ", "stop")
    assert (end.text, end.finish_reason) == (passage[-20:], "end")
    assert end.tokens[-1] == model.tokenizer.end_of_text
    assert onwards.text.startswith(passage[-20:] + "<|endoftext|>" + passage[:30])
    assert [request.error for request in (length, stop, end, onwards)] == [None] * 4


def test_pieces_of_events_join_to_the_text(model):
    engine = Engine(model, slots=2)
    requests = [engine.submit(prompt, length=30, temperature=2.0, seed=2) for prompt in ("So read", "It has")]
    events = [event for step in finish(engine) for event in step]
    for request in requests:
        own = [event for event in events if event.request is request]
        assert "".join(event.text for event in own) == request.text == model.tokenizer.decode(request.tokens)
        assert [event.finish_reason for event in own] == [None] * 29 + ["length"]


def test_what_is_cancelled_ends_with_the_next_step_and_leaves_its_slot(small):
    engine = Engine(small, slots=1, chunk=2, text=False)
    writing, waiting = engine.submit(ids(3), length=100), engine.submit(ids(4, seed=1), length=2)
    engine.step()
    engine.cancel(writing)
    engine.cancel(writing)
    (event, *_) = engine.step()
    assert (event.request, event.token, event.finish_reason) == (writing, None, "cancelled")
    assert writing.finish_reason == "cancelled"
    finish(engine)
    assert waiting.finish_reason == "length"
    engine.cancel(waiting)
    assert engine.step() == []
    assert waiting.finish_reason == "length", "what has ended stays as it is"


def test_what_waits_or_is_being_read_can_be_cancelled(small):
    engine = Engine(small, slots=2, chunk=2, text=False)
    writer = engine.submit(ids(2), length=12)
    engine.step()
    reading, waiting = engine.submit(ids(20, seed=1), length=2), engine.submit(ids(3, seed=2), length=2)
    engine.step()
    engine.cancel(reading)
    engine.cancel(waiting)
    assert {event.request for event in engine.step() if event.finish_reason} == {reading, waiting}
    finish(engine)
    assert (reading.tokens, waiting.tokens) == ([], [])
    assert writer.tokens == alone(small, ids(2), length=12).tokens


def test_a_request_whose_logits_are_broken_ends_alone(small):
    """Token 30's embedding is too large, so that whoever reads it gets no numbers; the others don't notice."""
    weights = dict(small.weights)
    weights["wte"] = weights["wte"].copy()
    weights["wte"][30] = 3e38
    weights["wpe"] = weights["wpe"] + 1e38
    broken = GPT2(weights, HPARAMS)
    good = GPT2({**small.weights}, HPARAMS)
    engine = Engine(good, slots=2, text=False)
    first = engine.submit(ids(6), length=10)
    engine.step()
    engine.model = broken  # from here on, all logits are broken
    second = engine.submit(ids(5, seed=1), length=3)
    events = [event for step in finish(engine) for event in step]
    assert {event.request: event.finish_reason for event in events} == {first: "error", second: "error"}
    assert "its weights are too large or broken" in str(first.error)
    engine.model = good
    third = engine.submit(ids(6), length=10)
    finish(engine)
    assert third.tokens == alone(good, ids(6), length=10).tokens, "nothing of theirs is left in the slots"


def test_an_error_in_one_request_leaves_the_others_alone(model, monkeypatch):
    """Whatever goes wrong with a text, its slot is free again, and who writes beside it goes on."""
    engine = Engine(model, slots=2)
    bad, good = engine.submit("So read", length=9), engine.submit("A language model", length=4)
    push = TextStream.push

    def fail(self, token):
        if len(bad.tokens) == 3 and not failed:
            failed.append(token)
            raise RuntimeError("a filter that fails")
        return push(self, token)

    failed = []
    monkeypatch.setattr(TextStream, "push", fail)
    finish(engine)
    assert (bad.finish_reason, str(bad.error)) == ("error", "a filter that fails")
    assert (good.text, good.finish_reason) == (" plays one small game", "length")
    assert (engine.running, engine.waiting) == (0, 0)


def test_a_step_that_fails_can_be_tried_again_and_loses_no_event(small, monkeypatch):
    engine = Engine(small, slots=2, text=False)
    first, second = engine.submit(ids(4), length=6), engine.submit(ids(5, seed=1), length=6)
    engine.step()
    engine.cancel(first)
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "read", lambda *args: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            engine.step()
    assert [(event.request, event.finish_reason) for event in engine.step()] == [(first, "cancelled"), (second, None)]
    finish(engine)
    assert second.tokens == alone(small, second.prompt, length=6).tokens


def test_many_that_wait_do_not_make_a_step_longer(small, monkeypatch):
    engine, looked = Engine(small, slots=2, chunk=1, text=False), []
    shared_with = Sequence.shared_with
    monkeypatch.setattr(Sequence, "shared_with", lambda *args: (looked.append(args), shared_with(*args))[1])
    for i in range(200):
        engine.submit([*ids(20), i % 31], length=1)
    engine.step()
    engine.step()
    assert len(looked) < 40


# ---- Log-probabilities


def test_log_probabilities_are_those_of_the_model_before_the_settings(small):
    engine = Engine(small, slots=2, chunk=3, text=False)
    prompt = ids(10)
    settings = {"temperature": 2.0, "top_k": 3, "seed": 1, "repetition_penalty": 1.5, "logit_bias": {3: 5.0}}
    request = engine.submit(prompt, length=5, **settings, logprobs=4, prompt_logprobs=2)
    engine.submit(ids(3, seed=9), length=8)
    finish(engine)
    scores = small.logits(prompt + request.tokens).astype(np.float64)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    assert [one.token for one in request.prompt_logprobs] == prompt
    assert [one.token for one in request.logprobs] == request.tokens
    assert request.prompt_logprobs[0] == (prompt[0], None, [])
    for at, one in enumerate([*request.prompt_logprobs[1:], *request.logprobs]):
        assert one.logprob == pytest.approx(scores[at, one.token], abs=1e-4)
        likeliest = np.sort(scores[at])[::-1][: len(one.top)]
        assert [p for _, p in one.top] == pytest.approx(likeliest, abs=1e-4)
    assert {len(one.top) for one in request.prompt_logprobs[1:]} == {2}
    assert {len(one.top) for one in request.logprobs} == {4}


def test_log_probabilities_of_a_prompt_that_the_window_cannot_hold_are_refused(small):
    with pytest.raises(ValueError, match="prompt_logprobs of 25 tokens, more than the model's n_ctx of 24"):
        Engine(small, text=False).submit(ids(25), prompt_logprobs=0)


# ---- Settings that look at what was written


def test_penalties_follow_from_the_whole_text_and_the_logits_of_the_formulas(small):
    """By hand, from the prompt on and past the window, greedily: what left the window still counts."""
    prompt = ids(9)
    tokens, start = [*prompt], 0
    for _ in range(70):
        if len(tokens) - start > HPARAMS.n_ctx:
            start = len(tokens) - HPARAMS.n_ctx // 2
        logits = npgpt2.model.forward(small.weights, HPARAMS, np.array(tokens[start:]))[-1].astype(np.float64)
        logits[5] += 1.5
        for token in set(tokens):
            logits[token] *= 1.3 if logits[token] < 0 else 1 / 1.3
        for token in tokens[9:]:
            logits[token] -= 0.05
        for at in range(len(tokens) - 2):
            if tokens[at : at + 2] == tokens[-2:]:
                logits[tokens[at + 2]] = -np.inf
        tokens.append(int(logits.argmax()))
    settings = {"repetition_penalty": 1.3, "frequency_penalty": 0.05, "no_repeat_ngram_size": 3, "logit_bias": {5: 1.5}}
    engine = Engine(small, slots=2, text=False)
    first, plain = engine.submit(prompt, length=70, **settings), engine.submit(prompt, length=70)
    finish(engine)
    again = engine.submit(prompt, length=70, **settings)  # in a slot that remembers the prompt
    finish(engine)
    assert first.tokens == again.tokens == tokens[9:]
    assert plain.tokens == alone(small, prompt, length=70).tokens != first.tokens


def test_a_request_without_a_token_left_ends_by_that_error_and_the_others_go_on(small):
    engine = Engine(small, slots=2, text=False)
    out, other = engine.submit([1], length=40, no_repeat_ngram_size=1), engine.submit([1], length=40)
    finish(engine)
    assert sorted([1, *out.tokens]) == list(range(HPARAMS.n_vocab))
    assert (out.finish_reason, other.finish_reason) == ("error", "length")
    assert "no token is left to choose" in str(out.error)


def test_what_was_written_takes_no_memory_while_a_request_waits(small, monkeypatch):
    made = []
    monkeypatch.setattr("npgpt2.engine.sequence.Written", lambda *given: made.append(given) or Written(*given))
    engine = Engine(small, slots=1, text=False)
    for chosen in ({"min_tokens": 1}, {"presence_penalty": 1.0}, {"temperature": 1.0, "typical_p": 0.5}):
        engine.submit([1, 2], length=2, **chosen)
    assert made == []
    engine.step()
    assert len(made) == 1
    finish(engine)
    assert len(made) == 2  # filters need none


@pytest.mark.parametrize("ban", [{"min_tokens": 12}, {"logit_bias": {519: -100}}])
def test_the_token_that_ends_a_text_can_be_banned(model, ban):
    prompt = " reach the last."
    assert model.generate(prompt, length=12) == ""
    request = model.stream(prompt, length=12, ignore_eot=True).request
    banned = model.stream(prompt, length=12, ignore_eot=True, **ban)
    onwards = model.stream(prompt, length=12, **ban)
    text = "".join(onwards)
    assert 519 not in onwards.request.tokens
    assert (len(onwards.request.tokens), onwards.request.finish_reason) == (12, "length")
    assert "".join(banned) == text  # which going on past the end doesn't change
    assert request.sampling.min_tokens == 0
    assert model.generate(prompt, length=12, ignore_eot=True).startswith("<|endoftext|>")
    new = model.generate_tokens(model.tokenizer.encode(prompt), length=12, **ban)
    assert new.tolist() == onwards.request.tokens


def test_after_min_tokens_the_text_can_end(model):
    prompt = "A language model" + model.generate("A language model", length=500)
    ended = model.stream(prompt, length=20)
    assert "".join(ended) == ""
    later = model.stream(prompt, length=40, logit_bias={519: 50}, min_tokens=5)
    list(later)
    assert (len(later.request.tokens), later.request.finish_reason) == (6, "end")


def test_all_of_several_tokens_that_end_a_text_are_banned(small):
    several = GPT2(small.weights, HPARAMS)
    ends = alone(small, [1], length=30).tokens[-2:]
    several.special = replace(several.special, end=(*ends, 10**6))
    banned = alone(several, [1], length=30, min_tokens=12)
    logits = alone(small, [1], length=30, logit_bias=dict.fromkeys(ends, -100)).tokens
    assert banned.tokens[:12] == logits[:12]
    assert not {*ends} & {*banned.tokens[:12]}


def test_a_stop_string_ends_a_text_before_min_tokens(model):
    stopped = model.stream("A language model", length=20, stop=" small", min_tokens=10)
    assert "".join(stopped) == " plays one"
    assert (len(stopped.request.tokens), stopped.request.finish_reason) == (3, "stop")


def test_penalties_see_all_of_a_prompt_longer_than_the_window(small):
    """A token that stands nowhere but where the window doesn't reach is banned."""
    first = alone(small, [3] * 30, length=1).tokens[0]
    again = alone(small, [first] + [3] * 60, length=1)
    assert again.tokens == alone(small, [3] * 61, length=1).tokens == [first]
    banned = alone(small, [first] + [3] * 60, length=1, no_repeat_ngram_size=1)
    assert banned.finish_reason == "length"
    assert banned.tokens[0] not in (first, 3)


def test_a_model_without_tokens_that_end_a_text_has_nothing_to_ban(small):
    assert alone(small, [1], length=5, min_tokens=5).tokens == alone(small, [1], length=5).tokens


# ---- What is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"length": 0}, ValueError, "length is 0"),
        ({"temperature": -1}, ValueError, "temperature is -1"),
        ({"logprobs": -1}, ValueError, "logprobs is -1"),
        ({"sample": -1}, ValueError, "sample is -1"),
        ({"min_p": 1.5}, ValueError, "min_p is 1.5"),
        ({"logit_bias": {1: 1.0, 520: 1.0}}, ValueError, "logit_bias has token 520, which is not in the vocabulary"),
        ({"logit_bias": {"1": 1.0}}, TypeError, "logit_bias has '1', where a token id, a whole number, is expected"),
        ({"stop": ""}, ValueError, "stop string is empty"),
        ({"stop": [1]}, TypeError, r"stop is \(1,\), where a string or several are expected"),
        ({"stop": None}, TypeError, "stop is None, where a string or several are expected"),
        ({"length": 2.5}, TypeError, "length is 2.5, where a whole number of at least 1 is expected"),
        ({"length": None}, TypeError, "length is None"),
        ({"logprobs": False}, TypeError, "logprobs is False"),
        ({"top_k": 1.5}, TypeError, "top_k is 1.5"),
        ({"temperature": "1"}, TypeError, "temperature is '1', where a number is expected"),
        ({"seed": 0.5}, TypeError, "seed is 0.5"),
        ({"lenght": 3}, TypeError, "'lenght' is no setting; there are temperature"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_submitted(model, settings, error, message):
    engine = Engine(model)
    with pytest.raises(error, match=message):
        engine.submit("A", **settings)
    assert not engine.busy


def test_settings_can_be_numpys_numbers_and_stops_any_iterable(model):
    numbers = {"length": np.int64(6), "temperature": np.float32(0), "top_k": np.int32(5), "seed": np.uint8(1)}
    engine = Engine(model)
    request = engine.submit("A language model", **numbers, stop=(text for text in ["game", "small"]))
    finish(engine)
    assert (request.text, request.finish_reason) == (" plays one ", "stop")


def test_what_is_no_request_cannot_be_cancelled(small):
    with pytest.raises(TypeError, match="is no request; `submit` returns one"):
        Engine(small, text=False).cancel([])


@pytest.mark.parametrize("prompt", [[[1, 2], [3, 4]], []])
def test_a_prompt_is_one_row_of_tokens(small, prompt):
    with pytest.raises(ValueError, match="shape"):
        Engine(small, text=False).submit(prompt)


@pytest.mark.parametrize("name", ["slots", "chunk"])
def test_engines_of_nothing_are_refused(small, name):
    with pytest.raises(ValueError, match=f"{name} is 0, where a whole number of at least 1 is expected"):
        Engine(small, text=False, **{name: 0})


def test_text_needs_a_vocabulary(small):
    with pytest.raises(ValueError, match="has no vocabulary"):
        Engine(small)
    with pytest.raises(ValueError, match="need an engine whose requests have text"):
        Engine(small, text=False).submit([1], stop="x")


# ---- Threads, and engines side by side


def test_others_submit_and_cancel_while_one_thread_steps(small):
    engine, stopping = Engine(small, slots=3, chunk=4, text=False), threading.Event()
    requests = []

    def ask(worker):
        for i in range(20):
            request = engine.submit(ids(2 + i % 7, seed=worker), length=1 + i % 5)
            requests.append(request)
            if i % 4 == 3:
                engine.cancel(request)

    def run():
        while engine.busy or not stopping.is_set():
            engine.step()

    stepper, askers = threading.Thread(target=run), [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in (stepper, *askers):
        thread.start()
    for thread in askers:
        thread.join(60)
    stopping.set()
    stepper.join(60)
    assert not stepper.is_alive()
    assert len(requests) == 80
    for request in requests:
        expected = alone(small, request.prompt, length=request.limits.length).tokens
        assert request.finish_reason in ("length", "cancelled")
        assert request.tokens == expected[: len(request.tokens)]
        assert request.finish_reason == "cancelled" or len(request.tokens) == request.limits.length


def test_engines_on_one_model_run_side_by_side(small):
    engines = [Engine(small, slots=2, text=False) for _ in range(3)]
    requests = [engine.submit(ids(4 + i), length=12) for i, engine in enumerate(engines)]
    while any(engine.busy for engine in engines):
        for engine in engines:
            engine.step()
    for request in requests:
        assert request.tokens == alone(small, request.prompt, length=12).tokens


def test_memory_is_that_of_the_slots_however_much_is_generated(small):
    engine = Engine(small, slots=2, text=False)
    engine.submit(ids(3), length=200)
    finish(engine)
    tracemalloc.start()
    try:
        for i in range(20):
            engine.submit(ids(3, seed=i), length=50)
        finish(engine)
        assert tracemalloc.get_traced_memory()[0] < 30_000
    finally:
        tracemalloc.stop()
