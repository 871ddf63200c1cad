"""Byte pair encoding: the plain tokenizer against recorded tokens and the algorithm as it was published, the fast one
against the plain one, and what both promise."""

import copy
import json
import pickle
import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

import npgpt2
from npgpt2 import tokenizer as plain
from npgpt2.engine.text import TextStream
from npgpt2.kernels import tokenizer as fast
from npgpt2.kernels.tokenizer import (
    ASCII_WORDS,
    CACHED_LENGTH,
    CACHED_WORDS,
    Tokenizer,
    _Cache,
    merge_in_order,
    merge_long,
)
from npgpt2.tokenizer import BYTE_CHARACTERS, WORDS


@pytest.fixture(scope="session")
def tiny_tokenizers(fixtures):
    """The plain one and the fast one."""
    return plain.Tokenizer.load(fixtures / "tiny"), Tokenizer.load(fixtures / "tiny")


@pytest.fixture(scope="session")
def gpt2_tokenizers(shared):
    """The same with GPT-2's vocabulary."""
    return plain.Tokenizer.load(shared / "gpt2-vocab"), Tokenizer.load(shared / "gpt2-vocab")


@pytest.fixture(scope="session", params=[0, 1], ids=["plain", "fast"])
def tokenizer(request, tiny_tokenizers):
    return tiny_tokenizers[request.param]


@pytest.fixture(scope="session")
def fast_tokenizer(tiny_tokenizers):
    return tiny_tokenizers[1]


def test_what_users_get_is_the_fast_one(model):
    assert npgpt2.Tokenizer is Tokenizer
    assert type(model.tokenizer) is Tokenizer


def test_no_text_reaches_the_plain_loop(model, run, fixtures, tmp_path, monkeypatch):
    """It takes n² steps for a word of n letters, and texts can come from anyone."""

    def refuse(*_):
        raise AssertionError("the plain loop")

    monkeypatch.setattr(plain, "merge", refuse)
    text, file = "a" * 1000 + " word é 東京", tmp_path / "text.txt"
    file.write_text(text, "utf-8")
    for source in (["-m", "MODEL"], ["--vocab", fixtures / "tiny"]):
        assert run("encode", text, *source)[0] == 0
        assert run("encode", file, *source, "-o", tmp_path / "text.npz")[0] == 0
    assert run("score", file, "-m", "MODEL")[0] == 0
    assert run("generate", text, "-m", "MODEL", "--length", 1)[0] == 0
    assert model.prompt_tokens(text)


# Tokens that tiktoken's gpt2 gives; tests/oracles compares many more.
TIKTOKEN = {
    "": [],
    "Alan Turing theorized that": [36235, 39141, 18765, 1143, 326],
    "Hello, world!  It's 3.14159\n\n\ttabs": [
        15496,
        11,
        995,
        0,
        220,
        632,
        338,
        513,
        13,
        1415,
        19707,
        628,
        197,
        8658,
        82,
    ],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
    "naïve 東京 🙂": [2616, 38776, 10545, 251, 109, 12859, 105, 32485],
}


@pytest.mark.parametrize("text", TIKTOKEN)
def test_tokens_equal_tiktokens(gpt2_tokenizers, text):
    for tokenizer in gpt2_tokenizers:
        assert tokenizer.encode(text) == TIKTOKEN[text]


def published_merge(word, merges):
    """Algorithm 1 of Sennrich et al. 2016, on text: a symbol is what stands between spaces.

    word: str · merges: pairs of symbols, in order; of two the same, the last counts → list of symbols.
    """
    merges = list(dict.fromkeys(merges[::-1]))[::-1]
    line = " ".join(word)
    while present := [pair for pair in merges if f" {' '.join(pair)} " in f" {line} "]:
        bigram = re.escape(" ".join(present[0]))
        line = re.sub(rf"(?<!\S){bigram}(?!\S)", lambda _, pair=present[0]: "".join(pair), line)
    return line.split(" ")


