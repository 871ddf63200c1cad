"""The server's application by itself: what it answers, streamed and whole, is what the library gives."""

import io
import json
import re
import threading
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import numpy as np
import pytest
from asking import ask, begin, complete, environ_of, joined, stream

import npgpt2
from npgpt2.engine import Engine
from npgpt2.serving import app
from npgpt2.serving.logprobs import token_name

PROMPT = "A language model"


@pytest.fixture(scope="module")
def served(model):
    made = app(model, "tiny", slots=16)
    yield made
    made.close()


@pytest.fixture
def serve(request):
    """Makes applications that end with the test."""
    made = []

    def serve(*arguments, **settings):
        made.append(app(*arguments, **settings))
        return made[-1]

    yield serve
    for one in made:
        one.close()


def with_weights(model, changed):
    """The model, with other arrays under some names."""
    return npgpt2.GPT2({**model.weights, **changed}, model.hparams, model.tokenizer)


# ---- Completions are the library's


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 2, "top_k": 9, "seed": 5}])
def test_texts_are_those_of_the_library(served, model, settings):
    expected = model.generate(PROMPT, **{"length": 12, **settings})
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0} | settings
    (choice,) = complete(served, **body)["choices"]
    assert choice["text"] == expected
    assert joined(stream(served, **body)) == [choice]


def test_samples_are_those_of_the_library(served, model):
    expected = list(model.samples(PROMPT, 4, length=9, temperature=1.5, seed=3))
    body = {"prompt": PROMPT, "max_tokens": 9, "temperature": 1.5, "seed": 3, "n": 4}
    choices = complete(served, **body)["choices"]
    assert [choice["text"] for choice in choices] == expected
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert joined(stream(served, **body), 4) == choices
    best = complete(served, **body | {"n": 1, "best_of": 4})["choices"][0]["text"]
    assert best == model.generate(PROMPT, length=9, temperature=1.5, seed=3, best_of=4)


BODIES = [
    {"echo": True, "logprobs": 3},
    {"logprobs": 0, "return_token_ids": True},
    {"echo": True},
    {"echo": True, "logprobs": 2, "n": 3, "return_token_ids": True},
    {"prompt": [PROMPT, "é€ is", [32, 514]], "n": 2, "logprobs": 1, "echo": True},
    {"stop": [" small", "zebra"], "temperature": 0, "logprobs": 1},
    {"stop": "e", "temperature": 0, "logprobs": 1, "max_tokens": 2},
    {"stop": "l g", "temperature": 0, "logprobs": 1},
    {"stop_token_ids": [340], "temperature": 0, "logprobs": 1},
    {"max_tokens": 0, "echo": True, "logprobs": 5},
    {"max_tokens": 0},
    {"max_tokens": 1, "prompt": [226], "logit_bias": {"130": 100}, "logprobs": 0, "echo": True},
]


@pytest.mark.parametrize("more", BODIES, ids=json.dumps)
def test_a_stream_says_what_the_whole_answer_says(served, more):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.3, "seed": 7} | more
    whole = complete(served, **body)
    chunks = stream(served, **body | {"stream_options": {"include_usage": True}})
    streamed = joined(chunks, len(whole["choices"]))
    for choice, expected in zip(streamed, whole["choices"], strict=True):
        found, wanted = choice["logprobs"], expected["logprobs"]
        if wanted is not None:
            for one, other in zip(found.pop("token_logprobs"), wanted.pop("token_logprobs"), strict=True):
                assert one == (other and pytest.approx(other, abs=1e-4))
            tops = [[*top] if top else None for top in wanted.pop("top_logprobs")]
            assert [[*top] if top else None for top in found.pop("top_logprobs")] == tops
    assert streamed == whole["choices"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"] == []
    assert {chunk["usage"] for chunk in chunks[:-1]} == {None} if len(chunks) > 1 else True
    assert {(chunk["object"], chunk["model"], chunk["id"]) for chunk in chunks} == {
        ("text_completion", "tiny", chunks[0]["id"])
    }


def test_a_chunk_has_one_token_whose_text_is_its_own(served):
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 1.6, "seed": 1, "logprobs": 2, "ignore_eos": True}
    for more in ({}, {"stop": ["zzz", "e e e"]}):
        chunks = stream(served, **body | more)
        assert len(chunks) == 40
        for chunk in chunks:
            (choice,) = chunk["choices"]
            (name,) = choice["logprobs"]["tokens"]
            assert name == choice["text"] or name.startswith("bytes:")
            assert name in choice["logprobs"]["top_logprobs"][0]


