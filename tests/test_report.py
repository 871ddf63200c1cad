"""The page of `npgpt2 inspect` as a file: what it holds, how large it is, and that nothing in it is run or fetched.

What it shows, and does when it is used, is tested in a browser by tests/oracles/test_inspect.py.
"""

import json
import re
import zlib
from base64 import b64decode, b64encode
from hashlib import sha256
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

import npgpt2
from npgpt2 import formulas
from npgpt2.model import forward
from npgpt2.sampling import Sampling
from npgpt2.study import report
from npgpt2.study.report import EXACT, SHOWN, forward_steps, make_report
from npgpt2.study.trace import Trace

HOSTILE = """</script><img src=x onerror=alert(1)><!--<script>{{data}}{{policy}}\u2028'"`&lt;"""


def page_of(model, prompt):
    return make_report(
        model.trace(model.prompt_tokens(prompt), attention=True, residual=True), model.tokenizer, "a model"
    )


def data_of(page):
    """What the page's script reads, with its arrays unpacked."""
    (text,) = re.findall('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    for name, array in data["arrays"].items():
        numbers = np.frombuffer(zlib.decompress(b64decode(array["base64"])), array["type"])
        data["arrays"][name] = numbers.reshape(array["shape"])
    return data


@pytest.fixture(scope="module")
def prompt():
    return "A language model plays one small game, and it has no eyes — é."


@pytest.fixture(scope="module", params=["tiny", "storyteller"])
def any_model(request, model):
    return model if request.param == "tiny" else npgpt2.load()


@pytest.fixture(scope="module")
def trace(any_model, prompt):
    return any_model.trace(any_model.tokenizer.encode(prompt), attention=True, residual=True)


@pytest.fixture(scope="module")
def data(any_model, prompt):
    return data_of(page_of(any_model, prompt))


# ---- The numbers


def test_the_tokens_are_those_of_the_text_with_their_bytes(data, prompt, trace):
    assert data["arrays"]["tokens"].tolist() == trace.tokens.tolist()
    assert b"".join(data["texts"][str(token)].encode("latin-1") for token in trace.tokens) == prompt.encode()


def test_surprisal_is_that_of_score_and_ranks_count_the_likelier(data, any_model, trace):
    end = any_model.tokenizer.end_of_text
    logits = trace.logits.astype(np.float64)
    for t in range(1, len(trace.tokens)):
        others = np.delete(logits[t - 1], trace.tokens[t])
        assert data["arrays"]["ranks"][t] == 1 + (others > logits[t - 1, trace.tokens[t]]).sum()
    after_end = data_of(make_report(
        any_model.trace([end, *trace.tokens], attention=True, residual=True), any_model.tokenizer, "a model"
    ))  # fmt: skip
    bits = []
    any_model.score(any_model.tokenizer.decode(trace.tokens), each=lambda token, each: bits.append(each))
    np.testing.assert_allclose(after_end["arrays"]["bits"][1:], bits, rtol=1e-5, atol=1e-5)


def test_the_likeliest_tokens_and_their_logits_are_those_of_the_model(data, trace):
    arrays, V = data["arrays"], trace.logits.shape[1]
    order = np.argsort(-trace.logits, axis=1, kind="stable")
    np.testing.assert_array_equal(arrays["likeliest"], order[:, :SHOWN])
    np.testing.assert_array_equal(arrays["logits"], np.take_along_axis(trace.logits, order[:, :EXACT], axis=1))
    assert arrays["group_sizes"].sum() == V - min(EXACT, V)


def test_tokens_of_the_text_have_their_logits_and_their_places_at_all_positions_behind_them(data, trace):
    arrays, text = data["arrays"], trace.tokens.tolist()
    order = np.argsort(-trace.logits, axis=1, kind="stable").tolist()
    ends = np.cumsum([*[1] * arrays["logits"].shape[1], *arrays["group_sizes"]])  # of each entry, in ranks
    for t in range(len(text)):
        for s, token in enumerate(text):
            if s > t or s != text.index(token):
                assert (arrays["text_logits"][t, s], arrays["text_entries"][t, s]) == (0, 0)
            else:
                assert arrays["text_logits"][t, s] == trace.logits[t, token]
                assert arrays["text_entries"][t, s] == (ends <= order[t].index(token)).sum()
    assert len(set(text)) < len(text)


def test_attention_is_that_of_the_trace_up_to_what_the_page_says(data, trace):
    rounded = (data["arrays"]["attention"] / data["steps_of_attention"]) ** 2
    said = float(re.search(r"at most ([\d.]+) percentage points", " ".join(data["notes"]))[1]) / 100
    assert rounded.shape == trace.attention.shape
    assert np.abs(rounded - trace.attention).max() <= said <= 0.005


def test_the_lens_is_that_of_the_trace(data, trace):
    for layer in range(len(trace.residual)):
        logits = trace.lens(layer)
        np.testing.assert_array_equal(data["arrays"]["lens_tokens"][layer], logits.argmax(-1))
        probabilities = formulas.softmax(logits).max(-1)
        np.testing.assert_allclose(data["arrays"]["lens_probabilities"][layer], probabilities, rtol=1e-4)


# ---- What the page takes the rest of a distribution for


def mass_and_entropy(values, sizes, temperature):
    weights = np.exp((values.astype(np.float64) - values[0]) / temperature)
    p = weights / (sizes * weights).sum()
    return (sizes * weights).sum(), -(sizes * p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum()


def error_of(arrays, logits, temperature):
    """By how much the groups change the sum of a distribution, in parts of itself, and its entropy, in bits."""
    errors = []
    sizes = np.concatenate([np.ones(arrays["logits"].shape[1]), arrays["group_sizes"]])
    for t, row in enumerate(logits):
        mass, entropy = mass_and_entropy(np.append(arrays["logits"][t], arrays["groups"][t]), sizes, temperature)
        exact, exact_entropy = mass_and_entropy(-np.sort(-row), np.ones(len(row)), temperature)
        _, probabilities = Sampling(temperature).candidates(row)
        np.testing.assert_allclose(exact, 1 / probabilities.max(), rtol=1e-9)
        errors.append((abs(mass / exact - 1), abs(entropy - exact_entropy)))
    return np.max(errors, axis=0)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 0.7, 1.0, 1.7, 3.0])