@pytest.fixture(scope="session")
def tiny_ids(fixtures):
    return json.loads((fixtures / "tiny" / "encoder.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def tiny_merges(fixtures):
    lines = (fixtures / "tiny" / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
    return [tuple(line.split(" ")) for line in lines]


UNICODE = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aeghnort ',.\n"))
TEXT = st.text(UNICODE, max_size=60)


@given(TEXT)
def test_text_is_merged_as_published(tokenizer, tiny_ids, tiny_merges, text):
    words = ["".join(BYTE_CHARACTERS[byte] for byte in word.encode("utf-8")) for word in WORDS.findall(text)]
    assert tokenizer.encode(text) == [tiny_ids[part] for word in words for part in published_merge(word, tiny_merges)]


PIECES = st.lists(st.text(st.one_of(UNICODE, st.characters(categories=["Cs"]), st.sampled_from("a1é ")), max_size=20))


def check_they_agree(one, other, pieces):
    text = "".join(pieces) + "<|endoftext|>" + "".join(reversed(pieces))
    for special in (False, True):
        assert one.encode(text, special) == other.encode(text, special)
    assert list(one.encode_pieces(pieces)) == list(other.encode_pieces(pieces))


@given(PIECES)
def test_the_fast_one_gives_the_plain_ones_tokens(tiny_tokenizers, pieces):
    check_they_agree(*tiny_tokenizers, pieces)


@given(PIECES)
def test_the_fast_one_gives_the_plain_ones_tokens_with_gpt2s_vocabulary(gpt2_tokenizers, pieces):
    check_they_agree(*gpt2_tokenizers, pieces)


ASCII = st.text(st.one_of(st.characters(max_codepoint=127), st.sampled_from(" '\n\x1c" + "strevldm0a.")), max_size=40)


@given(ASCII)
def test_words_of_ascii_are_found_as_others_are(text):
    assert ASCII_WORDS.findall(text) == WORDS.findall(text)


def test_words_of_ascii_around_every_character():
    for character in map(chr, range(128)):
        for before, after in product(["", " ", "\n", "'", "a", "0", "."], repeat=2):
            text = before + character + after
            assert ASCII_WORDS.findall(text) == WORDS.findall(text), text


@given(st.text(st.sampled_from(" \n\t'aérs0.\u3000"), max_size=40), st.integers(1, 10))
def test_splitting_in_blocks_changes_no_word(fast_tokenizer, text, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "BLOCK", block)
        assert list(fast_tokenizer._split(text)) == WORDS.findall(text)


def check_merging(merges, made, word):
    """A word is merged as published, where tokens of single bytes come first, then those `made`, in order."""
    symbols = list(dict.fromkeys([*BYTE_CHARACTERS, *made]))
    files = (
        json.dumps({symbol: i for i, symbol in enumerate(symbols)}).encode(),
        ("#version: 0.2\n" + "\n".join(map(" ".join, merges))).encode(),
    )
    expected = [symbols.index(part) for part in published_merge(word, merges)]
    assert plain.Tokenizer(*files).encode(word) == expected
    tokenizer = Tokenizer(*files)
    assert tokenizer.encode(word) == expected
    letters = [symbols.index(letter) for letter in word]
    assert merge_long(letters, tokenizer._ranks, tokenizer._made) == expected
    if tokenizer._in_order:
        assert merge_in_order(letters, tokenizer._ranks, tokenizer._made) == expected


PAIRS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=20)


@given(PAIRS, st.booleans(), st.booleans(), st.randoms(use_true_random=False), st.text("ab", min_size=1, max_size=40))
def test_words_merge_as_published_whatever_the_list(pairs, shuffle_merges, shuffle_ids, random, word):
    symbols, merges = ["a", "b"], []
    for left, right in pairs:
        merges.append((symbols[left % len(symbols)], symbols[right % len(symbols)]))
        symbols.append("".join(merges[-1]))
    if shuffle_merges:
        random.shuffle(merges)  # so that tokens can come before their parts
    if shuffle_ids:
        random.shuffle(symbols)
    check_merging(merges, symbols, word)


@pytest.mark.parametrize(
    ("merges", "made", "word"),
    [
        ("b a, aa a, a a", ["ba", "aaa", "aa"], "baaaaaa"),
        ("bb b, b b, a a, b aa", ["bb", "bbb", "aa", "baa"], "babbabbbbbbb"),
        ("a b, b c, a b", ["ab", "bc"], "abc"),
        ("a a, b b, aa bb", ["aa", "bb", "aabb"], "aabb"),
    ],
    ids=["a token before its parts", "ids that don't rise", "the same merge twice", "two tokens from two each"],
)
def test_chosen_lists_merge_as_published(merges, made, word):
    check_merging([tuple(merge.split()) for merge in merges.split(", ")], made, word)


def test_real_vocabularies_are_in_order(gpt2_tokenizers, fast_tokenizer):
    """So that the faster way is taken."""
    assert gpt2_tokenizers[1]._in_order
    assert fast_tokenizer._in_order


def test_two_merges_that_make_the_same_token_apply_as_published():
    """`abc` can be made of a+bc and of ab+c; the pair abc+d comes between the two in the list."""
    merges = [("b", "c"), ("a", "bc"), ("abc", "d"), ("a", "b"), ("ab", "c")]
    for word in ("abcd", "abcabcd", "aabbccdd", "abcdabc"):
        check_merging(merges, ["bc", "abc", "abcd", "ab"], word)


@given(TEXT)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_halves_of_surrogate_pairs_are_joined_or_replaced(tokenizer):
    assert tokenizer.encode("a\ud83d\ude42b") == tokenizer.encode("a\U0001f642b")
    assert tokenizer.encode("a\ud83db") == tokenizer.encode("a\ufffdb")


def test_end_of_text_is_text_unless_special_tokens_are_allowed(tokenizer):
    text = "one<|endoftext|>two<|endoftext|>"
    assert tokenizer.end_of_text not in tokenizer.encode(text)
    tokens = tokenizer.encode(text, allow_special=True)
    end = tokenizer.end_of_text
    assert tokens == [*tokenizer.encode("one"), end, *tokenizer.encode("two"), end]
    assert tokenizer.decode(tokens) == text


def test_a_vocabulary_without_end_of_text_takes_it_as_text():
    tokenizer = byte_tokenizer()
    assert tokenizer.end_of_text is None
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>", allow_special=True)) == "<|endoftext|>"


def byte_tokenizer(merges=b"", **changes):
    ids = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)} | changes
    return Tokenizer(json.dumps(ids).encode(), merges)