def test_no_half_character_is_streamed(served, model):
    """The euro sign, of three tokens, written because nothing else can be."""
    euro = model.tokenizer.encode("€")
    prompt = [32, *euro[:1]]
    biases = {str(token): 100 for token in euro[1:]}
    body = {"prompt": prompt, "max_tokens": 6, "logit_bias": biases, "no_repeat_ngram_size": 1, "logprobs": 0}
    body |= {"temperature": 0, "stop": "never"}
    pieces = [chunk["choices"][0]["text"] for chunk in stream(served, **body)]
    whole = complete(served, **body)["choices"][0]["text"]
    assert "".join(pieces) == whole
    chars = stream(served, **body | {"prompt": [32], "logit_bias": {str(euro[0]): 100}, "max_tokens": 1})
    assert [chunk["choices"][0]["text"] for chunk in chars] == ["\ufffd"]  # it ended there


def test_logprobs_are_log_softmax_alone_and_among_fifteen_others(served, model):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 519, 8 + 3 * i).tolist() for i in range(16)]
    names = [token_name(model.tokenizer, token) for token in range(520)]

    def check(body, choice):
        ids = body["prompt"] + choice["token_ids"]
        logits = model.logits(ids).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found = choice["logprobs"]
        assert found["tokens"] == [names[token] for token in ids]
        assert found["token_logprobs"][0] is None
        chosen = [expected[i, token] for i, token in enumerate(ids[1:])]
        assert found["token_logprobs"][1:] == pytest.approx(chosen, abs=1e-4)
        for i, top in enumerate(found["top_logprobs"][1:]):
            assert [*top][:2] == [names[token] for token in np.argsort(-expected[i])[:2]]
            assert found["token_logprobs"][i + 1] == top[found["tokens"][i + 1]]

    bodies = [
        {"prompt": prompt, "max_tokens": 12, "temperature": 1.2, "seed": i, "logprobs": 2, "echo": True}
        | {"return_token_ids": True, "ignore_eos": True, "stream": bool(i % 2)}
        for i, prompt in enumerate(prompts)
    ]
    alone = [ask(served, "POST", "/v1/completions", body) for body in bodies[:2]]
    answers = [None] * 16
    ready = threading.Barrier(16)

    def one(number):
        ready.wait()
        answers[number] = ask(served, "POST", "/v1/completions", bodies[number])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for body, answer in zip(bodies + bodies[:2], answers + alone, strict=True):
        (choice,) = joined(answer.events) if body["stream"] else answer.json["choices"]
        check(body, choice)
    ids = [(joined(a.events) if i % 2 else a.json["choices"])[0]["token_ids"] for i, a in enumerate(answers[:2])]
    assert ids == [(joined(a.events) if i % 2 else a.json["choices"])[0]["token_ids"] for i, a in enumerate(alone)]


def test_settings_reach_the_engine_under_their_names(served, model, monkeypatch):
    asked, submit = [], Engine.submit

    def note(self, prompt, **settings):
        asked.append(settings)
        return submit(self, prompt, **settings)

    monkeypatch.setattr(Engine, "submit", note)
    body = {
        "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.5, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "no_repeat_ngram_size": 3, "min_tokens": 2, "seed": 7,
    }  # fmt: skip
    more = {"logit_bias": {"5": 1}, "stop": ["a", "b"], "stop_token_ids": [5, 7], "ignore_eos": True, "user": "me"}
    complete(served, prompt=PROMPT, max_tokens=2, unknown=1, **body, **more)
    (settings,) = asked
    theirs = {"logit_bias": {5: 1.0}, "stop": ["a", "b"], "stop_tokens": [5, 7], "ignore_eot": True}
    assert settings == body | theirs | {"length": 2, "sample": 0}


