"""What notebooks and consoles show of the library's objects: a line, and of a trace the page of `npgpt2 inspect`.

tests/oracles/test_notebook.py looks at a real notebook in a browser.
"""

import pickle
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from builders import random_arrays, random_model, write_model

import npgpt2
from npgpt2.model import HParams
from npgpt2.serving.protocol import parse_completion
from npgpt2.study.report import FRAMED, make_frame, make_report
from npgpt2.study.trace import Trace
from npgpt2.weights import Weights

HOSTILE = """</iframe><script>window.run = 1</script>" onload="window.run = 2" '&quot;&amp;quot;"""


# ---- Lines


def test_a_model_says_its_file_types_and_sizes(tiny, model):
    sizes = "n_vocab=520, n_ctx=192, n_embd=48, n_head=4, n_layer=2"
    assert repr(model) == f"<GPT2 of '{tiny}', float32: {sizes}>"
    assert repr(npgpt2.load(tiny, dtype="int8")) == f"<GPT2 of '{tiny}', float32 rounded to int8: {sizes}>"
    assert repr(npgpt2.GPT2(dict(model.weights), model.hparams)) == f"<GPT2 of arrays: {sizes}>"
    assert "float16: n_vocab=4096" in repr(npgpt2.load())


def test_a_models_line_looks_at_no_array(tiny, monkeypatch):
    def refuse(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Weights, "__getitem__", refuse)
    assert repr(npgpt2.load(tiny)).startswith("<GPT2 of ")

    class Unread(dict):
        __getitem__ = refuse

    hparams = HParams(n_vocab=11, n_ctx=5, n_embd=8, n_head=2, n_layer=2)
    assert repr(npgpt2.GPT2(Unread(random_arrays(hparams)), hparams)).startswith("<GPT2 of arrays: n_vocab=11")


def test_a_model_whose_file_is_gone_changed_or_damaged_has_a_line_all_the_same(tiny, tmp_path):
    path = tmp_path / "a\nmodel.npz"
    shutil.copy(tiny, path)
    model = npgpt2.load(path)
    line = repr(model)
    path.unlink()
    assert repr(model) == line
    assert "\n" not in line
    damaged = tmp_path / "damaged.npz"
    data = bytearray(tiny.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    model = npgpt2.load(damaged)
    with pytest.raises(ValueError, match="damaged"):
        model.logits([1])
    line = repr(model)
    damaged.write_bytes(b"something else")
    assert repr(model) == line


def test_what_continues_texts_says_how_far_it_is(model):
    engine = npgpt2.Engine(model, slots=1)
    request = engine.submit("A language model", length=4)
    other = engine.submit("A language model", length=4, logprobs=3)
    assert repr(engine) == "<Engine of 1 slots: 0 running, 2 waiting>"
    assert repr(request) == "<Request of 3 tokens: 0 more, '', running>"
    engine.step()
    assert repr(engine) == "<Engine of 1 slots: 1 running, 1 waiting>"
    assert repr(request) == "<Request of 3 tokens: 1 more, ' plays', running>"
    engine.cancel(other)
    while engine.busy:
        engine.step()
    assert repr(request) == "<Request of 3 tokens: 4 more, ' plays one small game', length>"
    assert repr(other) == "<Request of 3 tokens: 0 more, '', cancelled>"
    pieces = model.stream("A language model", length=2)
    assert "".join(pieces) == " plays one"
    assert repr(pieces) == "<Stream of <Request of 3 tokens: 2 more, ' plays one', length>>"


def test_lines_stay_short_whatever_they_are_of(model):
    engine = npgpt2.Engine(model)
    request = engine.submit("A language model. " * 100, length=100, logprobs=5, ignore_eot=True)
    events = []
    while engine.busy:
        events += engine.step()
    assert len(request.tokens) == 100
    completion = parse_completion({"prompt": [[1, 2, 3] * 30] * 50, "max_tokens": 7, "n": 2}, model)
    assert repr(completion) == "<Completion of 50 prompts: n=2, best_of=2, max_tokens=7>"
    trace = model.trace([10, 20, 30], attention=True)
    assert repr(trace) == "<Trace of 3 tokens: logits (3, 520), attention (2, 4, 3, 3)>"
    for thing in (engine, request, events[-1], completion, trace):
        assert len(repr(thing)) < 200
        assert "\n" not in repr(thing)


# ---- A trace in a notebook


class Elements(HTMLParser):
    """The elements of a piece of HTML with their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("prompt", ["A language model plays one small game", HOSTILE])
def test_a_trace_is_shown_as_the_page_in_a_frame_and_nothing_else(model, tiny, prompt):
    trace = model.trace(model.tokenizer.encode(prompt), attention=True, residual=True)
    shown = Elements(trace._repr_html_())
    ((tag, attributes),) = shown.found
    assert (tag, shown.text) == ("iframe", "")
    assert set(attributes) == {"sandbox", "title", "style", "srcdoc"}
    assert attributes["sandbox"] == "allow-scripts", "without allow-same-origin, it has an origin of its own"
    assert attributes["srcdoc"] == make_report(trace, model.tokenizer, tiny.stem)


def told(trace):
    """What is said of a trace that can't be shown."""
    shown = Elements(trace._repr_html_())
    assert {tag for tag, _ in shown.found} == {"p", "code"}
    assert shown.text.startswith(repr(trace))
    return shown.text.removeprefix(repr(trace))


def test_a_trace_that_lacks_something_says_what_to_ask_for(model):
    for asked in ({}, {"attention": True}, {"residual": True}):
        assert "trace(tokens, attention=True, residual=True)" in told(model.trace([1, 2, 3], **asked))


def test_longer_texts_are_not_put_into_notebooks():
    hparams = HParams(n_vocab=11, n_ctx=FRAMED + 1, n_embd=8, n_head=2, n_layer=2)
    trace = random_model(hparams).trace([1] * (FRAMED + 1), attention=True, residual=True)
    assert told(trace) == "257 tokens are more than the 256 that are shown here; npgpt2 inspect shows more"


def test_what_has_no_vocabulary_says_so(tmp_path, model):
    asked = {"attention": True, "residual": True}
    without = npgpt2.load(write_model(tmp_path / "without.npz")).trace([1, 2], **asked)
    assert "without.npz: has no vocabulary; convert it again with --vocab DIR" in told(without)
    assert "the model: has no vocabulary" in told(npgpt2.GPT2(dict(model.weights), model.hparams).trace([1], **asked))
    trace = model.trace([1, 2], **asked)
    alone = Trace(trace.tokens, trace.logits, trace.attention, trace.residual, trace.matrices)
    assert told(alone) == "a trace without its model can't be shown, since the vocabulary is missing; use GPT2.trace"


def test_logits_that_are_no_numbers_are_said(model):
    trace = model.trace([1, 2], attention=True, residual=True)
    trace.logits[1, 5] = np.nan
    assert "a logit that is not a number" in told(trace)


def test_what_is_shown_is_a_little_larger_than_the_page_alone():
    model = npgpt2.load()
    text = "There was once a King who had an illness, and nobody believed that he would come out of it. " * 20
    trace = model.trace(model.tokenizer.encode(text)[:FRAMED], attention=True, residual=True)
    page = make_report(trace, model.tokenizer, "storyteller")
    assert len(page) < len(make_frame(trace)) < 1.05 * len(page) < 5_000_000


def test_a_pickled_trace_is_shown_as_before(model):
    trace = model.trace([1, 2, 3], attention=True, residual=True)
    assert pickle.loads(pickle.dumps(trace))._repr_html_() == trace._repr_html_()