def test_groups_change_percentages_and_entropy_by_next_to_nothing(data, trace, temperature):
    mass, entropy = error_of(data["arrays"], trace.logits, temperature)
    assert mass < 2e-4
    said = re.search(r"at most ([\d.]+) bits", " ".join(data["notes"]))
    assert entropy < 1.5 * float(said[1]) < 0.005


def synthetic(logits, tokenizer=None):
    """The report's arrays for logits that no model said. logits: (T, V)"""
    trace = Trace(np.zeros(len(logits), np.int64), logits.astype(np.float32), None, None, {})
    return report._distributions(trace)[0]


@pytest.mark.parametrize("shape", ["normal", "flat", "cliffs", "heavy tail"])
def test_groups_bound_the_error_for_any_distribution(shape):
    """A group goes from a rank to one a little further on, so that the worst it can do is to take a few tokens for more
    or less likely than they are: at most as many in a hundred as there are in it."""
    rng, V = np.random.default_rng(0), 50257
    logits = {
        "normal": lambda: rng.normal(0, 3, (4, V)),
        "flat": lambda: np.zeros((2, V)),
        "cliffs": lambda: np.where(np.arange(V) < rng.integers(201, V, (20, 1)), 0.0, -500.0),
        "heavy tail": lambda: 10 * rng.standard_cauchy((4, V)).clip(-100, 5),
    }[shape]()
    for temperature in (0.1, 1.0, 3.0):
        mass, entropy = error_of(synthetic(logits), logits.astype(np.float32), temperature)
        assert mass < {"normal": 2e-4, "flat": 1e-9}.get(shape, 0.03)
        assert entropy < {"normal": 1e-3, "flat": 1e-9}.get(shape, 0.05)


# ---- The shapes


@pytest.mark.parametrize("T", [1, 5])
def test_the_steps_are_those_that_the_forward_pass_takes(model, monkeypatch, T):
    """Kernels that are called, in this order, and what they return; a kernel of a kernel comes before it."""
    called = []

    def watched(name, kernel):
        def run(*args):
            result = kernel(*args)
            called.append((name, result.shape))
            return result

        return run

    names = ("layer_norm", "linear", "gelu", "causal_attention")
    monkeypatch.setattr(formulas, "softmax", watched("softmax", formulas.softmax))
    kernels = SimpleNamespace(**{name: watched(name, getattr(formulas, name)) for name in names})
    forward(model.weights, model.hparams, np.arange(T), kernels=kernels)
    sizes = model.hparams
    before, layer, after = forward_steps(
        sizes.n_layer, T, sizes.n_embd, sizes.n_head, sizes.n_embd // sizes.n_head, sizes.n_vocab
    )
    expected = [*layer * sizes.n_layer, *after]
    assert [name for name, _ in called] == [kernel for _, kernel, _ in expected]
    for (_, shape), (_, kernel, shapes) in zip(called, expected, strict=True):
        results = re.findall(r"\(([\d, ]+)\)", shapes)
        assert ", ".join(map(str, shape)) in (results[1:] if kernel == "linear" else results[-1:])
    assert before[0][1] == "embed"