def test_without_a_seed_texts_differ(served):
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 2}
    assert len({complete(served, **body)["choices"][0]["text"] for _ in range(3)}) == 3


def test_the_special_token_is_read_as_such(served):
    (choice,) = complete(served, prompt="A<|endoftext|>", max_tokens=0, return_token_ids=True)["choices"]
    assert choice["prompt_token_ids"] == [32, 519]
    assert complete(served, max_tokens=1)["usage"]["prompt_tokens"] == 1


def test_the_token_that_ends_a_text_is_in_the_lists(serve, model):
    ending = serve(with_weights(model, {"ln_f/b": 50 * model.weights["wte"][519]}), "ending")
    body = {"prompt": PROMPT, "temperature": 0, "logprobs": 1, "echo": True, "max_tokens": 1}
    (choice,) = complete(ending, **body)["choices"]
    assert choice["logprobs"]["tokens"] == ["A", " language", " model", "<|endoftext|>"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "stop")
    assert joined(stream(ending, **body)) == [choice]


def test_a_stop_token_ends_a_text_and_is_no_part_of_it(served, model):
    small = model.tokenizer.encode(" small")[0]
    (choice,) = complete(served, prompt=PROMPT, temperature=0, stop_token_ids=[small], logprobs=0)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" plays one", "stop")
    assert choice["logprobs"]["tokens"] == [" plays", " one", " small"]
    assert model.generate(PROMPT, stop_tokens=[small]) == " plays one"
    request = model.stream(PROMPT, stop_tokens=[small], min_tokens=3, length=3).request
    with pytest.raises(ValueError, match="stop_tokens has 520, which is not in the vocabulary"):
        model.stream(PROMPT, stop_tokens=[520])
    assert request.limits.stop_tokens == (small,)
    assert model.beam_search(PROMPT, beams=1, stop_tokens=[small]).text == " plays one"
    assert not model.generate(PROMPT, stop_tokens=[small], min_tokens=3, length=3).startswith(" plays one small")


# ---- What is wrong


def test_errors_are_openais(served):
    answer = ask(served, "POST", "/v1/completions", {"prompt": PROMPT, "n": 0})
    assert answer.status == 400
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.error == {
        "message": "n is 0, where a whole number from 1 to 128 is expected",
        "type": "invalid_request_error", "param": "n", "code": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "x " * 500}, 400, "prompt"),
        ({"prompt": PROMPT, "max_tokens": 190}, 400, "max_tokens"),
        ({"prompt": PROMPT, "suffix": "end"}, 400, "suffix"),
        ({"prompt": PROMPT, "model": "gpt-4"}, 404, "model"),
        ({"prompt": PROMPT, "stream": True, "best_of": 2}, 400, "best_of"),
        ({"prompt": PROMPT, "stream_options": {}}, 400, "stream_options"),
        ({"prompt": PROMPT, "stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options"),
        ({"prompt": PROMPT, "stream": True, "stream_options": 5}, 400, "stream_options"),
        ({"prompt": PROMPT, "stop_token_ids": [520]}, 400, "stop_token_ids"),
        ({"prompt": PROMPT, "stop_token_ids": 5}, 400, "stop_token_ids"),
        ({"prompt": ["x x" * 70] * 1900}, 400, "prompt"),
    ],
)
def test_requests_that_are_wrong_are_refused_by_the_field(served, body, status, param):
    answer = ask(served, "POST", "/v1/completions", body)
    assert (answer.status, answer.error["param"]) == (status, param)


def test_what_does_not_fit_the_window_is_refused_with_both_numbers(served):
    message = ask(served, "POST", "/v1/completions", {"prompt": [5] * 190, "max_tokens": 16}).error["message"]
    assert message == "prompt has 190 tokens and max_tokens is 16: more than the model's n_ctx of 192"


def test_other_models_are_not_found(served):
    assert ask(served, "POST", "/v1/completions", {"model": "gpt-4"}).error["code"] == "model_not_found"
    assert ask(served, "GET", "/v1/models/gpt-4").status == 404


