"""`npgpt2 batch`: every line is checked, each is answered once, and whatever ends a run, the next goes on."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from builders import echo_model
from commands import failed
from hypothesis import given, settings
from hypothesis import strategies as st

import npgpt2
from npgpt2.files import lock
from npgpt2.serving import Answers, Origin, Requests, check, on_engine, unanswered
from npgpt2.serving import run as run_plan
from npgpt2.serving.batch import WINDOW, longest_first
from npgpt2.serving.lines import LINE_LIMIT
from npgpt2.weights import Weights

PROMPT = "A language model"


def request(custom_id, prompt=PROMPT, **body):
    said = {"prompt": prompt, "max_tokens": 3, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": said}


def write(path, requests):
    path.write_bytes(b"".join(json.dumps(one).encode() + b"\n" for one in requests))
    return path


@pytest.fixture
def twelve(tmp_path):
    """A file of requests of different lengths."""
    return write(tmp_path / "requests.jsonl", [request(f"r{i}", max_tokens=1 + 5 * i % 12) for i in range(12)])


@pytest.fixture
def output(tmp_path):
    return tmp_path / "answers.jsonl"


def read(path):
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def texts(path):
    """What answers say, by the names of their requests."""
    found = [
        (one["custom_id"], [choice["text"] for choice in one["response"]["body"]["choices"]]) for one in read(path)
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


# ---- Requests and answers


def test_each_line_is_answered_as_the_library_would(run, model, tmp_path, output):
    requests = [
        request("greedy", temperature=0, max_tokens=5),
        request("drawn", temperature=1.3, seed=4, top_k=20, max_tokens=8),
        request("ids", [32, 514, 352], temperature=0, n=2),
        request("many", [PROMPT, PROMPT + " plays"], temperature=0, stop=" one"),
    ]
    path = write(tmp_path / "requests.jsonl", requests)
    status, out, err = run("batch", path, "-o", output, "-m", "MODEL")
    assert (status, out, err) == (0, f"{output}: 4 answers, 0 errors\n", "")
    assert texts(output) == {
        "greedy": [model.generate(PROMPT, length=5)],
        "drawn": [model.generate(PROMPT, length=8, temperature=1.3, seed=4, top_k=20)],
        "ids": [model.generate(PROMPT, length=3)] * 2,
        "many": [" plays", ""],
    }


def test_an_answer_has_the_form_of_openais_batches(run, twelve, output, tiny):
    os.utime(twelve, (5, 5))
    assert run("batch", twelve, "-o", output, "-m", "MODEL")[0] == 0
    assert len(read(output)) == 12
    for one in read(output):
        assert list(one) == ["id", "custom_id", "response", "error"]
        assert one["id"].startswith("batch_req_")
        assert one["error"] is None
        assert list(one["response"]) == ["status_code", "request_id", "body"]
        body = one["response"]["body"]
        assert (body["object"], body["model"], body["created"]) == ("text_completion", "tiny", 5)
        assert body["system_fingerprint"] == f"fp_{Weights(tiny).fingerprint()}"
    assert len({one["id"] for one in read(output)}) == 12


@pytest.mark.parametrize("slots", [1, 5])
def test_neither_slots_nor_order_change_what_is_answered(slots, run, twelve, output, tmp_path):
    assert run("batch", twelve, "-o", output, "-m", "MODEL")[0] == 0
    os.utime(twelve, (7, 7))
    times = (twelve.stat().st_atime, twelve.stat().st_mtime)
    lines = twelve.read_bytes().splitlines(keepends=True)
    random.Random(slots).shuffle(lines)
    twelve.write_bytes(b"".join(lines))
    os.utime(twelve, times)
    output.unlink()
    other = tmp_path / "other.jsonl"
    assert run("batch", twelve, "-o", other, "-m", "MODEL", "--slots", slots)[0] == 0
    expected = write(twelve, [request(f"r{i}", max_tokens=1 + 5 * i % 12) for i in range(12)])
    os.utime(expected, times)
    assert run("batch", expected, "-o", output, "-m", "MODEL")[0] == 0
    assert sorted(other.read_bytes().splitlines()) == sorted(output.read_bytes().splitlines())


def test_without_a_seed_the_custom_id_draws(run, tmp_path, output):
    bodies = {"temperature": 3, "max_tokens": 12}
    requests = [
        request("a", **bodies),
        request("b", **bodies),
        request("c", seed=1, **bodies),
        request("d", seed=1, **bodies),
    ]
    assert run("batch", write(tmp_path / "four.jsonl", requests), "-o", output, "-m", "MODEL")[0] == 0
    drawn = texts(output)
    assert len({*map(tuple, drawn.values())}) == 3
    assert drawn["c"] == drawn["d"]
    output.unlink()
    assert run("batch", write(tmp_path / "one.jsonl", requests[1:2]), "-o", output, "-m", "MODEL")[0] == 0
    assert texts(output)["b"] == drawn["b"]


def test_a_line_of_more_texts_than_slots_is_one_answer(run, tmp_path, output):
    path = write(tmp_path / "r.jsonl", [request("a", n=20, temperature=1.5, seed=1), request("b", n=7, best_of=9)])
    assert run("batch", path, "-o", output, "-m", "MODEL", "--slots", 4)[0] == 0
    assert [len(texts(output)[name]) for name in "ab"] == [20, 7]


# ---- Lines that are wrong

NESTED = b"[" * 100_000
WRONG = [
    (b"nonsense", "not valid JSON"),
    (b"[1]", "an object is expected"),
    (b'{"custom_id": "x"}', "method is None"),
    (b"\xff", "not valid JSON"),
    (NESTED, "not valid JSON"),
    (b'{"a":' + b"9" * 9000 + b"}", "not valid JSON"),
    (b'{"a": [' + b"1," * 2**18 + b"1]}", "more values"),
    (b'"' + b"a" * LINE_LIMIT + b'"', "more than 4,194,304 bytes"),
    (request("") | {}, "custom_id is ''"),
    (request(5), "custom_id is 5"),
    (request("i" * 513), "custom_id is "),
    (request("get") | {"method": "GET"}, "method is 'GET'"),
    (request("chat") | {"url": "/v1/chat/completions"}, "url is "),
    (request("list") | {"body": []}, "body is []"),
    (request("many", max_tokens=500), "max_tokens is 500"),
    (request("other", model="gpt-4"), "model is 'gpt-4'"),
    (request("stream", stream=True), "a batch's answers come whole"),
    (request("r3"), "custom_id is that of line 4"),
]


def with_wrong(twelve):
    """The twelve requests with the wrong ones behind, and a line without anything."""
    wrong = [one if isinstance(one, bytes) else json.dumps(one).encode() for one, _ in WRONG]
    twelve.write_bytes(twelve.read_bytes() + b"\n" + b"".join(one + b"\n" for one in wrong))
    return twelve


def test_all_lines_that_are_wrong_are_listed_and_nothing_is_run(run, twelve, output):
    status, out, err = run("batch", with_wrong(twelve), "-o", output, "-m", "MODEL")
    assert (status, out) == (1, "")
    *listed, last = err.splitlines()
    assert last == f"npgpt2: {twelve}: 18 of 30 lines can't be answered; --skip-bad answers the others"
    assert len(listed) == len(WRONG)
    for number, (line, (_, problem)) in enumerate(zip(listed, WRONG, strict=True), 14):
        assert line.startswith(f"{twelve}:{number}: ")
        assert problem in line
        assert len(line) < 500
    assert not output.exists()


def test_skip_bad_answers_the_others_and_the_wrong_ones_by_what_is_wrong(run, twelve, output):
    expected = (3, f"{output}: 30 answers, 18 errors\n")
    assert run("batch", with_wrong(twelve), "-o", output, "-m", "MODEL", "--skip-bad")[:2] == expected
    found = read(output)
    errors = [one for one in found if one["response"]["status_code"] == 400]
    assert (len(found), len(errors), len({one["id"] for one in found})) == (30, 18, 30)
    for one, (_, problem) in zip(errors, WRONG, strict=True):
        assert list(one["response"]["body"]) == ["error"]
        error = one["response"]["body"]["error"]
        assert problem in error["message"]
        assert (list(error), error["type"]) == (["message", "type", "param", "code"], "invalid_request_error")
    by_name = {one["custom_id"]: one["response"]["body"]["error"]["param"] for one in errors}
    assert by_name["many"] == "max_tokens"
    assert by_name["r3"] == "custom_id"
    assert by_name[None] == "custom_id"
    before = output.read_bytes()
    assert run("batch", twelve, "-o", output, "-m", "MODEL", "--skip-bad")[:2] == expected
    assert output.read_bytes() == before


def test_a_file_without_requests_is_refused(run, tmp_path, output):
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    assert failed(run("batch", tmp_path / "empty.jsonl", "-o", output, "-m", "MODEL"), 1, "has no requests")
    assert failed(run("batch", tmp_path / "none.jsonl", "-o", output, "-m", "MODEL"), 1, "none.jsonl", "No such file")


def test_prompts_that_are_taken_for_requests_are_told_of_lines(run, tmp_path, output):
    (tmp_path / "prompts.txt").write_text("A language model\n")
    status, _, err = run("batch", tmp_path / "prompts.txt", "-o", output, "-m", "MODEL")
    assert status == 1
    assert err.endswith("1 of 1 lines can't be answered; if they are prompts and nothing else, give --lines\n")


def test_a_model_without_a_vocabulary_is_refused_at_once(run, twelve, output, tmp_path):
    echo_model(tmp_path / "echo.npz")
    assert failed(run("batch", twelve, "-o", output, "-m", tmp_path / "echo.npz"), 1, "echo.npz: has no vocabulary")


def test_places_that_answers_cannot_go_to_are_refused(run, twelve, tmp_path):
    assert failed(run("batch", twelve, "-o", twelve, "-m", "MODEL"), 2, "is the file of requests")
    assert failed(run("batch", twelve, "-o", "-", "-m", "MODEL"), 2, "name a file")
    assert failed(run("batch", "-", "-o", tmp_path / "b", "-m", "MODEL"), 2, "name a file")
    assert failed(run("batch", twelve, "-o", tmp_path, "-m", "MODEL"), 1, "no file that lines can be added to")
    assert failed(run("batch", twelve, "-o", tmp_path / "a" / "b", "-m", "MODEL"), 1, "No such file")
    assert failed(
        run("batch", tmp_path, "-o", tmp_path / "b", "-m", "MODEL"), 1, "is no file; its lines are read twice"
    )


def test_a_text_that_goes_wrong_is_an_error_and_the_others_go_on(model, tmp_path, output):
    broken = npgpt2.GPT2({**model.weights, "wpe": model.weights["wpe"].copy()}, model.hparams, model.tokenizer)
    broken.weights["wpe"][20:] = np.inf
    path = write(tmp_path / "r.jsonl", [request("short"), request("long", max_tokens=30, temperature=0)])
    with np.errstate(invalid="ignore"):
        assert answer_all(broken, path, output) == 1
    short, long = sorted(read(output), key=lambda one: one["response"]["status_code"])
    assert (short["custom_id"], short["response"]["status_code"]) == ("short", 200)
    assert (long["custom_id"], long["response"]["status_code"]) == ("long", 500)
    assert "not a number" in long["response"]["body"]["error"]["message"]


# ---- Plain prompts


def test_lines_of_text_are_prompts_with_the_same_settings(run, model, tmp_path, output):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffA language\nA language model\r\n\nA<|endoftext|>".encode())
    assert run("batch", path, "--lines", "-o", output, "-m", "MODEL", "--length", 4, "--stop", "small")[0] == 0
    prompts = ["A language", PROMPT, "", "A<|endoftext|>"]
    asked = {"length": 4, "stop": "small", "allow_special": True}
    assert texts(output) == {f"line-{i}": [model.generate(one, **asked)] for i, one in enumerate(prompts, 1)}


def test_lines_of_text_are_drawn_by_their_number_or_by_the_seed(run, model, tmp_path, output):
    path = tmp_path / "prompts.txt"
    path.write_text("A language model\n" * 3)
    drawing = ["--lines", "-m", "MODEL", "--length", 9, "--temperature", 1.5, "--top-k", 50, "--nsamples", 2]
    assert run("batch", path, "-o", output, *drawing)[0] == 0
    assert len({*map(tuple, texts(output).values())}) == 3
    other = tmp_path / "seeded.jsonl"
    assert run("batch", path, "-o", other, *drawing, "--seed", 3)[0] == 0
    expected = list(model.samples(PROMPT, 2, length=9, temperature=1.5, top_k=50, seed=3))
    assert list(texts(other).values()) == [expected] * 3
    assert failed(run("batch", path, "-o", output, *drawing, "--seed", 3), 1, "line 1 answers none of the requests")


def test_each_of_the_lines_that_say_the_same_is_answered_once(run, tmp_path, output):
    path = tmp_path / "prompts.txt"
    path.write_text("A language model\n" * 5)
    words = ["batch", path, "--lines", "-o", output, "-m", "MODEL", "--length", 2]
    assert run(*words)[0] == 0
    before = output.read_bytes()
    assert len({one["id"] for one in read(output)}) == 5
    assert run(*words)[0] == 0
    assert output.read_bytes() == before
    output.write_bytes(b"".join(before.splitlines(keepends=True)[:2]))
    assert run(*words)[0] == 0
    assert same(output.read_bytes(), before)


def test_a_setting_that_is_wrong_in_every_line_is_said_once(run, tmp_path, output):
    path = tmp_path / "prompts.txt"
    path.write_text("A language model\n" * 5)
    words = ["batch", path, "--lines", "-o", output, "-m", "MODEL"]
    assert failed(run(*words, "--length", 500), 1, "max_tokens is 500, where a whole number from 0 to 192 is expected")
    assert failed(run(*words, "--logit-bias", "520=1"), 1, "logit_bias has '520'")


def test_a_line_that_is_no_text_is_wrong(run, tmp_path, output):
    (tmp_path / "prompts.txt").write_bytes(b"A\n\xff\n")
    status, _, err = run("batch", tmp_path / "prompts.txt", "--lines", "-o", output, "-m", "MODEL")
    assert status == 1
    assert "prompts.txt:2: " in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--temperature", "1"], "--temperature is a setting for --lines"),
        (["--ignore-eot"], "--ignore-eot is a setting for --lines"),
        (["--stop", "a"], "--stop is a setting for --lines"),
        (["--lines", "--temperature", "-1"], "temperature is -1"),
        (["--slots", "0"], "--slots"),
    ],
)
def test_settings_that_make_no_sense_are_wrong_arguments(words, part, run, twelve, output):
    assert failed(run("batch", twelve, "-o", output, "-m", "MODEL", *words), 2, part)


# ---- The run


def answer_all(model, path, output, slots=4, progress=lambda written, saved: None, fingerprint="0123"):
    """What the command does, on any model; returns the number of errors."""
    requests = Requests(path, model, ["any"], fingerprint)
    plan = check(requests)
    with Answers(output) as answers:
        wanted, errors = unanswered(plan, requests, answers)
        runner = on_engine(model, Origin("any", fingerprint, 0), slots)
        return errors + run_plan(plan, wanted, requests, answers, runner, progress)


def test_progress_counts_tokens_and_what_is_saved(model, tmp_path, output):
    body = {"temperature": 0, "max_tokens": 20, "stop": " small"}
    path = write(tmp_path / "r.jsonl", [request("a", **body), request("b", **body, n=3), request("c")])
    counts = []
    assert answer_all(model, path, output, progress=lambda *count: counts.append(count)) == 0
    written, saved = map(sum, zip(*counts, strict=True))
    assert written == sum(one["response"]["body"]["usage"]["completion_tokens"] for one in read(output))
    assert written + saved == 20 + 60 + 3
    assert saved > 0


def test_long_lines_begin_first(model, tmp_path):
    """So that none runs alone at the end; of those as long as each other, the first in the file."""
    lengths = [*random.Random(1).choices(range(1, 9), k=WINDOW + 100)]
    path = write(tmp_path / "r.jsonl", [request(str(i), max_tokens=length) for i, length in enumerate(lengths)])
    lines = list(longest_first(Requests(path, model, [], "").lines()))
    assert sorted(line.number for line in lines) == list(range(1, WINDOW + 101))
    end = [(-line.completion.max_tokens, line.number) for line in lines[-WINDOW + 1 :]]
    assert end == sorted(end)
    assert max(line.completion.max_tokens for line in lines[-WINDOW // 10 :]) < 3
    assert lines[0].completion.max_tokens == 8


def test_a_batch_takes_no_more_passes_than_an_engine_that_is_given_all(model, tmp_path, output, passes):
    """Slots that are empty, or filled late, would make them more."""
    lengths = random.Random(2).choices(range(4, 40), k=120)
    path = write(tmp_path / "r.jsonl", [request(str(i), max_tokens=n, ignore_eos=True) for i, n in enumerate(lengths)])
    assert answer_all(model, path, output, slots=8) == 0
    taken = len(passes)
    passes.clear()
    engine = npgpt2.Engine(model, slots=8)
    for n in lengths:
        engine.submit(PROMPT, length=n, ignore_eot=True)
    while engine.busy:
        engine.step()
    assert taken <= 1.05 * len(passes)


def test_lines_are_read_as_slots_get_free(model, twelve):
    """So that a file of any size is in memory by a part alone."""
    lines = iter(Requests(twelve, model, [], "").lines())
    answers = on_engine(model, Origin("", "", 0), 2)(lines, lambda written, saved: None)
    next(answers)
    assert len(list(lines)) >= 12 - 2 * 2 - 1


def test_memory_does_not_grow_with_the_file(model, tmp_path, allocated_peak, monkeypatch):
    """But for some bytes a line, of marks and numbers."""
    monkeypatch.setattr("npgpt2.serving.batch.WINDOW", 64)
    monkeypatch.setattr("npgpt2.serving.answers.STEP_BYTES", 10_000)

    def peak(count):
        path = write(tmp_path / f"{count}.jsonl", [request(f"r{i}") for i in range(count)])

        def at_once(lines, progress):
            for line in lines:
                progress(3, 0)
                yield line, 200, {"text": "x" * 100}

        def work():
            requests = Requests(path, model, [], "")
            plan = check(requests)
            (tmp_path / "out.jsonl").unlink(missing_ok=True)
            with Answers(tmp_path / "out.jsonl") as answers:
                wanted, _ = unanswered(plan, requests, answers)
                run_plan(plan, wanted, requests, answers, at_once, lambda written, saved: None)

        return allocated_peak(work)

    assert peak(2500) - peak(500) < 2000 * 100  # where a request that was read takes more than 1,000


def test_requests_that_change_under_a_run_end_it(model, twelve, output):
    requests = Requests(twelve, model, [], "0123")
    plan = check(requests)
    write(twelve, [request(f"r{i}", max_tokens=2) for i in range(12)])
    with Answers(output) as answers:
        wanted, _ = unanswered(plan, requests, answers)
        runner = on_engine(model, Origin("", "", 0), 2)
        with pytest.raises(ValueError, match=r"requests\.jsonl: line 1 was changed after it was checked"):
            run_plan(plan, wanted, requests, answers, runner, lambda *count: None)


def run_after(model, twelve, output, change):
    """Check the twelve requests, change something, and run them."""
    requests = Requests(twelve, model, [], "0123")
    plan = check(requests)
    with Answers(output) as answers:
        wanted, _ = unanswered(plan, requests, answers)
        change()
        run_plan(plan, wanted, requests, answers, on_engine(model, Origin("", "", 0), 2), lambda *count: None)


def test_requests_that_are_taken_away_under_a_run_end_it(model, twelve, output):
    with pytest.raises(ValueError, match=r"requests\.jsonl: line 6 was taken away after it was checked"):
        run_after(model, twelve, output, lambda: write(twelve, read(twelve)[:5]))


def test_requests_that_are_added_under_a_run_are_for_the_next(model, twelve, output):
    added = [*read(twelve), request("new")]
    run_after(model, twelve, output, lambda: write(twelve, added))
    assert len(texts(output)) == 12
    assert answer_all(model, twelve, output) == 0
    assert "new" in texts(output)


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no file that is open")
def test_a_run_ends_where_its_answers_are_taken_away(model, twelve, output):
    """Those that come would go to a file without a name."""
    with pytest.raises(FileNotFoundError, match=r"answers\.jsonl"):
        run_after(model, twelve, output, output.unlink)


def test_a_run_ends_where_something_else_writes_to_its_answers(model, twelve, output):
    """As a run on another machine, where a network's disk has no locks."""
    with pytest.raises(ValueError, match="was changed by another program meanwhile; run again"):
        run_after(model, twelve, output, lambda: output.write_bytes(b"\n"))