def test_every_step_has_the_source_of_its_formula(data):
    kernels_named = {kernel for part in data["steps"] for _, kernel, _ in part}
    assert set(data["sources"]) == kernels_named
    for name, source in data["sources"].items():
        assert f"def {name}(" in source
        assert "share(" not in source, "it is the formula that is shown, and not what the machine runs"


# ---- The file


def test_the_page_of_256_tokens_is_under_5_mb_whatever_is_in_it(tokenizer_of_all, monkeypatch):
    """124M's sizes but for the width, with numbers that compress as badly as they can."""
    rng = np.random.default_rng(0)
    L, H, T, V = 12, 12, 256, 50257
    attention = np.tril(rng.gamma(0.5, size=(L, H, T, T)))
    attention = (attention / attention.sum(-1, keepdims=True)).astype(np.float32)
    logits = rng.normal(0, 3, (T, V)).astype(np.float32)
    monkeypatch.setattr(Trace, "lens", lambda trace, layer: np.roll(logits, layer, axis=1))
    residual = np.zeros((L, T, 768), np.float32)
    trace = Trace(rng.integers(0, V, T), logits, attention, residual, {})
    page = make_report(trace, tokenizer_of_all, "124M")
    assert len(page.encode()) < 5_000_000
    data = data_of(page)
    assert data["arrays"]["attention"].shape == (L, H, T, T)
    said = float(re.search(r"at most ([\d.]+) percentage points", " ".join(data["notes"]))[1]) / 100
    error = np.abs((data["arrays"]["attention"] / data["steps_of_attention"]) ** 2 - attention).max()
    assert error <= said


@pytest.fixture
def tokenizer_of_all():
    """A vocabulary of 50,257 tokens of eight bytes."""

    class Eight:
        def __contains__(self, token):
            return True

        def decode_bytes(self, tokens):
            return b"".join(b"%8d" % token for token in tokens)

    return Eight()


def test_more_heads_than_there_is_room_for_are_averaged_and_the_page_says_so(model, prompt, monkeypatch):
    monkeypatch.setattr(report, "ATTENTION_BYTES", 200)
    data = data_of(page_of(model, prompt))
    trace = model.trace(model.tokenizer.encode(prompt), attention=True)
    rounded = (data["arrays"]["attention"] / data["steps_of_attention"]) ** 2
    np.testing.assert_allclose(rounded, trace.attention.mean(1, keepdims=True), rtol=0, atol=0.004)
    assert "4 heads of each layer are shown as their average" in " ".join(data["notes"])


class Parsed(HTMLParser):
    """What a browser is asked to fetch or run: elements, their addresses, and scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.handlers, self.policy = [], [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "style"):
                self.addresses.append((tag, name, value))
            if name.startswith("on"):
                self.handlers.append((tag, name))
        if tag == "meta" and dict(attributes).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attributes)["content"]


@pytest.mark.parametrize("prompt", ["A language model", HOSTILE, ""])
def test_nothing_in_the_page_is_fetched_and_no_script_runs_but_its_own(model, prompt):
    page = page_of(model, prompt)
    parsed = Parsed(page)
    assert parsed.addresses == parsed.handlers == []
    assert parsed.tags.count("script") == 2
    assert not {"img", "iframe", "object", "link", "form"} & set(parsed.tags)
    assert "url(" not in page
    assert "@import" not in page
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in parsed.policy
    assert "default-src 'none'" in parsed.policy
    assert "unsafe" not in parsed.policy


def test_a_hostile_prompt_is_text_in_json_without_markup(model):
    page = page_of(model, HOSTILE)
    (text,) = re.findall('id="data">(.*?)</script>', page, re.DOTALL)
    assert "<" not in text
    assert text.isascii()
    data = data_of(page)
    shown = b"".join(data["texts"][str(token)].encode("latin-1") for token in data["arrays"]["tokens"])
    assert shown.decode() == HOSTILE
    assert make_report(model.trace([1], True, True), model.tokenizer, HOSTILE).count("onerror") == 1


def test_a_report_of_half_a_trace_says_what_is_missing(model):
    with pytest.raises(ValueError, match="attention=True, residual=True"):
        make_report(model.trace([1, 2], attention=True), model.tokenizer, "x")


def test_logits_that_are_not_numbers_are_refused(model):
    trace = model.trace([1, 2], attention=True, residual=True)
    trace.logits[0, 3] = np.nan
    with pytest.raises(ValueError, match="not a number"):
        make_report(trace, model.tokenizer, "x")