def test_a_base_model_has_no_chat_and_says_what_to_call(served):
    answer = ask(served, "POST", "/v1/chat/completions", {"messages": []})
    assert answer.status == 404
    assert "POST /v1/completions" in answer.error["message"]


def test_other_methods_and_paths(served):
    answer = ask(served, "GET", "/v1/completions")
    assert (answer.status, answer.headers["Allow"]) == (405, "POST, OPTIONS")
    assert ask(served, "DELETE", "/health").status == 405
    for path in ("/nothing", "/v1", "/../setup.cfg", "/index.html/", "//", "/__init__.py", "/v1/models/../x", ""):
        assert ask(served, "GET", path).status == 404, path
    head = ask(served, "HEAD", "/health")
    assert (head.status, head.headers["Content-Length"], head.body) == (200, "16", b"")


def test_a_model_of_broken_numbers_is_an_error(serve, model):
    broken = np.array(model.weights["wte"])
    broken[5] = np.nan
    nan = serve(with_weights(model, {"wte": broken}), "nan")
    answer = ask(nan, "POST", "/v1/completions", {"prompt": [5], "max_tokens": 3})
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "is not a number" in answer.error["message"]


def test_a_request_that_fails_fails_alone_after_the_headers_by_an_event(served, monkeypatch):
    """Of a text whose third token goes wrong, while another is written to its end."""
    from npgpt2.sampling import Sampling

    choose, calls = Sampling.choose, []

    def fail(self, *arguments):
        if self.seed == 99:
            calls.append(1)
            if len(calls) == 3:
                raise ZeroDivisionError("of a filter")
        return choose(self, *arguments)

    monkeypatch.setattr(Sampling, "choose", fail)
    other = begin(served, environ_of("POST", "/v1/completions", json.dumps({"stream": True, "seed": 1}).encode()))
    chunks = stream(served, prompt=PROMPT, seed=99)
    assert len(chunks) == 3
    assert chunks[-1]["error"]["type"] == "server_error"
    assert "of a filter" in chunks[-1]["error"]["message"]
    calls.clear()
    assert ask(served, "POST", "/v1/completions", {"prompt": PROMPT, "seed": 99}).status == 500
    whole = b"".join(other[2])
    assert whole.endswith(b"data: [DONE]\n\n")
    assert b"error" not in whole


def test_a_stream_that_is_silent_says_that_it_is_there(served, monkeypatch):
    monkeypatch.setattr("npgpt2.serving.server.streams.PATIENCE", 0.01)
    held, step = threading.Event(), Engine.step

    def wait(self):
        held.wait()
        return step(self)

    monkeypatch.setattr(Engine, "step", wait)
    body = json.dumps({"prompt": PROMPT, "stream": True, "max_tokens": 2}).encode()
    _, headers, pieces = begin(served, environ_of("POST", "/v1/completions", body))
    assert headers["Content-Type"].startswith("text/event-stream")
    said = iter(pieces)
    assert next(said) == next(said) == b": still here\n\n"
    held.set()
    assert b"".join(said).endswith(b"data: [DONE]\n\n")


# ---- The queue, and who goes away


def test_a_full_queue_is_429_with_when_to_try_again(serve, model, monkeypatch):
    held, step = threading.Event(), Engine.step

    def wait(self):
        held.wait()
        return step(self)

    monkeypatch.setattr(Engine, "step", wait)
    small = serve(model, slots=1, queue=2)
    body = json.dumps({"prompt": PROMPT, "stream": True, "max_tokens": 2}).encode()
    waiting = [begin(small, environ_of("POST", "/v1/completions", body)) for _ in range(3)]
    assert [status for status, _, _ in waiting] == [200] * 3
    answer = ask(small, "POST", "/v1/completions", body)
    assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    assert answer.error["type"] == "rate_limit_error"
    held.set()
    for _, _, pieces in waiting:
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


