"""Vocabularies in folders, special tokens in prompts, and where texts end, as the models' files say."""

import json
import shutil

import numpy as np
import pytest
from builders import random_arrays
from writers import hf_tensors, write_hugging_face

import npgpt2
from npgpt2 import GPT2, Engine, HParams, Tokenizer
from npgpt2.convert import convert
from npgpt2.vocabulary import AddedToken, AddedTokens, SpecialTokens, read_vocabulary
from npgpt2.weights import Weights
from npgpt2.weights.writer import write


def tokenizer_of(found, source="here"):
    return Tokenizer(found.encoder_json, found.vocab_bpe, source, found.special)


# ---- tokenizer.json


@pytest.fixture
def tokenizer_json(fixtures, tmp_path):
    """A function that writes hf's vocabulary as a `tokenizer.json`, with changes to its parts, and reads it."""
    vocab = json.loads((fixtures / "hf" / "vocab.json").read_text(encoding="utf-8"))
    lines = (fixtures / "hf" / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if not line.startswith("#version")]
    end = {"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "special": True, "normalized": False}

    def write(model=None, words=None, drop=(), replace=None, **changes):
        described = {
            "version": "1.0",
            "added_tokens": [end],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True} | (words or {}),
            "model": {"type": "BPE", "dropout": None, "vocab": vocab, "merges": merges} | (model or {}),
        } | changes
        for part in drop:
            del described["model"][part]
        described |= replace or {}
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(described), encoding="utf-8")
        return read_vocabulary(tmp_path)

    write.vocab, write.merges, write.end = vocab, merges, end
    return write


TEXTS = ["A language model", "Nobody told café 東京 🙂\n\n  ", "<|endoftext|>", ""]


@pytest.mark.parametrize("pairs", [False, True])
def test_a_tokenizer_json_is_the_same_vocabulary(pairs, tokenizer_json, fixtures):
    merges = [line.split(" ") if pairs else line for line in tokenizer_json.merges]
    found = tokenizer_of(tokenizer_json({"merges": merges}))
    expected = Tokenizer.load(fixtures / "hf")
    assert len(found) == len(expected)
    assert found.end_of_text == expected.end_of_text
    for text in TEXTS:
        assert found.encode(text) == expected.encode(text)
        assert found.encode(text, allow_special=True) == expected.encode(text, allow_special=True)


def test_added_tokens_join_the_vocabulary(tokenizer_json):
    vocab = {text: token for text, token in tokenizer_json.vocab.items() if text != "<|endoftext|>"}
    size = len(vocab)
    added = [{"id": size, "content": "<|endoftext|>"}, {"id": size + 1, "content": "two words é"}]
    found = tokenizer_of(tokenizer_json({"vocab": vocab}, added_tokens=added))
    assert len(found) == size + 2
    assert found.end_of_text == size
    assert found.decode([size, size + 1]) == "<|endoftext|>two words é"


def test_what_older_versions_leave_out(tokenizer_json):
    assert len(tokenizer_of(tokenizer_json(drop=["type", "dropout"], added_tokens=[]))) == len(tokenizer_json.vocab)


def test_half_a_surrogate_pair_makes_no_vocabulary(tokenizer_json):
    """What no UTF-8 can say reaches the tokenizer, whose errors say where it is."""
    for changes in (
        {"model": {"vocab": {"\ud800": 0, "<|endoftext|>": 1}}, "added_tokens": []},
        {"model": {"merges": ["\ud800 a"]}},
        {"model": {"merges": [["a", "\ud800"]]}},
    ):
        with pytest.raises(ValueError, match=r"here: (encoder\.json|vocab\.bpe)"):
            tokenizer_of(tokenizer_json(**changes))