# ---- Going on


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Some requests, and what a run writes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    requests = [request(f"näme {i}", temperature=1, max_tokens=1 + i % 4, logprobs=i % 2) for i in range(8)]
    path = write(folder / "requests.jsonl", [*requests, request("r", n=0), request("", n=0)])
    assert answer_all(model, path, folder / "answers.jsonl") == 2
    return path, (folder / "answers.jsonl").read_bytes()


def same(data, expected):
    """Whether answers are the same, in whatever order; float32 rounds log-probabilities a little in other batches."""

    def rounded(data):
        return sorted(
            json.dumps(json.loads(line, parse_float=lambda text: round(float(text), 3))) for line in data.splitlines()
        )

    return data.endswith(b"\n") and rounded(data) == rounded(expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_torn_file_is_completed(data, model, whole, tmp_path_factory):
    """Cut anywhere, as by a kill or a full disk; or with zeros from anywhere on, as by a power cut."""
    path, expected = whole
    cut = data.draw(st.integers(0, len(expected)))
    zeros = data.draw(st.sampled_from([0, 1, 5000]))
    rest = data.draw(st.sampled_from([b"", expected[cut + zeros :]])) if zeros else b""
    output = tmp_path_factory.mktemp("torn") / "answers.jsonl"
    output.write_bytes(expected[:cut] + bytes(zeros) + rest)
    kept = expected[: expected.rfind(b"\n", 0, cut) + 1]
    assert answer_all(model, path, output) == 2
    assert output.read_bytes().startswith(kept)
    assert same(output.read_bytes(), expected)


FOREIGN = [
    b"hello\n",
    b"hello",
    b"{}\n",
    b'{"id": "batch_req_1"}\n',
    b'{"id": "batch_abc',
    b"\x89PNG\0\0",
    b"\n",
    b"[" * 9,
]
# Others' answers have names of their own.
FOREIGN += [b'{"id": "batch_req_67a1b2c3d4e5f60718293a4b", "custom_id": "x", "response"', b'{"id": "batch_req_x']


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("before", [0, 3])
def test_a_file_of_anything_else_is_refused_and_left_as_it_is(content, before, run, twelve, output):
    assert run("batch", twelve, "-o", output, "-m", "MODEL")[0] == 0
    lines = output.read_bytes().splitlines(keepends=True)[:before]
    output.write_bytes(b"".join([*lines, content]))
    words = f"line {before + 1} is no answer of npgpt2 batch"
    assert failed(run("batch", twelve, "-o", output, "-m", "MODEL"), 1, str(output), words)
    assert output.read_bytes() == b"".join([*lines, content])


def test_answers_to_other_requests_are_refused_and_left_as_they_are(run, twelve, output):
    assert run("batch", twelve, "-o", output, "-m", "MODEL")[0] == 0
    before = output.read_bytes()
    lines = twelve.read_bytes().splitlines(keepends=True)
    twelve.write_bytes(b"".join(lines[1:]))  # of which the one with 1 token is answered last
    assert failed(run("batch", twelve, "-o", output, "-m", "MODEL"), 1, "answers none of the requests", "give another")
    twelve.write_bytes(b"".join(lines).replace(b"A language", b"The language"))
    assert failed(run("batch", twelve, "-o", output, "-m", "MODEL"), 1, "answers none of the requests", "give another")
    assert output.read_bytes() == before


def test_answers_of_another_model_are_refused_and_left_as_they_are(run, twelve, output, tmp_path, tiny):
    assert run("batch", twelve, "-o", output, "-m", "MODEL")[0] == 0
    before = output.read_bytes()
    assert failed(run("batch", twelve, "-o", output), 1, "was written by another model", "give another file")
    assert output.read_bytes() == before
    (tmp_path / "renamed.npz").write_bytes(tiny.read_bytes())
    assert run("batch", twelve, "-o", output, "-m", tmp_path / "renamed.npz")[0] == 0
    assert output.read_bytes() == before


def test_the_fingerprint_is_of_the_contents(tmp_path, tiny, fixtures):
    small = echo_model(tmp_path / "echo.npz").weights
    assert Weights(tiny).fingerprint() != small.fingerprint()
    (tmp_path / "copy.npz").write_bytes(tiny.read_bytes())
    assert Weights(tiny).fingerprint() == Weights(tmp_path / "copy.npz").fingerprint()
    assert len(small.fingerprint()) == 16


def test_answers_that_are_there_twice_are_refused(run, twelve, output):
    assert run("batch", twelve, "-o", output, "-m", "MODEL")[0] == 0
    output.write_bytes(2 * output.read_bytes())
    assert failed(run("batch", twelve, "-o", output, "-m", "MODEL"), 1, "answers a request twice")


def test_requests_that_were_added_are_answered_too(run, twelve, output):
    assert run("batch", twelve, "-o", output, "-m", "MODEL")[0] == 0
    before = output.read_bytes()
    twelve.write_bytes(twelve.read_bytes() + json.dumps(request("new")).encode())
    assert run("batch", twelve, "-o", output, "-m", "MODEL")[0] == 0
    assert output.read_bytes().startswith(before)
    assert len(texts(output)) == 13


# ---- Whatever ends a run

# Writes as often as it can, so that what ends it does so while it writes.
PROGRAM = """
import sys, npgpt2.serving.answers
npgpt2.serving.answers.STEP = {step}
from npgpt2.__main__ import main
sys.exit(main())
"""


def start(*arguments, step=0.0, **more):
    words = [sys.executable, "-c", PROGRAM.format(step=step), "batch", *map(str, arguments), "--threads", "1"]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **more)