def test_of_several_requests_each_gets_a_slot_before_one_gets_two(serve, model):
    """The second needn't wait until the first has written all of its hundred texts."""
    small = serve(model, slots=2)
    many = json.dumps({"prompt": PROMPT, "stream": True, "n": 100, "max_tokens": 20, "ignore_eos": True}).encode()
    _, _, pieces = begin(small, environ_of("POST", "/v1/completions", many))
    said = iter(pieces)
    next(said)
    complete(small, prompt=PROMPT, max_tokens=5)
    assert "npgpt2_requests_running 1\n" in ask(small, "GET", "/metrics").body.decode()
    pieces.close()


def test_a_stream_that_nobody_reads_on_frees_its_slot(serve, model):
    small = serve(model, slots=1)
    body = json.dumps({"prompt": PROMPT, "stream": True, "max_tokens": 180, "ignore_eos": True}).encode()
    for read in (0, 1, 2):
        _, _, pieces = begin(small, environ_of("POST", "/v1/completions", body))
        said = iter(pieces)
        for _ in range(read):
            next(said)
        pieces.close()
        complete(small, prompt=PROMPT, max_tokens=1)
    text = ask(small, "GET", "/metrics").body.decode()
    assert 'npgpt2_requests_finished_total{reason="cancelled"} 3\n' in text
    assert "npgpt2_slots_used 0\n" in text


def test_nothing_is_done_for_a_client_that_has_gone(serve, model):
    lines = []
    quiet = serve(model, log=lines.append)
    body = json.dumps({"prompt": PROMPT}).encode()
    for path in ("/v1/completions", "/tokenize", "/inspect"):
        gone = environ_of("POST", path, body) | {"waitress.client_disconnected": lambda: True}
        b"".join(begin(quiet, gone)[2])
        assert f" POST {path} gone " in lines.pop()
    assert quiet.loop.waiting == quiet.loop.running == 0


def test_prompts_that_begin_alike_are_read_once(serve, model, passes):
    small = serve(model, slots=2)
    prompt = list(range(100, 180))
    complete(small, prompt=prompt, max_tokens=1)
    complete(small, prompt=[*prompt, 5], max_tokens=1)
    assert [sum(lengths) for lengths in passes] == [80, 1]
    text = ask(small, "GET", "/metrics").body.decode()
    assert "npgpt2_prefix_hits_total 1\n" in text
    assert "npgpt2_prefix_hit_tokens_total 80\n" in text


def test_what_waits_takes_no_more_than_its_ids(serve, model, allocated_peak):
    from npgpt2.serving.protocol import parse_completion
    from npgpt2.serving.server.loop import Job

    body = {"prompt": [[519 - i % 400 for i in range(150)] for _ in range(600)]}
    completion = parse_completion(body, model)
    assert allocated_peak(lambda: Job(completion, lambda: False)) < 600 * 150 * 4 + 200_000


# ---- The engine's end


def test_the_death_of_the_engine_is_an_error_for_all(serve, model, monkeypatch):
    dying, told = serve(model, slots=1), threading.Event()
    dying.loop.died = told.set
    body = json.dumps({"prompt": PROMPT, "stream": True, "max_tokens": 180, "ignore_eos": True}).encode()
    _, _, pieces = begin(dying, environ_of("POST", "/v1/completions", body))
    said = iter(pieces)
    next(said)
    waiting = begin(dying, environ_of("POST", "/v1/completions", body))

    def die(self):
        raise MemoryError("none left")

    monkeypatch.setattr(Engine, "step", die)
    assert told.wait(10)
    for end in (list(said)[-2], list(waiting[2])[-2]):
        assert "the engine failed" in json.loads(end.removeprefix(b"data: "))["error"]["message"]
    answer = ask(dying, "POST", "/v1/completions", {"prompt": PROMPT})
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert isinstance(dying.loop.error, MemoryError)
    assert ask(dying, "GET", "/health").status == 500