def test_a_byte_level_bpe_is_asked_for(tokenizer_json):
    for model in (
        {"type": "WordPiece"}, {"type": "Unigram"}, {"type": None}, {"dropout": 0.1}, {"byte_fallback": True},
        {"ignore_merges": True}, {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}, {"type": [[]]},
    ):  # fmt: skip
        (name,) = model
        with pytest.raises(
            ValueError, match=rf"tokenizer\.json: model: {name} is .*not GPT-2's kind .*; npgpt2 convert --no-vocab"
        ):
            tokenizer_json(model)
    level = {"type": "ByteLevel", "add_prefix_space": False}
    assert len(tokenizer_of(tokenizer_json(words={"type": "Sequence", "pretokenizers": [level]}))) == 520
    for words in ({"type": "Whitespace"}, {"type": "Sequence"}, {"use_regex": False}):
        (name,) = words
        with pytest.raises(ValueError, match=rf"tokenizer\.json: pre_tokenizer: {name} is .*not GPT-2's kind"):
            tokenizer_json(words=words)
    with pytest.raises(ValueError, match=r"tokenizer\.json: normalizer is .*, where GPT-2 has none"):
        tokenizer_json(normalizer={"type": "NFC"})


@pytest.mark.parametrize("part", ["model", "pre_tokenizer"])
@pytest.mark.parametrize("value", [None, 1, "BPE", [], True])
def test_parts_that_are_missing_are_named(part, value, tokenizer_json):
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {part} is .*: not GPT-2's kind of vocabulary"):
        tokenizer_json(replace={part: value})


@pytest.mark.parametrize("vocab", [None, [], "x", 1, {"a": "0"}, {"a": 0.0}, {"a": True}, {"a": None}, {"a": [[]]}])
def test_a_vocab_that_is_none_is_refused(vocab, tokenizer_json):
    with pytest.raises(ValueError, match=r"tokenizer\.json: model has no vocab that numbers its tokens"):
        tokenizer_json({"vocab": vocab})


@pytest.mark.parametrize("value", [None, {}, "a b", 1])
def test_lists_that_are_none_are_refused(value, tokenizer_json):
    for name, changes in (("merges", {"model": {"merges": value}}), ("added_tokens", {"added_tokens": value})):
        with pytest.raises(ValueError, match=rf"tokenizer\.json: {name} is not a list"):
            tokenizer_json(**changes)


@pytest.mark.parametrize(
    "merge",
    [None, 1, "", "a", " ", "a ", " b", "a b c", "a  b", "a\nb c", "a b\n", [], ["a"], ["a", "b", "c"], ["a", 1],
     ["a", None], [["a"], "b"], ["a b", "c"], ["a", ""], ["a\n", "b"], ["a", "b\r"], {"a": "b"}, True, "a\xa0b c"],
)  # fmt: skip
def test_merges_that_are_none_are_refused(merge, tokenizer_json):
    with pytest.raises(ValueError, match=r"tokenizer\.json: merges has .*, where two tokens are expected"):
        tokenizer_json({"merges": [*tokenizer_json.merges, merge]})


@pytest.mark.parametrize(
    "entry",
    [
        None, 1, "x", [], {}, {"id": 1}, {"content": "x"}, {"id": "1", "content": "x"}, {"id": True, "content": "x"},
        {"id": 1.0, "content": "x"}, {"id": 600, "content": None}, {"id": 600, "content": ["x"]},
    ],
)  # fmt: skip
def test_added_tokens_that_are_none_are_refused(entry, tokenizer_json):
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: added_tokens has .*, where an id and a content are expected"
    ):
        tokenizer_json(added_tokens=[entry])


def test_a_token_of_two_numbers_is_refused(tokenizer_json):
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' has the number 520, where transformers would give it 519"):
        tokenizer_json(added_tokens=[tokenizer_json.end | {"id": 520}])


def test_a_tokenizer_json_stands_in_for_the_two_files(tokenizer_json, fixtures, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((fixtures / "hf" / name).read_bytes())
    tokenizer_json()
    converted = convert(tmp_path, tmp_path / "m.npz")
    assert converted.has_vocabulary
    assert npgpt2.load(converted.path).tokenizer.encode(TEXTS[0]) == Tokenizer.load(fixtures / "hf").encode(TEXTS[0])
    tokenizer_json(added_tokens=[tokenizer_json.end, {"id": 520, "content": "<pad>"}])
    with pytest.raises(ValueError, match="the added token '<pad>' is number 520, but the model has 520"):
        convert(tmp_path, tmp_path / "m.npz")


def test_of_two_vocabularies_that_differ_the_one_that_transformers_takes_counts(tokenizer_json, fixtures, tmp_path):
    tokenizer_json()
    shutil.copy(fixtures / "hf" / "merges.txt", tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer_json.vocab))
    assert read_vocabulary(tmp_path).notes == ()
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    found = read_vocabulary(tmp_path)
    assert len(tokenizer_of(found)) == 520
    assert "vocab.json differs from tokenizer.json" in found.notes[0]


