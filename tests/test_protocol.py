"""OpenAI's completions: which bodies are taken, which are refused and by which name, and what answers say."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npgpt2
from npgpt2.engine import Engine, mean_logprob
from npgpt2.sampling import SamplingSettings
from npgpt2.serving.choices import Origin, answer
from npgpt2.serving.logprobs import token_name
from npgpt2.serving.protocol import BadRequest, Completion, parse_completion

ORIGIN = Origin("tiny", "0123", 7)
PROMPT = "A language model"


def answered(model, body, **others):
    """The answer to a body, by an engine with room for all of it."""
    completion = parse_completion(body, model, **others)
    engine = Engine(model, slots=16)
    requests = [engine.submit(prompt, **asked) for prompt, asked in completion.submissions()]
    while engine.busy:
        engine.step()
    assert [request.error for request in requests] == [None] * len(requests)
    return answer(completion, requests, model.tokenizer, ORIGIN, "x")


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


def refused(model, body, param):
    with pytest.raises(BadRequest) as caught:
        parse_completion(body, model, names=["tiny"])
    assert caught.value.param == param
    assert param in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


# ---- Requests


def test_what_a_body_leaves_out_or_says_as_null_is_openais_default(model):
    fields = "prompt model max_tokens temperature top_p n best_of logprobs echo stop logit_bias seed user suffix stream"
    empty = parse_completion({}, model, seed=5)
    assert parse_completion(dict.fromkeys(fields.split()), model, seed=5) == empty
    assert (empty.max_tokens, empty.n, empty.best_of, empty.echo, empty.logprobs) == (16, 1, 1, False, None)
    assert empty.prompts == [[model.begin]]
    assert (empty.settings["temperature"], empty.settings["length"], empty.settings["seed"]) == (1.0, 16, 5)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PROMPT, [PROMPT]),
        ([PROMPT, "plays"], [PROMPT, "plays"]),
        ([32, 514, 352], [PROMPT]),
        ([[32, 514, 352], [5]], [PROMPT, [5]]),
        ([PROMPT, [32, 514]], [PROMPT, [32, 514]]),
        ("", [[519]]),
    ],
)
def test_prompts_are_texts_or_ids_or_lists_of_either(prompt, expected, model):
    ids = [model.tokenizer.encode(one) if isinstance(one, str) else one for one in expected]
    assert parse_completion({"prompt": prompt}, model).prompts == ids


def test_a_text_spells_the_special_token(model):
    assert parse_completion({"prompt": "A<|endoftext|>"}, model).prompts == [[32, 519]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", []), ("prompt", 5), ("prompt", [True]), ("prompt", [1.5]), ("prompt", [[]]), ("prompt", [[[1]]]),
        ("prompt", [1, "A"]), ("prompt", [1, [2]]), ("prompt", [[[[1]]]]),
        ("prompt", [520]), ("prompt", [-1]), ("prompt", [10**30]), ("prompt", {"a": 1}), ("prompt", [None]),
        ("prompt", "x " * 500), ("prompt", [1] * 193), ("max_tokens", -1), ("max_tokens", 1.0), ("max_tokens", True),
        ("max_tokens", "16"), ("max_tokens", 192), ("max_tokens", 10**40), ("temperature", -0.1),
        ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", "1"), ("temperature", True),
        ("temperature", 10**400), ("top_p", 0), ("top_p", 1.1), ("top_p", [1]), ("top_k", -5), ("top_k", 1.5),
        ("n", 0), ("n", 129), ("n", True), ("best_of", 0), ("best_of", 129), ("logprobs", -1), ("logprobs", 101),
        ("logprobs", True), ("echo", 1), ("echo", "true"), ("stop", ""), ("stop", 5), ("stop", [""]), ("stop", [5]),
        ("stop", ["a"] * 33), ("stop", "a" * 201), ("stop", {"a": 1}), ("seed", 2**63), ("seed", 1.0), ("seed", "1"),
        ("logit_bias", [1]), ("logit_bias", {"520": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"a": 1}),
        ("logit_bias", {"5": 101}), ("logit_bias", {"5": True}), ("logit_bias", {"5": float("nan")}),
        ("logit_bias", {"9" * 5000: 1}), ("logit_bias", {str(i): 0 for i in range(1025)}), ("model", "other"),
        ("model", ["tiny"]), ("suffix", "end"), ("stream", 1), ("stop_token_ids", [520]), ("ignore_eos", 0),
        ("return_token_ids", 1), ("min_p", 2), ("min_p", True), ("typical_p", 0), ("repetition_penalty", -1),
        ("presence_penalty", 3), ("frequency_penalty", "a"), ("no_repeat_ngram_size", -1), ("min_tokens", 1.5),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_the_name_of_its_field(field, value, model):
    refused(model, {"prompt": PROMPT, field: value}, field)


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_a_body_that_is_no_object_is_refused(body, model):
    refused(model, body, "body")


def test_best_of_is_at_least_n(model):
    assert refused(model, {"n": 3, "best_of": 2}, "best_of") == (
        "best_of is 2, where a whole number from 3 to 128 is expected"
    )


def test_what_does_not_fit_the_window_is_refused_with_both_numbers(model):
    exact = {"prompt": [5] * 180, "max_tokens": 12}
    assert parse_completion(exact, model).max_tokens == 12
    assert refused(model, exact | {"max_tokens": 13}, "max_tokens") == (
        "prompt has 180 tokens and max_tokens is 13: more than the model's n_ctx of 192"
    )
    assert parse_completion({"prompt": [5] * 192, "max_tokens": 0}, model).max_tokens == 0


def test_what_many_prompts_and_samples_come_to_is_bounded(model):
    body = {"prompt": [[5]] * 16, "best_of": 128, "max_tokens": 128}
    assert parse_completion(body, model).most_tokens == 2**18
    refused(model, body | {"prompt": [[5]] * 17}, "max_tokens")
    refused(model, body | {"logprobs": 1}, "max_tokens")
    assert parse_completion({"prompt": [[5]] * 2048, "max_tokens": 1, "n": 2}, model).sequences == 4096
    refused(model, {"prompt": [[5]] * 2048, "max_tokens": 1, "n": 3}, "best_of")
    refused(model, {"prompt": [[5]] * 2049, "max_tokens": 1}, "prompt")


def test_numbers_that_clients_send_are_taken(model):
    body = {"logprobs": 10, "stop": [str(i) for i in range(9)], "seed": -1, "top_p": 1, "n_predict": 9, "mirostat": 0}
    completion = parse_completion(body | {"user": "me", "model": "tiny", "ignore_eos": True}, model, names=["tiny"])
    assert completion.settings["seed"] == 2**64 - 1
    assert completion.settings["ignore_eot"] is True
    assert completion.settings["stop"] == [str(i) for i in range(9)]


def test_what_changes_and_narrows_the_choice_is_passed_on(model):
    body = {
        "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.5, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "no_repeat_ngram_size": 3, "min_tokens": 2,
        "logit_bias": {"5": 1}, "seed": 7,
    }  # fmt: skip
    asked = parse_completion(body, model).settings
    assert {name: asked[name] for name in body} == body | {"logit_bias": {5: 1.0}}
    assert {*SamplingSettings.__annotations__} - {*body} == {"sample"}


def test_ids_among_texts_take_no_memory_before_they_are_refused(model, allocated_peak):
    """As an array, each of the ids would take as much as the longest text."""
    prompt = ["x" * 1000, *[1] * 10_000]
    assert allocated_peak(lambda: refused(model, {"prompt": prompt}, "prompt")) < 200_000


def test_whether_to_stream_is_said_to_who_answers(model):
    assert parse_completion({"stream": True}, model).stream
    assert not parse_completion({}, model).stream


def test_a_model_whose_file_was_changed_is_no_fault_of_the_prompt(tiny, tmp_path):
    path = tmp_path / "changed.npz"
    path.write_bytes(tiny.read_bytes())
    model = npgpt2.load(path)
    assert parse_completion({"prompt": PROMPT}, model)
    os.utime(path, (5, 5))
    with pytest.raises(ValueError, match="was changed while it was open") as caught:
        parse_completion({"prompt": PROMPT}, model)
    assert not isinstance(caught.value, BadRequest)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "prompt max_tokens temperature top_p top_k n best_of logprobs echo stop logit_bias seed suffix stream min_p model"
)


@settings(max_examples=300, deadline=None)
@given(body=st.dictionaries(st.sampled_from(FIELDS.split()), VALUES, max_size=4))
def test_any_body_is_refused_or_taken(model, body):
    try:
        found = parse_completion(body, model)
    except BadRequest as problem:
        found = problem
    if isinstance(found, Completion):
        assert all(asked["length"] >= 1 for _, asked in found.submissions())
    else:
        assert found.param in FIELDS.split()


# ---- Answers


def test_the_text_is_that_of_the_library(model):
    body = {"prompt": PROMPT, "max_tokens": 9, "temperature": 1.5, "seed": 3}
    asked = {"length": 9, "temperature": 1.5, "seed": 3}
    assert texts(answered(model, body)) == [model.generate(PROMPT, **asked)]
    assert texts(answered(model, body | {"n": 3})) == list(model.samples(PROMPT, 3, **asked))
    assert texts(answered(model, body | {"echo": True})) == [PROMPT + model.generate(PROMPT, **asked)]


def test_an_answer_is_openais(model):
    body = answered(model, {"prompt": [PROMPT, PROMPT + " plays"], "n": 2, "max_tokens": 2, "temperature": 0})
    assert body == {
        "id": "cmpl-x",
        "object": "text_completion",
        "created": 7,
        "model": "tiny",
        "system_fingerprint": "fp_0123",
        "choices": [
            {"index": i, "text": text, "logprobs": None, "finish_reason": "length"}
            for i, text in enumerate([" plays one"] * 2 + [" one small"] * 2)
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15},
    }


def test_a_stop_string_ends_a_text(model):
    body = {"prompt": PROMPT, "temperature": 0, "stop": " small"}
    (choice,) = answered(model, body)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" plays one", "stop")


def test_ids_are_given_back_where_that_is_asked_for(model):
    (choice,) = answered(model, {"prompt": PROMPT, "max_tokens": 2, "return_token_ids": True, "seed": 1})["choices"]
    assert model.tokenizer.decode(choice["token_ids"]) == choice["text"]
    assert choice["prompt_token_ids"] == [32, 514, 352]


def test_logprobs_are_log_softmax_of_the_models_logits_whatever_the_settings(model):
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 2, "top_k": 9, "seed": 2, "logprobs": 3, "echo": True}
    (choice,) = answered(model, body | {"return_token_ids": True})["choices"]
    ids, found = choice["prompt_token_ids"] + choice["token_ids"], choice["logprobs"]
    logits = model.logits(ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    names = [token_name(model.tokenizer, token) for token in range(520)]
    assert len(set(names)) == 520
    assert found["tokens"] == [names[token] for token in ids]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(found["text_offset"]) == 9
    for i in range(1, 9):
        assert found["token_logprobs"][i] == pytest.approx(expected[i - 1, ids[i]], abs=1e-4)
        likeliest = [names[token] for token in np.argsort(-expected[i - 1])[:3]]
        assert list(found["top_logprobs"][i])[:3] == likeliest
        assert set(found["top_logprobs"][i]) == {*likeliest, names[ids[i]]}
    alone = answered(model, body | {"echo": False})["choices"][0]["logprobs"]
    assert alone["tokens"] == found["tokens"][3:]
    assert alone["token_logprobs"] == pytest.approx(found["token_logprobs"][3:], abs=1e-4)
    assert alone["text_offset"] == found["text_offset"][3:]
    assert alone["text_offset"][0] == len(PROMPT)


def test_logprobs_0_is_the_chosen_token_alone(model):
    (choice,) = answered(model, {"prompt": PROMPT, "max_tokens": 3, "logprobs": 0})["choices"]
    tokens, tops = choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"]
    assert [list(top) for top in tops] == [[token] for token in tokens]


def test_max_tokens_0_scores_the_prompt_and_writes_nothing(model):
    body = answered(model, {"prompt": PROMPT, "max_tokens": 0, "logprobs": 1, "echo": True})
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert choice["logprobs"]["tokens"] == ["A", " language", " model"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 10]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert texts(answered(model, {"prompt": PROMPT, "max_tokens": 0})) == [""]


def test_half_characters_are_named_by_their_bytes_and_offsets_are_those_of_the_text(model):
    prompt = "é€ is"
    (choice,) = answered(model, {"prompt": prompt, "max_tokens": 0, "logprobs": 0, "echo": True})["choices"]
    assert choice["text"] == prompt
    names, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert names == ["é", r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac", " is"]
    assert offsets == [0, 1, 1, 1, 2]


def test_a_prompt_that_ends_within_a_character_is_a_text_by_itself(model):
    """Whatever the model goes on with."""
    half, rest = model.tokenizer.encode("€")[:2], model.tokenizer.encode("€")[2]
    body = {"prompt": half, "max_tokens": 1, "logit_bias": {str(rest): 100}, "logprobs": 0, "echo": True}
    (choice,) = answered(model, body)["choices"]
    assert choice["text"] == "\ufffd\ufffd"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]
    alone = answered(model, body | {"echo": False})["choices"][0]["logprobs"]
    assert alone["text_offset"] == [1]


def test_the_token_that_ends_the_text_is_counted_and_scored(model):
    ending = npgpt2.GPT2({**model.weights, "ln_f/b": 50 * model.weights["wte"][519]}, model.hparams, model.tokenizer)
    body = answered(ending, {"prompt": PROMPT, "temperature": 0, "logprobs": 1})
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["tokens"] == ["<|endoftext|>"]
    assert choice["logprobs"]["text_offset"] == [len(PROMPT)]
    assert body["usage"]["completion_tokens"] == 1


def test_offsets_behind_a_stop_string_stay_within_the_text(model):
    body = {"prompt": PROMPT, "temperature": 0, "stop": "e", "logprobs": 0, "max_tokens": 2}
    (choice,) = answered(model, body)["choices"]
    assert choice["text"] == " plays on"
    assert choice["logprobs"]["text_offset"] == [16, 22]


def test_best_of_keeps_the_likeliest_by_mean_logprob(model):
    body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 3, "seed": 4, "logprobs": 0}
    every = answered(model, body | {"n": 8})["choices"]
    best = answered(model, body | {"n": 3, "best_of": 8})
    means = [np.mean(choice["logprobs"]["token_logprobs"]) for choice in every]
    order = np.argsort(-np.array(means), kind="stable")[:3]
    assert len({round(mean, 3) for mean in means}) > 3  # since rounding alone gives one text several
    assert texts(best) == [every[i]["text"] for i in order]
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2]
    assert best["usage"]["completion_tokens"] == 40
    plain = {name: value for name, value in body.items() if name != "logprobs"} | {"n": 3, "best_of": 8}
    unscored = answered(model, plain)["choices"]
    assert [choice["text"] for choice in unscored] == texts(best)
    assert {choice["logprobs"] for choice in unscored} == {None}


def test_what_is_impossible_has_a_logprob_that_json_knows(model):
    far = npgpt2.GPT2({**model.weights, "ln_f/b": 3e4 * model.weights["wte"][5]}, model.hparams, model.tokenizer)
    body = answered(far, {"prompt": PROMPT, "max_tokens": 1, "logprobs": 100, "echo": True})
    found = json.loads(json.dumps(body, allow_nan=False))["choices"][0]["logprobs"]
    assert min(found["token_logprobs"][1:]) == -9999.0


def test_of_nothing_the_mean_is_0(model):
    completion = parse_completion({"prompt": PROMPT, "max_tokens": 0, "best_of": 3}, model)
    engine = Engine(model)
    requests = [engine.submit(prompt, **asked) for prompt, asked in completion.submissions()]
    assert [mean_logprob(request) for request in requests] == [0, 0, 0]