def test_an_application_that_ends_ends_its_streams_with_an_error(serve, model):
    ending = serve(model, slots=1)
    body = json.dumps({"prompt": PROMPT, "stream": True, "max_tokens": 180, "ignore_eos": True}).encode()
    _, _, pieces = begin(ending, environ_of("POST", "/v1/completions", body))
    said = iter(pieces)
    next(said)
    ending.close()
    *_, error, done = said
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "the server is shutting down"
    assert done == b"data: [DONE]\n\n"
    answer = ask(ending, "POST", "/v1/completions", {"prompt": PROMPT})
    assert (answer.status, answer.error["type"]) == (503, "server_error")


def test_the_thread_begins_with_the_first_request(serve, model):
    before = threading.active_count()
    quiet = serve(model)
    assert ask(quiet, "GET", "/v1/models").status == 200
    assert threading.active_count() == before
    complete(quiet, prompt=PROMPT, max_tokens=1)
    assert threading.active_count() == before + 1
    quiet.close()
    assert threading.active_count() == before
    eager = serve(model)
    eager.start()
    assert threading.active_count() == before + 1


# ---- The rest


def test_the_model_is_listed(served, model):
    listed = ask(served, "GET", "/v1/models").json
    assert listed["object"] == "list"
    (one,) = listed["data"]
    assert (one["id"], one["object"], one["owned_by"], one["max_model_len"]) == ("tiny", "model", "npgpt2", 192)
    assert one["meta"] == model.hparams._asdict()
    assert ask(served, "GET", "/v1/models/tiny").json == one


def test_a_model_may_be_called_by_other_names(serve, model):
    named = serve(model, "café", aliases=["other"])
    assert ask(named, "GET", "/v1/models/" + "café".encode().decode("latin-1")).json["id"] == "café"
    for name in ("café", "other", None):
        assert complete(named, prompt=PROMPT, model=name, max_tokens=1)["model"] == "café"