# ---- Folders of earlier versions


@pytest.fixture
def folder(fixtures, tmp_path):
    """A function that writes a folder: hf's vocabulary in two files, and what else is given, as JSON by name."""

    def write_folder(vocab=None, n_vocab=None, **files):
        path = tmp_path / "folder"
        path.mkdir(exist_ok=True)
        entries = json.loads((fixtures / "hf" / "vocab.json").read_text(encoding="utf-8")) if vocab is None else vocab
        (path / "vocab.json").write_text(json.dumps(entries), encoding="utf-8")
        shutil.copy(fixtures / "hf" / "merges.txt", path)
        for name, content in files.items():
            (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        if n_vocab is not None:
            hparams = HParams(n_vocab, n_ctx=32, n_embd=8, n_head=2, n_layer=1)
            sizes = {"vocab_size": n_vocab, "n_positions": 32, "n_embd": 8, "n_head": 2, "n_layer": 1}
            write_hugging_face(path, hf_tensors(random_arrays(hparams)), sizes | files.get("config", {}))
        return path

    return write_folder


TWICE = {"__type": "AddedToken", "content": "x", "rstrip": True}
ADDED = {"<|pad|>": 520, "<|startoftext|>": 521}
NAMED = {"pad_token": "<|pad|>", "bos_token": "<|startoftext|>"}


def test_added_tokens_are_read(folder):
    path = folder(n_vocab=522, added_tokens=ADDED, special_tokens_map=NAMED)
    converted = convert(path)
    assert converted.has_vocabulary
    assert converted.notes == ()
    tokenizer = npgpt2.load(converted.path).tokenizer
    assert tokenizer.encode("<|startoftext|>A<|pad|>", allow_special=True) == [521, 32, 520]
    assert 521 not in tokenizer.encode("<|startoftext|>A")
    assert tokenizer.decode([521, 32, 520]) == "<|startoftext|>A<|pad|>"
    assert tokenizer.special_ids == {519, 520, 521}


def test_added_tokens_that_are_not_special_are_always_tokens(folder):
    tokenizer = Tokenizer.load(folder(added_tokens={"<verse>": 520}))
    assert tokenizer.encode("A<verse>A") == [32, 520, 32]
    assert list(tokenizer.encode_pieces(["A<ve", "rse>A"])) == [[32, 520, 32]]


def test_settings_with_their_tokens_count_before_older_files(folder):
    """As in transformers: added_tokens_decoder replaces added_tokens.json and special_tokens_map.json."""
    decoder = {
        "519": {"content": "<|endoftext|>", "special": True},
        "520": {"content": "</s>", "special": True, "lstrip": True},
    }
    path = folder(
        added_tokens={"<|pad|>": 520}, tokenizer_config={"eos_token": "</s>", "added_tokens_decoder": decoder}
    )
    found = read_vocabulary(path)
    assert [token.text for token in found.special.added] == ["<|endoftext|>", "</s>"]
    assert "added_tokens.json: has added tokens that differ" in found.notes[0]
    assert tokenizer_of(found).encode("A  </s>A", allow_special=True) == [32, 520, 32]


def test_a_number_that_transformers_would_not_give_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"'<\|pad\|>' has the number 530, where transformers would give it 520; npgpt2"
    ):
        read_vocabulary(folder(added_tokens={"<|pad|>": 530}))


