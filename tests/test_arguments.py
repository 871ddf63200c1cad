"""Every argument of the library, given a value of a type that it can't have: refused at the call, by its name.

Numbers of NumPy's are numbers, True and False are none.
"""

import re
from array import array
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from builders import VOCABULARY

import npgpt2
from npgpt2 import GPT2, Engine, HParams, Tokenizer
from npgpt2.convert import convert, fetch_checkpoint, remove_checkpoint, write_dataset
from npgpt2.engine import Limits, Settings
from npgpt2.sampling import Sampling
from npgpt2.weights import Weights

WHOLE = ["1", 1.0, np.float32(1), True, np.True_, Fraction(1), [1], np.array(1)]
NUMBER = ["1", 1j, True, np.True_, Fraction(1), [1], np.array(1.0), None]
FLAG = ["yes", 1, 0, 1.0, None, []]
PATH = [5, None, b"a", ["a"], True]
TEXTS = [None, 0, 1.5, b"abc", bytearray(b"abc"), memoryview(b"abc"), {"a": 1}, {1, 2}, True, np.array(1), iter([1])]
IDS = [[1.0], [True], [1, True], ["a"], [None], [1, "a"], [[1, 2], [3]], np.array([1.0]), np.array([True])]
FUNCTION = [3, "print", None]
UNKNOWN = object()