@pytest.mark.parametrize("word", ["a" * 100_000, "abcdefghij" * 10_000, " " * 100_000, "é" * 50_000])
def test_words_of_100_kb_take_a_bounded_number_of_steps(fast_tokenizer, word, monkeypatch):
    """The plain one would need hours here. What is counted is how often pairs are looked up."""
    monkeypatch.setattr(fast, "merge_in_order", None)  # which looks at all ranks in each step

    class Counting(dict):
        lookups = 0

        def get(self, key, default=None):
            Counting.lookups += 1
            return super().get(key, default)

    counting = copy.copy(fast_tokenizer)
    counting._ranks = Counting(fast_tokenizer._ranks)
    counting._cache = _Cache(counting._encode_word)
    assert counting.decode(counting.encode(word)) == word
    assert 99_999 <= Counting.lookups < 6 * 100_000


def test_a_single_word_in_many_pieces_is_split_a_few_times(fast_tokenizer):
    """Only when it has doubled: otherwise 1,000 pieces would be looked at in 1,000 steps, 500 on average in each."""
    looked_at, counting = [], copy.copy(fast_tokenizer)
    counting._split = lambda text: (looked_at.append(len(text)), fast_tokenizer._split(text))[1]
    assert [token for tokens in counting.encode_pieces(["a" * 100] * 1000) for token in tokens]
    assert 100_000 <= sum(looked_at) < 6 * 100_000


def test_the_cache_of_words_is_bounded(fast_tokenizer, monkeypatch):
    monkeypatch.setattr(fast, "CACHED_WORDS", 10)
    fresh = copy.copy(fast_tokenizer)
    fresh._cache = _Cache(fresh._encode_word)
    for number in range(100):
        fresh.encode(f" word {number}" + "x" * CACHED_LENGTH + f" {number}" + "y" * (CACHED_LENGTH + 1))
        assert 0 < len(fresh._cache) <= 10
        assert all(len(word) <= CACHED_LENGTH for word in fresh._cache)
    assert CACHED_WORDS * CACHED_LENGTH < 2**22


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_a_copy_encodes_as_the_original_does(tokenizer, copied):
    """What it keeps of words that it has seen leads to the copy, not to the original."""
    tokenizer.encode("A language model")
    other = copied(tokenizer)
    assert type(other) is type(tokenizer)
    assert other.encode("A language model plays") == tokenizer.encode("A language model plays")
    if isinstance(other, Tokenizer):
        assert other._cache._encode.__self__ is other
        assert "A" in other._cache


def test_decoding_replaces_what_is_not_utf8(tokenizer):
    first, second = tokenizer.encode("é")[0], tokenizer.encode("x")[0]
    assert tokenizer.decode([byte_id(tokenizer, 0xC3), second]) == "\ufffdx"
    assert tokenizer.decode([byte_id(tokenizer, 0xFF)]) == "\ufffd"
    assert first != second