def test_a_space_before_each_text(folder):
    tokenizer = Tokenizer.load(folder(tokenizer_config={"add_prefix_space": True}))
    plain = Tokenizer.load(folder(tokenizer_config={}))
    assert tokenizer.encode("world") == plain.encode(" world") == tokenizer.encode(" world")
    assert tokenizer.encode("a<|endoftext|>b", allow_special=True) == [*plain.encode(" a"), 519, *plain.encode(" b")]
    assert tokenizer.encode("") == []
    pieces = tokenizer.encode_pieces(["", "wor", "ld"])
    assert [token for piece in pieces for token in piece] == plain.encode(" world")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"add_bos_token": True}}, "add_bos_token is set in its tokenizer_config.json"),
        ({"tokenizer_config": {"add_eos_token": True}}, "add_eos_token is set"),
        (
            {"tokenizer_config": {"tokenizer_class": "BertTokenizer"}},
            "its tokenizer is a 'BertTokenizer'",
        ),
        ({"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}}, "its tokenizer is a 'PreTrainedToken"),
        ({"tokenizer_config": {"add_prefix_space": 1}}, "add_prefix_space is 1, not true or false"),
        ({"tokenizer_config": {"pad_token": 5}}, "has 5, where a token is expected"),
        ({"tokenizer_config": {"pad_token": {"content": "x"}}}, "has {'content': 'x'}, where a token is expected"),
        (
            {
                "tokenizer_config": {
                    "pad_token": "x",
                    "mask_token": {"__type": "AddedToken", "content": "x", "rstrip": True},
                }
            },
            "describes 'x' twice, in different ways",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": [1]}},
            r"added_tokens_decoder is .*, where an object",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"520": {"content": "x", "single_word": True}}}},
            "the added token 'x' is a single_word one",
        ),
    ],
)
def test_what_would_change_the_tokens_is_refused_by_name(files, message, folder):
    with pytest.raises(ValueError, match=message):
        read_vocabulary(folder(**files))


@pytest.mark.parametrize(
    "processor",
    [
        {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "RobertaProcessing"}]},
        {"type": "RobertaProcessing"},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {}}, {"Sequence": {}}]},
        {"type": "TemplateProcessing"},
        "x",
    ],
)
def test_processors_that_add_tokens_are_refused(processor, tokenizer_json):
    with pytest.raises(ValueError, match=r"post_processor .* adds tokens to each text"):
        tokenizer_json(post_processor=processor)


def test_processors_that_add_none_are_taken(tokenizer_json):
    plain = {"type": "ByteLevel"}
    template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}
    for processor in (plain, template, {"type": "Sequence", "processors": [plain, template]}):
        assert len(tokenizer_of(tokenizer_json(post_processor=processor))) == 520


@pytest.mark.parametrize(("name", "kind"), [("vocab.txt", "WordPiece"), ("spiece.model", "SentencePiece")])
def test_other_tokenizers_are_named(name, kind, folder, tmp_path):
    path = folder(n_vocab=600)
    for ours in ("vocab.json", "merges.txt"):
        (path / ours).unlink()
    (path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{name}: the vocabulary of another kind of tokenizer \\({kind}.*--no-vocab"):
        convert(path)
    model = npgpt2.load(convert(path, vocabulary=False).path)
    assert model.generate_tokens([1, 2, 3], length=4).shape == (4,)
    with pytest.raises(ValueError, match="has no vocabulary"):
        model.generate("x")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"additional_special_tokens": ["<x>"]}},
        {"tokenizer_config": {"image_token": "<x>"}},
        {"tokenizer_config": {"extra_special_tokens": {"i": "<x>"}}},
        {"tokenizer_config": {"model_specific_special_tokens": {"i": "<x>"}}},
        {"special_tokens_map": {"additional_special_tokens": ["<x>"]}},
    ],
)
def test_special_tokens_that_no_file_numbers_are_refused(files, folder):
    """What transformers makes of several depends on which it finds first."""
    with pytest.raises(ValueError, match="no file says the number of the special token '<x>'; save the tokenizer"):
        read_vocabulary(folder(**files))
    numbered = {"tokenizer_config": {}} | files
    numbered["tokenizer_config"] = numbered["tokenizer_config"] | {
        "added_tokens_decoder": {
            "519": {"content": "<|endoftext|>", "special": True},
            "520": {"content": "<x>", "special": True},
        }
    }
    assert tokenizer_of(read_vocabulary(folder(**numbered))).encode("<x>", allow_special=True) == [520]