# By setting: values that are no such thing.
SETTINGS = {
    "length": [*WHOLE, None, float("nan")],
    "temperature": NUMBER,
    "top_k": [*WHOLE, None, float("nan")],
    "top_p": NUMBER,
    "min_p": NUMBER,
    "typical_p": NUMBER,
    "logit_bias": [5, "5=1", [(5, 1)], [5], {"5": 1}, {1.0: 1}, {True: 1}, {None: 1}]
    + [{5: value} for value in ("1", None, True, 1j, np.complex64(1), np.True_)],
    "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "no_repeat_ngram_size": [*WHOLE, None],
    "min_tokens": [*WHOLE, None],
    "seed": WHOLE,
    "sample": [*WHOLE, None],
    "stop": [None, 5, [5], b"x", [b"x"], [None], ["a", 5], True],
    "stop_tokens": [None, 5, "5", b"5", {5: 1}, ["5"], [5.0], [True], [None], [5, [5]]],
    "ignore_eot": FLAG,
    "allow_special": FLAG,
    "skip_special": [value for value in FLAG if value is not None],
    "guess": FLAG,
    "logprobs": WHOLE,
    "prompt_logprobs": WHOLE,
}
# What takes settings, and what else can be called, each with the argument that is asked for.
WITH_SETTINGS = {
    "generate": lambda model, **settings: model.generate("A", **settings),
    "generate of several": lambda model, **settings: model.generate(["A", "B"], **settings),
    "stream": lambda model, **settings: model.stream("A", **settings),
    "samples": lambda model, **settings: model.samples("A", **settings),
    "beam_search": lambda model, **settings: model.beam_search("A", **settings),
    "generate_tokens": lambda model, **settings: model.generate_tokens([1], **settings),
    "Engine.submit": lambda model, **settings: Engine(model).submit("A", **settings),
}
CALLS = [
    ("model", PATH, lambda model, value: npgpt2.load(value)),
    ("models_dir", [5, b"a", ["a"]], lambda model, value: npgpt2.load("124M", value)),
    ("threads", WHOLE, lambda model, value: npgpt2.load(threads=value)),
    ("draft", PATH[:1] + PATH[2:], lambda model, value: npgpt2.load(draft=value)),
    ("draft", [5, "a", True], lambda model, value: GPT2(model.weights, draft=value)),
    ("path", PATH, lambda model, value: Weights(value)),
    ("weights", [5, "a", [1]], lambda model, value: GPT2(value, model.hparams)),
    ("hparams", [5, (8, 8, 8, 2, 1), {}, {"n_ctx": 1}], lambda model, value: GPT2(model.weights, value)),
    ("tokenizer", [5, "a", VOCABULARY], lambda model, value: GPT2(model.weights, tokenizer=value)),
    ("threads", WHOLE, lambda model, value: GPT2(model.weights, threads=value)),
    ("model", [5, "storyteller", None], lambda model, value: Engine(value)),
    ("slots", [*WHOLE, None], lambda model, value: Engine(model, slots=value)),
    ("chunk", [*WHOLE, None], lambda model, value: Engine(model, chunk=value)),
    ("text", FLAG, lambda model, value: Engine(model, text=value)),
    ("request", [5, None, "a", []], lambda model, value: Engine(model).cancel(value)),
    *(("prompt", TEXTS, lambda model, value, call=call: call(model, value)) for call in [
        GPT2.generate, GPT2.stream, GPT2.samples, GPT2.beam_search, GPT2.next_logits, GPT2.prompt_tokens,
        lambda model, value: Engine(model).submit(value),
        lambda model, value: model.generate(["A", value]) if not isinstance(value, int) else model.generate(value),
    ]),
    *(("prompt", IDS, lambda model, value, call=call: call(model, value)) for call in [
        GPT2.stream, GPT2.samples, GPT2.beam_search, GPT2.next_logits, GPT2.prompt_tokens,
    ]),
    *(("tokens", [*TEXTS, "abc", *IDS], lambda model, value, call=call: call(model, value)) for call in [
        GPT2.generate_tokens, GPT2.logits, GPT2.trace,
    ]),
    ("attention", FLAG, lambda model, value: model.trace([1], attention=value)),
    ("residual", FLAG, lambda model, value: model.trace([1], residual=value)),
    ("nsamples", [*WHOLE, None], lambda model, value: model.samples("A", value)),
    ("batch_size", [*WHOLE, None], lambda model, value: model.samples("A", batch_size=value)),
    ("first", [*WHOLE, None], lambda model, value: model.samples("A", first=value)),
    ("progress", FUNCTION, lambda model, value: model.samples("A", progress=value)),
    ("best_of", [*WHOLE, None], lambda model, value: model.generate("A", best_of=value, temperature=1)),
    ("best_of", [*WHOLE, None], lambda model, value: model.samples("A", best_of=value, temperature=1)),
    ("beams", [*WHOLE, None], lambda model, value: model.beam_search("A", value)),
    ("length_penalty", NUMBER, lambda model, value: model.beam_search("A", length_penalty=value)),
    ("early_stopping", [1, 0, None, 1.0, []], lambda model, value: model.beam_search("A", early_stopping=value)),
    ("progress", FUNCTION, lambda model, value: model.beam_search("A", progress=value)),
    ("text", [None, 0, b"abc", {"a": 1}, [1], ["a", None], [b"a"]], lambda model, value: model.score(value)),
    ("stride", WHOLE, lambda model, value: model.score("A", stride=value)),
    ("each", FUNCTION, lambda model, value: model.score("A", each=value)),
    ("encoder_json", [5, None, "{}"], lambda model, value: Tokenizer(value, VOCABULARY[1])),
    ("vocab_bpe", [5, None, ""], lambda model, value: Tokenizer(VOCABULARY[0], value)),
    ("folder", PATH, lambda model, value: Tokenizer.load(value)),
    ("text", [None, 0, b"abc", ["a"]], lambda model, value: model.tokenizer.encode(value)),
    ("allow_special", FLAG, lambda model, value: model.tokenizer.encode("a", allow_special=value)),
    ("pieces", [None, 0, b"abc", {"a": 1}], lambda model, value: model.tokenizer.encode_pieces(value)),
    ("text", [[None], [b"a"], [1]], lambda model, value: list(model.tokenizer.encode_pieces(value))),
    *(("tokens", [5, None, "12", b"12", [1.0], [True], ["1"], [None], [[1]], np.array([1.0]), {1: 2}],
       lambda model, value, name=name: getattr(model.tokenizer, name)(value)) for name in ["decode", "decode_bytes"]),
    ("source", PATH, lambda model, value: convert(value)),
    ("output", [5, b"a"], lambda model, value: convert("a", value)),
    ("vocabulary", [5, b"a"], lambda model, value: convert("a", None, value)),
    ("n_head", WHOLE, lambda model, value: convert("a", n_head=value)),
    ("output", PATH, lambda model, value: write_dataset(value, ["a"], model.tokenizer)),
    ("patterns", [5, None, "a.txt", [5]], lambda model, value: write_dataset("a.npz", value, model.tokenizer)),
    ("tokenizer", [5, None, "124M"], lambda model, value: write_dataset("a.npz", ["a"], value)),
    ("combine", [*WHOLE, None], lambda model, value: write_dataset("a.npz", ["a"], model.tokenizer, value)),
    ("name", [5, None, b"124M", ["124M"]], lambda model, value: fetch_checkpoint(value, "a")),
    ("folder", PATH, lambda model, value: fetch_checkpoint("124M", value)),
    ("base_url", [5, None, b"http://a"], lambda model, value: fetch_checkpoint("124M", "a", value)),
    ("folder", PATH, lambda model, value: remove_checkpoint(value)),
]  # fmt: skip