@pytest.fixture(scope="module")
def many(tmp_path_factory, tiny):
    """Requests that take some seconds, and what a run writes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("many")
    requests = [request(f"r{i}", max_tokens=1 + i % 20, temperature=0, n=1 + i % 2) for i in range(1200)]
    path = write(folder / "requests.jsonl", requests)
    done = start(path, "-o", folder / "answers.jsonl", "-m", tiny)
    assert (*done.communicate(timeout=300), done.returncode)[1:] == ("", 0)
    return path, (folder / "answers.jsonl").read_bytes()


def begun(output, process, size=0):
    """Wait until more was written than there was, or all is done."""
    while process.poll() is None and not (output.exists() and output.stat().st_size > size):
        time.sleep(0.005)


def goes_on(path, output, tiny, expected):
    """Run again, to the end, which adds what is missing to what is there."""
    left = output.read_bytes()
    process = start(path, "-o", output, "-m", tiny)
    assert process.wait(timeout=300) == 0
    process.communicate()
    assert output.read_bytes().startswith(left)
    assert same(output.read_bytes(), expected)


def test_kills_at_random_moments_lose_no_line_and_repeat_none(many, output, tiny):
    """Thirty times, from the first moment on; then the run is let go on to its end. One that was faster begins anew."""
    path, expected = many
    moments, killed = random.Random(0), 0
    for i in itertools.count():
        assert i < 120
        last = killed == 30
        size = output.stat().st_size if output.exists() else 0
        process = start(path, "-o", output, "-m", tiny)
        try:
            if last:
                assert process.wait(timeout=300) == 0
            elif i % 5:
                begun(output, process, size)
                time.sleep(moments.random() * 0.1)
            else:  # while it is still reading
                time.sleep(moments.random())
        finally:
            process.kill()
            process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            assert same(output.read_bytes(), expected)
            if last:
                break
            output.unlink()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_ends_it_with_whole_lines_and_it_goes_on(many, output, tiny):
    path, expected = many
    process = start(path, "-o", output, "-m", tiny)
    begun(output, process)
    process.send_signal(signal.SIGINT)
    assert (*process.communicate(timeout=60), process.returncode) == ("", "", 130)
    left = output.read_bytes()
    assert left[-1:] in (b"\n", b"")
    assert left.count(b"\n") < 1200
    goes_on(path, output, tiny, expected)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of files' sizes")
def test_a_full_disk_ends_it_with_whole_lines_and_it_goes_on(many, output, tiny):
    import resource

    path, expected = many
    limit = len(expected) // 3
    process = start(
        path, "-o", output, "-m", tiny, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (1, f"npgpt2: {output}: File too large\n")
    left = output.read_bytes()
    assert left.endswith(b"\n")
    assert limit - 5000 < len(left) <= limit
    goes_on(path, output, tiny, expected)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no locks that npgpt2 uses")
def test_two_runs_do_not_write_one_file(run, twelve, output):
    with open(output, "ab") as file:
        assert lock(file)
        assert failed(run("batch", twelve, "-o", output, "-m", "MODEL"), 1, "is being written by another run")
    assert run("batch", twelve, "-o", output, "-m", "MODEL")[0] == 0


def test_answers_are_written_in_steps(model, twelve, output, monkeypatch):
    """The disk is waited for once a second, whatever comes, and at the end."""
    synced, now = [], [0.0]
    monkeypatch.setattr("npgpt2.serving.answers.monotonic", lambda: now[0])
    monkeypatch.setattr("os.fsync", lambda file: synced.append((now[0], output.read_bytes().count(b"\n"))))

    def slowly(lines, progress):
        for line in lines:
            now[0] += 0.3
            yield line, 200, {}

    requests = Requests(twelve, model, [], "")
    plan = check(requests)
    with Answers(output) as answers:
        wanted, _ = unanswered(plan, requests, answers)
        run_plan(plan, wanted, requests, answers, slowly, lambda *count: None)
    assert [(round(at, 1), lines) for at, lines in synced] == [(1.2, 4), (2.4, 8), (3.6, 12)]