def test_ordinary_tokens_within_a_special_one_are_text_as_it_is(folder):
    """As the tokenizers library has it: what it finds is dropped whole."""
    decoder = {
        "519": {"content": "<|endoftext|>", "special": True},
        "520": {"content": "ab", "normalized": False},
        "521": {"content": "abc", "special": True},
    }
    tokenizer = Tokenizer.load(folder(tokenizer_config={"added_tokens_decoder": decoder}))
    letters = Tokenizer.load(folder()).encode("abc")
    assert tokenizer.encode("abc", allow_special=True) == [521]
    assert tokenizer.encode("abcab") == [*letters, 520]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [64, 220, 520, 275, 520, 520, 287]),
        ({"rstrip": True}, [64, 220, 520, 65, 520, 520, 66]),
        ({"lstrip": True}, [64, 520, 275, 520, 520, 287]),
        ({"lstrip": True, "rstrip": True}, [64, 520, 65, 520, 66]),
    ],
)
def test_white_space_that_belongs_to_a_token(options, expected, folder):
    """What transformers gives: of two that are white space themselves, the first can take the other with it."""
    decoder = {
        "519": {"content": "<|endoftext|>", "special": True},
        "520": {"content": "\n", "special": True} | options,
    }
    tokenizer = Tokenizer.load(folder(tokenizer_config={"added_tokens_decoder": decoder}))
    assert tokenizer.encode("a \n b\n\n c", allow_special=True) == expected