def byte_id(tokenizer, byte):
    return tokenizer._byte_ids[byte]


@pytest.mark.parametrize("token", [-1, 520, 10**30])
def test_decoding_refuses_tokens_that_are_not_in_the_vocabulary(tokenizer, token):
    with pytest.raises(ValueError, match=f"token {token} is not in the vocabulary, which goes from 0 to 519"):
        tokenizer.decode([5, token])


@given(st.lists(st.integers(0, 519), max_size=30))
def test_streaming_gives_what_decoding_gives(tokenizer, tokens):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(tokens)


def test_streaming_never_gives_half_a_character():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in tokenizer.encode("aé🙂")] == ["a", "", "é", "", "", "", "🙂"]
    assert [stream.push(0xC3), stream.finish()] == ["", "\ufffd"] or byte_id(tokenizer, 0xC3) != 0xC3


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_end_the_text_wherever_tokens_are_cut(text, stops, data):
    """Whatever the pieces, the result is the text up to the stop string that is complete first."""
    tokenizer = byte_tokenizer(b"a b\nb a\n", ab=256, ba=257)
    tokens = []
    rest = text
    while rest:
        size = data.draw(st.sampled_from([1, 2])) if rest[:2] in ("ab", "ba") else 1
        tokens.append({"ab": 256, "ba": 257}.get(rest[:size]) or tokenizer.encode(rest[0])[0])
        rest = rest[size:]
    stream, pieces = TextStream(tokenizer, stops), []
    for token in tokens:
        pieces.append(stream.push(token))
        assert not any(stop in "".join(pieces) for stop in stops)
        if stream.done:
            break
    pieces.append(stream.finish())
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert "".join(pieces) == (text[: min(ends)[1]] if ends else text)
    assert stream.done == bool(ends)


def test_text_is_not_held_back_for_longer_than_a_stop_string_can_begin_with_it():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ["\nUser:"])
    assert [stream.push(token) for token in tokenizer.encode("a\nUx\n")] == ["a", "", "", "\nUx", ""]
    assert stream.finish() == "\n"


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_both_names_of_the_vocabulary_files_are_known(fixtures, tmp_path, names):
    for name, original in zip(names, ("encoder.json", "vocab.bpe"), strict=True):
        (tmp_path / name).write_bytes((fixtures / "tiny" / original).read_bytes())
    assert len(Tokenizer.load(str(tmp_path))) == 520


def test_a_merges_file_without_its_first_or_last_line_break_means_the_same(fixtures):
    encoder, merges = ((fixtures / "tiny" / name).read_bytes() for name in ("encoder.json", "vocab.bpe"))
    text = (fixtures / "passage.txt").read_text("utf-8")
    expected = Tokenizer(encoder, merges).encode(text)
    for variant in (merges.split(b"\n", 1)[1], merges.rstrip(b"\n"), merges.replace(b"\n", b"\r\n")):
        assert Tokenizer(encoder, variant).encode(text) == expected


def test_a_folder_without_a_vocabulary_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no vocabulary"):
        Tokenizer.load(tmp_path)


def test_one_vocabulary_file_without_the_other_is_named(fixtures, tmp_path):
    (tmp_path / "encoder.json").write_bytes((fixtures / "tiny" / "encoder.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"vocab\.bpe"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("encoder", "merges", "message"),
    [
        (b"<html>", b"", "not valid JSON"),
        (b"[1]", b"", "JSON list"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": 1}', b"", "from 0 to 0"),
        (b'{"a": true}', b"", "from 0 to 0"),
        (b'{"a": "0"}', b"", "from 0 to 0"),
        (b'{"a": 0}', b"", "the sign of a single byte"),
        ('{"東": 0}'.encode(), b"", "doesn't stand for bytes"),
        (None, b"a bc\n", "line 1: 'bc' is not in encoder.json"),
        (None, b"#version: 0.2\na b\n", "line 2: 'ab' is not in encoder.json"),
        (None, b"\xff\n", "not UTF-8 at byte 0"),
    ],
)
def test_vocabularies_that_are_damaged_or_do_not_belong_together_are_refused(encoder, merges, message):
    if encoder is None:
        encoder = json.dumps({character: byte for byte, character in enumerate(BYTE_CHARACTERS)}).encode()
    with pytest.raises(ValueError, match=message):
        Tokenizer(encoder, merges, source="folder")