def test_tokens_in_both_spellings(served, model):
    ids = model.tokenizer.encode(PROMPT)
    said = ask(served, "POST", "/tokenize", {"prompt": PROMPT, "add_special_tokens": False}).json
    assert said == {"count": 3, "max_model_len": 192, "tokens": ids, "token_strs": None}
    said = ask(served, "POST", "/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json
    assert said["token_strs"] == ["A", " language", " model"]
    assert ask(served, "POST", "/tokenize", {"content": PROMPT}).json["tokens"] == ids
    names = ["A", " language", " model"]
    pieces = ask(served, "POST", "/tokenize", {"content": PROMPT, "with_pieces": True}).json["tokens"]
    assert pieces == [{"id": token, "piece": piece} for token, piece in zip(ids, names, strict=True)]
    assert ask(served, "POST", "/tokenize", {"prompt": "<|endoftext|>"}).json["tokens"] == [519]
    assert (
        len(ask(served, "POST", "/tokenize", {"content": "<|endoftext|>", "parse_special": False}).json["tokens"]) > 1
    )
    assert ask(served, "POST", "/tokenize", {"prompt": ""}).json["tokens"] == []
    said = ask(served, "POST", "/detokenize", {"tokens": ids}).json
    assert said["prompt"] == said["content"] == PROMPT
    for path, body in (
        ("/tokenize", {}), ("/tokenize", {"prompt": [5]}), ("/tokenize", {"content": "A", "parse_special": 5}),
        ("/detokenize", {"tokens": [520]}), ("/detokenize", {"tokens": "A"}), ("/detokenize", {"tokens": [True]}),
    ):  # fmt: skip
        assert ask(served, "POST", path, body).status == 400, body


def test_what_lm_eval_wants_to_know_of_the_vocabulary(served):
    info = ask(served, "GET", "/tokenizer_info").json
    assert (info["eos_token"], info["bos_token"], info["model_max_length"]) == ("<|endoftext|>", "<|endoftext|>", 192)


def test_a_text_is_looked_into(served, model):
    answer = ask(served, "POST", "/inspect", {"prompt": PROMPT})
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert answer.body.startswith(b"<!doctype html>")
    assert "sandbox allow-scripts" in answer.headers["Content-Security-Policy"]
    assert ask(served, "POST", "/inspect", {"prompt": [5, 7]}).status == 200
    for wrong in ({"prompt": 5}, {"prompt": [520]}, {"prompt": [5] * 193}, {"prompt": [True]}):
        assert ask(served, "POST", "/inspect", wrong).status == 400


def test_the_page_and_its_files_are_sent_with_a_policy(served):
    from npgpt2.serving.server.pages import FILES

    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    for path in ("/", *(f"/{name}" for name in FILES)):
        answer = ask(served, "GET", path)
        assert answer.status == 200
        kind = kinds["html" if path == "/" else path.rpartition(".")[2]]
        assert answer.headers["Content-Type"].partition(";")[0] == kind
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self' 'sha256-")
        for part in ("connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"):
            assert part in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        again = ask(served, "GET", path, If_None_Match=answer.headers["ETag"])
        assert (again.status, again.body) == (304, b"")


def test_metrics_are_prometheus_text(served):
    complete(served, prompt=PROMPT, max_tokens=3, temperature=0)
    answer = ask(served, "GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    declared, counts = {}, {}
    for line in answer.body.decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            declared[name] = kind
        elif not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            counts[name] = float(value)
            base = name.partition("{")[0]
            assert base in declared or base.rpartition("_")[0] in declared
    assert declared["npgpt2_requests_running"] == "gauge"
    assert declared["npgpt2_generated_tokens_total"] == "counter"
    assert declared["npgpt2_time_to_first_token_seconds"] == "histogram"
    name = "npgpt2_time_to_first_token_seconds"
    buckets = [value for key, value in counts.items() if key.startswith(f"{name}_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == counts[f"{name}_count"] > 0
    assert counts["npgpt2_generated_tokens_total"] > counts['npgpt2_requests_finished_total{reason="length"}'] > 0


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 2}),
        ("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "stream": True}),
        ("POST", "/v1/completions", {"prompt": 5}), ("GET", "/", None), ("HEAD", "/health", None), ("GET", "/no", None),
        ("OPTIONS", "/v1/completions", None), ("GET", "/metrics", None), ("POST", "/inspect", {"prompt": PROMPT}),
    ],
)  # fmt: skip
def test_it_is_an_application_as_pep_3333_says(served, method, path, body):
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "HTTP_HOST": "localhost"}
    environ |= {"SCRIPT_NAME": "", "QUERY_STRING": ""}
    setup_testing_defaults(environ)
    if body:
        data = json.dumps(body).encode()
        environ |= {
            "wsgi.input": io.BytesIO(data),
            "CONTENT_LENGTH": str(len(data)),
            "CONTENT_TYPE": "application/json",
        }
    # Which hands on an input of its own, that is read by a size alone.
    pieces = validator(served)(environ, lambda status, headers, error=None: None)
    said = b"".join(pieces)
    pieces.close()
    assert bool(said) == (method not in ("HEAD", "OPTIONS"))


def test_what_the_readme_shows_is_answered(fixtures):
    """But for what is of the moment."""
    readme = (fixtures.parent.parent / "README.md").read_text("utf-8").split("\n## Serving")[1].split("\n## ")[0]
    calls = re.findall(r"^\$ curl -s localhost:8000(\S+) -H '(.*?): (.*?)' -d '(.*?)'\n(.*)$", readme, re.MULTILINE)
    assert len(calls) >= 2
    bundled = app(npgpt2.load())
    for path, name, value, body, shown in calls:
        answer = ask(bundled, "POST", path, body.encode(), **{name.replace("-", "_"): value}).json
        of_the_moment = {"id", "created"} & {*answer}
        assert answer | dict.fromkeys(of_the_moment) == json.loads(shown) | dict.fromkeys(of_the_moment)
    bundled.close()


def test_what_is_unsuited_for_an_application_is_refused_by_name(model):
    for name in ("aliases", "api_keys", "allowed_hosts", "cors_origins"):
        with pytest.raises(TypeError, match=rf"^{name} is "):
            app(model, **{name: "text"})
    for settings in ({"slots": 0}, {"queue": -1}):
        with pytest.raises(ValueError, match="whole number"):
            app(model, **settings)
    with pytest.raises(ValueError, match="has no vocabulary"):
        app(npgpt2.GPT2(dict(model.weights), model.hparams))