def assert_refused(argument, call):
    """By a TypeError of our own, in one line that begins with the argument's name and says what is expected."""
    with pytest.raises(
        TypeError, match=rf"^(a piece of the )?{argument}( of shape .*| has .*| is .*), (where|which|whose) "
    ) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("call", WITH_SETTINGS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_another_type_are_refused_at_the_call(model, call, setting):
    for value in SETTINGS[setting]:
        if not (setting == "stop" and call == "generate_tokens"):
            assert_refused(setting, lambda value=value: WITH_SETTINGS[call](model, **{setting: value}))


def test_every_setting_is_in_the_table():
    assert set(SETTINGS) == set(Settings.__annotations__) | set(Sampling.__dataclass_fields__)
    assert set(SETTINGS) == set(Limits.__dataclass_fields__) | set(Sampling.__dataclass_fields__)


@pytest.mark.parametrize("number", range(len(CALLS)), ids=[f"{i} {argument}" for i, (argument, *_) in enumerate(CALLS)])
def test_arguments_of_another_type_are_refused_at_the_call(model, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argument, values, call = CALLS[number]
    for value in values:
        assert_refused(argument, lambda value=value: call(model, value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", float("nan")), ("temperature", 10**400), ("top_p", float("nan")), ("top_p", 10**400)],
)
def test_numbers_that_are_none_are_refused(model, setting, value):
    with pytest.raises(ValueError, match=f"^{setting} is "):
        model.stream("A", **{setting: value})


@pytest.mark.parametrize("call", WITH_SETTINGS)
def test_a_bias_of_a_token_that_there_is_not_is_refused_at_the_call(model, call):
    with pytest.raises(ValueError, match=r"^logit_bias has token 520, which is not in the vocabulary, from 0 to 519$"):
        WITH_SETTINGS[call](model, logit_bias={1: 2.0, 520: 1.0})


def test_types_that_convert_does_not_know_are_named():
    with pytest.raises(ValueError, match=r"^dtype is 'int4', where one of float32, float16, int8 is expected$"):
        convert("a", dtype="int4")


@pytest.mark.parametrize("whole", [int, np.int8, np.uint64])
@pytest.mark.parametrize("number", [float, np.float16, np.float32, np.float64, np.longdouble])
def test_numpys_numbers_are_numbers(model, whole, number):
    settings = {"length": 3, "top_k": 5, "seed": 1, "sample": 0, "logprobs": 1, "prompt_logprobs": 1}
    given = {name: whole(value) for name, value in settings.items()}
    expected = model.generate("A", temperature=0.5, top_p=0.75, **settings)
    assert model.generate("A", temperature=number(0.5), top_p=number(0.75), ignore_eot=np.False_, **given) == expected
    assert [*model.samples("A", whole(2), whole(2), length=whole(2))] == [model.generate("A", length=2)] * 2
    assert model.tokenizer.decode([whole(65), whole(66)]) == model.tokenizer.decode([65, 66])
    Engine(model, slots=whole(1), chunk=whole(8), text=np.True_)


def test_hparams_can_be_numpys_numbers(model):
    again = GPT2(model.weights, HParams(*map(np.int32, model.hparams)))
    assert again.hparams == model.hparams
    assert again.generate_tokens([1], length=3).tolist() == model.generate_tokens([1], length=3).tolist()
    with pytest.raises(ValueError, match=r"^n_layer is 2\.0, where a whole number of at least 1 is expected$"):
        GPT2(model.weights, model.hparams._replace(n_layer=2.0))


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda ids: array("i", ids), lambda ids: np.array(ids, np.uint8)]
)
def test_ids_come_in_any_kind_of_list(model, kind):
    expected = model.generate_tokens([1, 2], length=3)
    assert model.generate_tokens(kind([1, 2]), length=3).tolist() == expected.tolist()
    assert model.generate(kind([1, 2]), length=3) == model.generate([kind([1, 2])], length=3)[0]


def test_lists_of_lists_of_different_lengths_are_several_prompts(model):
    assert model.generate([[1, 2, 3], [4]], length=2) == [
        model.generate([1, 2, 3], length=2),
        model.generate([4], length=2),
    ]
    words = "tokens is [[1, 2, 3], [4]], whose lists differ in length; `generate` takes a list of prompts"
    with pytest.raises(TypeError, match=f"^{re.escape(words)}$"):
        model.generate_tokens([[1, 2, 3], [4]])


def test_paths_come_as_text_too(tiny, fixtures, tmp_path):
    assert Weights(str(tiny)).path == tiny
    assert convert(str(fixtures / "tiny"), str(tmp_path / "a.npz"), str(fixtures / "tiny")).path == tmp_path / "a.npz"
    (tmp_path / "text.txt").write_text("A language model")
    files, _ = write_dataset(str(tmp_path / "b.npz"), [tmp_path / "text.txt"], Tokenizer.load(str(fixtures / "tiny")))
    assert files == 1
    assert isinstance(tiny, Path)
