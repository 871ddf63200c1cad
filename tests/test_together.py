"""What the server answers to its own page beside what it answers to all: several requests in one stream, and what can
come next, in numbers. How the page draws those is tested in tests/oracles/test_playground.py.
"""

import numpy as np
import pytest
from asking import ask, complete, joined

from npgpt2.engine import end_tokens
from npgpt2.serving import app
from npgpt2.study.distribution import EXACT, SHOWN, next_place

PROMPT = "A language model"
BODY = {"prompt": PROMPT, "max_tokens": 9, "temperature": 1.2, "stream": True, "logprobs": 2, "return_token_ids": True}
OTHERS = [{}, {"temperature": 0}, {"prompt": "é€", "seed": 4}, {"max_tokens": 3, "top_k": 5}, {"stop": "e"}] * 2


@pytest.fixture(scope="module")
def served(model):
    made = app(model, "tiny", slots=3)
    yield made
    made.close()


# ---- Several requests in one stream


def test_each_text_is_what_its_request_gives_by_itself(served):
    bodies = [BODY | {"seed": i} | more for i, more in enumerate(OTHERS)]
    answer = ask(served, "POST", "/together", {"requests": bodies})
    assert answer.status == 200
    choices = joined(answer.events, len(bodies))
    for index, (choice, body) in enumerate(zip(choices, bodies, strict=True)):
        (alone,) = complete(served, **body | {"stream": False})["choices"]
        for name in ("text", "finish_reason", "token_ids", "prompt_token_ids"):
            assert choice[name] == alone[name], (index, name)
        assert choice["logprobs"]["tokens"] == alone["logprobs"]["tokens"]
        np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], alone["logprobs"]["token_logprobs"], atol=1e-4)


def test_they_are_written_at_the_same_time_and_counted_together(served):
    bodies = [BODY | {"seed": i, "stream_options": {"include_usage": True}} for i in range(3)]
    events = ask(served, "POST", "/together", {"requests": bodies}).events
    order = [choice["index"] for event in events for choice in event["choices"]]
    assert sorted(order[:6]) == [0, 0, 1, 1, 2, 2]
    assert events[-1]["usage"] == {"prompt_tokens": 9, "completion_tokens": 27, "total_tokens": 36}


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (None, "1 to 16 bodies"),
        ([], "1 to 16 bodies"),
        ({"0": BODY}, "1 to 16 bodies"),
        ([BODY] * 17, "1 to 16 bodies"),
        ([1], "an object is expected"),
        ([BODY, BODY | {"temperature": -1}], "temperature"),
        ([BODY, BODY | {"prompt": [PROMPT, PROMPT]}], "no more than one text"),
        ([BODY | {"n": 2}], "no more than one text"),
        ([BODY | {"stream": False}], "stream"),
        ([BODY | {"echo": True}], "without echo"),
        ([BODY | {"max_tokens": 0}], "a prompt"),
        ([BODY, BODY | {"logprobs": 3}], "logprobs"),
        ([BODY | {"model": "another"}], "model"),
    ],
    ids=str,
)
def test_what_is_wrong_with_one_is_refused(served, requests, message):
    answer = ask(served, "POST", "/together", {"requests": requests})
    assert answer.status in (400, 404)
    assert message in answer.error["message"]


def test_more_tokens_than_one_request_may_have_are_refused(served, monkeypatch):
    monkeypatch.setattr("npgpt2.serving.together.TOKENS_LIMIT", 100)
    answer = ask(served, "POST", "/together", {"requests": [BODY] * 3})
    assert answer.status == 400
    assert "108 tokens" in answer.error["message"]


# ---- What can come next


def test_a_place_has_the_models_numbers(model, tokenizer, served):
    tokens = tokenizer.encode(PROMPT)
    place = ask(served, "POST", "/distribution", {"prompt": PROMPT, "logit_bias": {"7": 3}}).json
    logits = model.logits(tokens)[-1]
    order = np.argsort(-logits, kind="stable")
    assert place["likeliest"] == order[:SHOWN].tolist()
    np.testing.assert_allclose(place["logits"], logits[order[:EXACT]], atol=1e-4)
    assert place["before"] == tokens
    assert place["ends"] == [*end_tokens(model)]
    assert [token for token, *_ in place["own"]] == sorted({7, *tokens, *place["ends"]})
    ranks = {token: rank for rank, token in enumerate(order.tolist())}
    ends = np.cumsum([*[1] * EXACT, *place["sizes"]])
    for token, logit, entry in place["own"]:
        assert logit == pytest.approx(float(logits[token]), abs=1e-4)
        assert entry == (ends <= ranks[token]).sum()
    means = [part.mean() for part in np.split(logits[order], ends[EXACT - 1 : -1])[1:]]
    np.testing.assert_allclose(place["groups"], means, atol=1e-4)
    for token in place["likeliest"]:
        assert place["texts"][str(token)].encode("latin-1") == tokenizer.decode_bytes([token])


def test_a_place_after_token_ids_is_that_after_their_text(served, tokenizer):
    by_text, by_ids = (
        ask(served, "POST", "/distribution", {"prompt": prompt}).json for prompt in (PROMPT, tokenizer.encode(PROMPT))
    )
    assert by_text == by_ids


def test_a_vocabulary_without_a_rest_has_no_groups(tokenizer):
    place = next_place(np.arange(50, dtype=np.float32), [3], tokenizer, ends=[60])
    assert (place["groups"], place["sizes"], place["ends"]) == ([], [], [])
    assert place["own"] == [[3, 3.0, 46]]


@pytest.mark.parametrize("prompt", [5, [[1], [2]], [10**9], "x" * 40_000], ids=lambda prompt: str(prompt)[:20])
def test_what_is_no_prompt_has_no_place(served, prompt):
    answer = ask(served, "POST", "/distribution", {"prompt": prompt})
    assert answer.status == 400
    assert "prompt" in answer.error["message"]


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.tokenizer