def test_tokens_that_two_files_describe_otherwise_are_refused(folder, tokenizer_json, tmp_path):
    twice = {"520": {"content": "x"}, "521": {"content": "x"}}
    with pytest.raises(ValueError, match="added_tokens_decoder has a token twice"):
        read_vocabulary(folder(tokenizer_config={"added_tokens_decoder": twice}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"520": {"content": "x"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"tokenizer\.json and tokenizer_config\.json have other added tokens"):
        tokenizer_json()


def test_a_vocabulary_without_merges_says_what_is_missing(folder):
    path = folder()
    (path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has vocab.json, but neither merges\.txt nor tokenizer\.json"):
        read_vocabulary(path)


@pytest.mark.parametrize("tokens", [[AddedToken(i, f"<{i}>") for i in range(10_001)], [AddedToken(5, "x" * 100_001)]])
def test_more_added_tokens_than_can_be_searched_for_are_refused(tokens):
    with pytest.raises(
        ValueError, match=r"^vocabulary: has .* added tokens, where 10,000 of 100,000 characters in all are the most"
    ):
        AddedTokens(tokens)


# ---- Rows that no token has


def test_rows_without_a_token_are_never_drawn(folder):
    """They are made the likeliest by far, and still aren't drawn, while their logits are there for who asks."""
    path = folder(n_vocab=540, added_tokens=ADDED)
    converted = convert(path)
    assert converted.notes == ("18 of the model's 540 rows belong to no token, and are never drawn",)
    model = npgpt2.load(converted.path)
    assert model.special.unused == ((522, 540),)
    weights = {name: np.array(array) for name, array in model.weights.items()}
    weights["wte"][522:] = 100 * weights["ln_f/b"]
    model = GPT2(weights, model.hparams, model.tokenizer)
    assert model.logits([1, 2])[0].argmax() >= 522
    for settings in ({}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5}):
        for guess in (True, False):
            assert model.generate_tokens([1, 2], length=40, guess=guess, seed=1, **settings).max() < 522
    engine = Engine(model, slots=1)
    request = engine.submit([1, 2], length=3, logprobs=600)
    while engine.busy:
        engine.step()
    assert {token for token, _ in request.logprobs[0].top} == set(range(522))


def test_numbers_that_a_vocabulary_leaves_out_are_rows_without_a_token(folder, fixtures):
    vocab = json.loads((fixtures / "hf" / "vocab.json").read_text(encoding="utf-8"))
    vocab["<|endoftext|>"] = 530
    converted = convert(folder(vocab, n_vocab=531))
    model = npgpt2.load(converted.path)
    assert model.special.unused == ((519, 530),)
    assert model.drawable.tolist() == [*range(519), 530]
    with pytest.raises(ValueError, match="token 525 is not in the vocabulary, which leaves it out"):
        model.tokenizer.decode([525])


def test_special_tokens_beyond_the_rows_are_said_and_text(folder):
    converted = convert(folder(n_vocab=520, tokenizer_config={"pad_token": "<pad>"}))
    assert "the model has no row for '<pad>', number 520, which is text like any other then" in converted.notes[0]
    model = npgpt2.load(converted.path)
    assert model.prompt_tokens("<pad>", allow_special=True) == model.prompt_tokens("<pad>")
    tokenizer = Tokenizer.load(folder(tokenizer_config={"pad_token": "<pad>"}))
    with pytest.raises(ValueError, match="the prompt has '<pad>', token 520, for which the model has no row"):
        GPT2({**model.weights}, model.hparams, tokenizer).generate("<pad>", allow_special=True)


def test_a_model_without_a_row_for_the_end_of_text_needs_prompts(folder, fixtures):
    """As where a vocabulary was made without it, and transformers adds it on its own account."""
    vocab = json.loads((fixtures / "hf" / "vocab.json").read_text(encoding="utf-8"))
    del vocab["<|endoftext|>"]
    path = folder(vocab, n_vocab=519)
    converted = convert(path)
    model = npgpt2.load(converted.path)
    assert model.tokenizer.end_of_text is None
    assert model.score("A language model").tokens > 0
    own = GPT2({**model.weights}, model.hparams, Tokenizer.load(path))
    for one in (model, own):
        assert one.generate("A language model", length=2)
        with pytest.raises(ValueError, match=r"has no <.endoftext.>, so that a prompt is needed"):
            one.generate("")
        assert one.score("A language model").tokens > 0


def test_tokens_beyond_the_rows_that_a_text_could_hold_are_refused(folder):
    with pytest.raises(ValueError, match="the added token '<verse>' is number 520, but the model has 520"):
        convert(folder(n_vocab=520, added_tokens={"<verse>": 520}))
    with pytest.raises(ValueError, match="the vocabulary has 520 entries, but the model 519"):
        convert(folder(n_vocab=519))


# ---- What begins and ends a text


@pytest.mark.parametrize(
    ("files", "begin", "end"),
    [
        ({"config": {"bos_token_id": 3, "eos_token_id": 4}}, 3, (4,)),
        ({"config": {"eos_token_id": [4, 5]}}, None, (4, 5)),
        ({"config": {"eos_token_id": 4}, "generation_config": {"eos_token_id": [6]}}, None, (6,)),
        ({"config": {"eos_token_id": 4}, "generation_config": {"bos_token_id": 7}}, 7, (4,)),
        ({"config": {"eos_token_id": None}}, None, ()),
        ({"config": {"eos_token_id": 50256}}, None, None),  # left over from GPT-2, which has more tokens
        ({"config": {}}, None, None),
        ({"config": {"bos_token_id": 519, "eos_token_id": 519}}, None, None),  # <|endoftext|>, as without
    ],
)
def test_what_begins_and_ends_a_text_is_kept(files, begin, end, folder):
    model = npgpt2.load(convert(folder(n_vocab=520, **files)).path)
    assert (model.special.begin, model.special.end) == (begin, end)
    assert model.prompt_tokens("") == [519 if begin is None else begin]


def test_ids_that_are_none_are_refused(folder):
    with pytest.raises(ValueError, match="eos_token_id is '4', where a token id is expected"):
        convert(folder(n_vocab=520, config={"eos_token_id": "4"}))


@pytest.fixture
def repeating(folder):
    """A function that makes a model which says token 32 for ever, and ends texts as the files say."""

    def make(**files):
        model = npgpt2.load(convert(folder(n_vocab=522, added_tokens=ADDED, special_tokens_map=NAMED, **files)).path)
        weights = {name: np.zeros_like(array) for name, array in model.weights.items()}
        weights["ln_f/b"][0], weights["wte"][32, 0] = 1, 1
        special = model.special
        changed = GPT2(weights, model.hparams, model.tokenizer)
        changed.special = special
        return changed

    return make


def test_a_model_ends_with_its_own_token(repeating):
    model = repeating(config={"eos_token_id": [31, 32]})
    pieces = model.stream("B", length=5)
    assert "".join(pieces) == ""
    assert pieces.request.finish_reason == "end"
    assert pieces.request.tokens == [32]
    assert model.generate("B", length=5, skip_special=False) == "A"
    assert model.generate("B", length=5, ignore_eot=True) == "AAAAA"
    assert model.generate_tokens([33], length=5).tolist() == [32] * 5


def test_prompts_of_ids_stream_stop_and_end(repeating):
    model = repeating(config={"eos_token_id": 31})
    assert "".join(model.stream([33, 521], length=3)) == "AAA"
    assert model.generate([33], length=9, stop="AA") == ""
    assert list(model.samples([33], nsamples=2, length=2)) == ["AA", "AA"]
    assert repeating(config={"eos_token_id": 32}).generate([[33], [34]], length=3) == ["", ""]


def test_special_tokens_can_be_left_out_of_the_text(repeating):
    model = repeating(config={"eos_token_id": 31})
    model.weights["wte"][[32, 521]] = model.weights["wte"][[521, 32]]
    assert model.generate("B", length=2) == "<|startoftext|>" * 2
    assert model.generate("B", length=2, skip_special=True) == ""


def test_special_tokens_in_a_prompt_are_read_as_such_if_allowed(repeating):
    model = repeating()
    prompt = "B<|startoftext|>"
    assert model.prompt_tokens(prompt, allow_special=True) == [33, 521]
    assert len(model.prompt_tokens(prompt)) > 2
    assert model.tokenizer.find_special(prompt) == ["<|startoftext|>"]
    engine = Engine(model)
    assert engine.submit(prompt, allow_special=True).prompt == [33, 521]
    assert engine.submit(prompt).prompt == model.tokenizer.encode(prompt)


# ---- The model file


SPECIAL = SpecialTokens(
    (AddedToken(3, "<a>"), AddedToken(4, " b", special=False, lstrip=True, normalized=True)),
    (3, 4),
    begin=5,
    pad=6,
    prefix_space=True,
    unused=((7, 8), (10, 11)),
)


def test_what_a_model_file_keeps_comes_back(tmp_path):
    for special in (SPECIAL, SpecialTokens(), SpecialTokens(end=())):
        assert SpecialTokens.parse(special.to_json(), 11, "here") == special


def test_a_model_without_anything_special_has_the_file_that_it_always_had(fixtures, tmp_path):
    converted = convert(fixtures / "hf", tmp_path / "m.npz")
    assert Weights(converted.path).special is None
    with np.load(converted.path) as archive:
        assert "special_tokens.json" not in archive.files


def test_np_load_and_readers_of_two_files_are_not_disturbed(folder):
    """Whoever takes the two files alone finds a vocabulary of all rows that have a token."""
    path = convert(folder(n_vocab=522, added_tokens=ADDED, special_tokens_map=NAMED)).path
    with np.load(path) as archive:
        assert archive["wte"].shape == (522, 8)
        tokenizer = Tokenizer(archive["encoder.json"], archive["vocab.bpe"])
    assert len(tokenizer) == 522
    assert tokenizer.decode([520]) == "<|pad|>"


@pytest.mark.parametrize(
    "said",
    [
        b"[]", b"{", b'{"x": 1}', b'{"end": 5}', b'{"end": ["5"]}', b'{"end": [-1]}', b'{"begin": 1.0}',
        b'{"begin": true}', b'{"prefix_space": 1}', b'{"unused": [[3, 2]]}', b'{"unused": [[3, 12]]}',
        b'{"unused": [[3, 5], [4, 6]]}', b'{"unused": [[3]]}', b'{"unused": 3}', b'{"added": 3}', b'{"added": [3]}',
        b'{"added": [{"id": 3}]}', b'{"added": [{"id": 3, "text": ""}]}', b'{"added": [{"id": "3", "text": "x"}]}',
        b'{"added": [{"id": 3, "text": "x", "special": 1}]}', b'{"added": [{"id": 3, "text": "x", "y": 1}]}',
        b'{"pad": 99999999999}',
    ],
)  # fmt: skip
def test_a_model_file_that_says_nonsense_is_refused(said):
    with pytest.raises(ValueError, match=r"^here: special_tokens\.json"):
        SpecialTokens.parse(said, 11, "here: special_tokens.json")


def test_a_number_that_would_take_memory_is_refused(fixtures):
    encoder, merges = ((fixtures / "tiny" / name).read_bytes() for name in ("encoder.json", "vocab.bpe"))
    with pytest.raises(ValueError, match="the added token 'x' has the number 2147483647, of 520"):
        Tokenizer(encoder, merges, special=SpecialTokens((AddedToken(2**31 - 1, "x"),)))
    vocab = json.loads(encoder) | {"<far>": 10**9}
    with pytest.raises(ValueError, match="doesn't number its 521 tokens"):
        Tokenizer(json.dumps(vocab).encode(), merges, special=SpecialTokens())


def test_a_number_of_two_tokens_is_refused(fixtures):
    encoder, merges = ((fixtures / "tiny" / name).read_bytes() for name in ("encoder.json", "vocab.bpe"))
    with pytest.raises(ValueError, match="token 32 is b'A', and 'x' too"):
        Tokenizer(encoder, merges, special=SpecialTokens((AddedToken(32, "x"),)))


def test_a_vocabulary_that_contradicts_its_model_file_is_refused(fixtures, tmp_path):
    texts = tuple((fixtures / "tiny" / name).read_bytes() for name in ("encoder.json", "vocab.bpe"))
    hparams = HParams(530, 8, 8, 2, 1)
    for special in (None, SpecialTokens(unused=((521, 530),))):
        write(tmp_path / "m.npz", hparams, random_arrays(hparams).items(), texts, special=special)
        with pytest.raises(ValueError, match="the vocabulary has 520 entries, but n_vocab is 530"):
            npgpt2.load(tmp_path / "m.npz").generate("x")


# ---- The commands


def test_a_prompt_with_special_tokens_is_said_once(run, folder):
    path = convert(folder(n_vocab=522, added_tokens=ADDED, special_tokens_map=NAMED)).path
    _, _, error = run("generate", "-m", path, "A<|pad|>", "--length", 1)
    assert error == "npgpt2: <|pad|> in the prompt is read as text; --allow-special reads it as the token\n"
    assert run("generate", "-m", path, "A<|pad|>", "--length", 1, "--allow-special")[2] == ""
    _, _, error = run("interactive", "-m", path, "--length", 1, stdin=b"<|pad|>\n<|pad|>\n")
    assert error.count("read as text") == 1


def test_convert_and_info_say_what_was_found(run, folder, tmp_path):
    files = {"added_tokens": ADDED, "special_tokens_map": NAMED, "config": {"eos_token_id": 521, "pad_token_id": 520}}
    _, _, error = run("convert", folder(n_vocab=540, **files), "-o", tmp_path / "m.npz")
    assert error == "npgpt2: note: 18 of the model's 540 rows belong to no token, and are never drawn\n"
    _, info, _ = run("info", tmp_path / "m.npz")
    assert "unused rows 18, of no token\n" in info
    assert "added       <|pad|> (520), <|startoftext|> (521), <|endoftext|> (519)\n" in info
    assert "ends with   <|startoftext|> (521)\n" in info
    assert "padded with <|pad|> (520)\n" in info


def test_info_names_rows_without_a_token_by_number(run, folder, tmp_path):
    convert(folder(n_vocab=540, config={"pad_token_id": 530, "eos_token_id": [999, 519]}), tmp_path / "m.npz")
    status, info, _ = run("info", tmp_path / "m.npz")
    assert status == 0
    assert "padded with 530\n" in info


def test_convert_says_which_ids_the_model_does_not_have(folder):
    notes = convert(folder(n_vocab=520, config={"pad_token_id": 530, "eos_token_id": 50256})).notes
    assert [note.partition(": ")[2] for note in notes] == [
        "pad_token_id is 530, which the model of 520 rows doesn't have"
    ]


def test_convert_without_a_vocabulary(run, folder, tmp_path):
    assert run("convert", folder(n_vocab=540), "-o", tmp_path / "m.npz", "--no-vocab")[2] == ""
    assert Weights(tmp_path / "m.npz").vocabulary() is None
