"""npgpt2's tokenizer against tiktoken, which is OpenAI's own, and against Hugging Face's `tokenizers`.

Both are compared on the same vocabulary files: the fixture's small vocabulary always, GPT-2's where it is at hand.
tiktoken numbers merges by the tokens that they make, so that it can't represent a vocabulary in which two merges make
one token; `tokenizers` can, and stands alone for those.

npgpt2 has two tokenizers, the plain one and the fast one that users get. Both are compared, but for texts that would
take the plain one minutes.
"""

from __future__ import annotations

import json
import lzma
import random
from types import SimpleNamespace

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

import npgpt2.tokenizer
from npgpt2 import Tokenizer

PLAIN = npgpt2.tokenizer.Tokenizer
END = "<|endoftext|>"

# What the pattern that splits text into words treats each in its own way.
PIECES = [
    *["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'", "’s", "don't", "I'm", "''", END, "<|", "|>"],
    *[" ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\xa0", "\u2003", "\u3000", "\u2028", "\x85", "\u200b", "\x1c"],
    *["a", "B", "ß", "e\u0301", "\u0301", "東京", "ไทย", "नमस्ते", "ا", "1", "42", "²", "½", "Ⅷ", "٣", "५", "𝟛", "㊈"],
    *[
        "!",
        "...",
        "--",
        "_",
        "🙂",
        "👩\u200d👩\u200d👧",
        "🇫🇮",
        "👍🏽",
        "\ufe0f",
        "\ufeff",
        "\ufffd",
        "\0",
        "\U0010ffff",
    ],
]
# What this Python's Unicode leaves unassigned may be a letter to one library, and not yet to another.
ASSIGNED = st.characters(exclude_categories=["Cs", "Cn"])
TEXTS = st.text(ASSIGNED) | st.lists(st.sampled_from(PIECES) | st.text(ASSIGNED, max_size=3), max_size=16).map("".join)
SURROGATES = st.text(st.characters(categories=["Cs"]) | st.sampled_from("\ud83d\ude42a 1") | ASSIGNED)

# The same examples every time.
EXAMPLES = settings(max_examples=500, derandomize=True, deadline=None)


@pytest.fixture(scope="session")
def both(vocabulary):
    return PLAIN.load(vocabulary), Tokenizer.load(vocabulary)


@pytest.fixture(scope="session")
def fast(both):
    return both[1]


@pytest.fixture(scope="session")
def theirs(vocabulary):
    """tiktoken's encoding of the same files."""
    ranks = data_gym_to_mergeable_bpe_ranks(str(vocabulary / "vocab.bpe"), str(vocabulary / "encoder.json"))
    special = {END: len(ranks)}
    return tiktoken.Encoding(vocabulary.name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="session")
def hugging_face(vocabulary):
    """The byte-level BPE of `tokenizers` from the same files."""
    model = tokenizers.models.BPE.from_file(str(vocabulary / "encoder.json"), str(vocabulary / "vocab.bpe"))
    return byte_level(model)


def byte_level(model):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


# ---- Encoding


@settings(EXAMPLES, max_examples=5000)
@given(text=TEXTS)
def test_random_strings_have_tiktokens_tokens(both, theirs, text):
    tokens = theirs.encode_ordinary(text)
    for ours in both:
        assert ours.encode(text) == tokens
        assert ours.decode(tokens) == text


@EXAMPLES
@given(text=SURROGATES)
def test_strings_with_surrogates_have_tiktokens_tokens(both, theirs, text):
    for ours in both:
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.encode(text, allow_special=True) == theirs.encode(text, allowed_special="all")


@EXAMPLES
@given(text=st.lists(st.just(END) | st.sampled_from(PIECES), max_size=12).map("".join))
def test_the_end_of_text_is_found_where_tiktoken_finds_it(both, theirs, text):
    for ours in both:
        assert ours.encode(text, allow_special=True) == theirs.encode(text, allowed_special="all")
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())


@EXAMPLES
@given(text=TEXTS)
def test_random_strings_have_the_tokens_of_tokenizers(both, hugging_face, text):
    for ours in both:
        assert ours.encode(text) == hugging_face.encode(text).ids


def test_a_corpus_has_tiktokens_tokens(both, fast, theirs, shared):
    text = lzma.decompress((shared / "corpus" / "val.txt.xz").read_bytes()).decode("utf-8")
    assert len(text) > 100_000
    for ours in both:
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert fast.encode(text, allow_special=True) == theirs.encode(text, allowed_special="all")


def test_every_code_point_has_tiktokens_tokens(fast, theirs):
    """After a letter and before a digit, and between white space."""
    texts = [f"a{chr(code)}1 {chr(code)}" for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    differ = []
    for start in range(0, len(texts), 1000):  # many at once, since a call takes longer than what it does
        some = texts[start : start + 1000]
        if fast.encode("\n".join(some)) != theirs.encode_ordinary("\n".join(some)):
            differ += [text for text in some if fast.encode(text) != theirs.encode_ordinary(text)] or [some]
    assert not differ


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I'm sure we've said they'll, he'd, it's, you're and don't",
        "I'M SURE WE'VE SAID THEY'LL, HE'D, IT'S, YOU'RE AND DON'T",
        "'s's 's '  's 'sat 'lll ''ll'' ’s",
        " ",
        "   a   b\n\n\n c \n \n d\t\te \t f   ",
        "a\r\nb\r\n\r\n  c\rd\n\re",
        "   1   !   \n!\n1",
        "\u00a0a\u00a0\u00a0b \u00a0 c\u00a0 1\u00a0!",
        "a\u2002b\u2009\u200ac\u202fd\u3000e\u3000\u3000f\u1680g\u205fh\u2028i\u2029j\u0085k\x0bl\x0cm",
        "a\u200bb\u2060c\ufeffd\u180ee \u200b \u180e ",
        "a\x1cb\x1dc\x1ed\x1fe \x1c \x1f ",
        "cafe\u0301 caf\u00e9 \u0301 e\u0301\u0302\u0303 Z\u0351\u036b\u0343\u0332",
        "👩\u200d👩\u200d👧\u200d👦 👍🏽 🇫🇮🇸🇪 ❤\ufe0f 🏴\U000e0067\U000e0062\U000e007f 1\ufe0f\u20e3",
        "٣٤٥ ५६ ৩ ๔๕ 一二三 ⅧⅨ ②③ ½¾ x²³ 𝟘𝟙𝟚 ௧௨ 1٣a५",
        "東京タワー、서울에서 ไม่มีช่องว่าง नमस्ते दुनिया שָׁלוֹם مرحبا ελληνικά ǅ ª º ʰ",
        "snake_case camelCase __init__ x+=1; /* … */ https://example.com/?q=a%20b#c -1,000.50€",
        "\x00\x01\x7f\x80\x9f\xad\ufdd0\uffff\ufffd\U0010ffff\ue000",
        "<|endoftext|> <|endoftext|><|endoftext <|endoftext|>|> <|startoftext|>",
    ],
    ids=ascii,
)
def test_chosen_strings_have_tiktokens_tokens(both, theirs, text):
    for ours in both:
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.encode(text, allow_special=True) == theirs.encode(text, allowed_special="all")


def letters(alphabet):
    return "".join(random.Random(0).choices(alphabet, k=100_000))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a" * 100_000, id="one letter"),
        pytest.param(letters("abcdefghijklmnopqrstuvwxyz"), id="any letters"),
        pytest.param(letters("ab"), id="two letters"),
        pytest.param(letters("etaoin"), id="frequent letters"),
        pytest.param("1234567890" * 10_000, id="digits"),
        pytest.param(letters("-=*#"), id="signs"),
        pytest.param("東" * 30_000, id="one letter of three bytes"),
        pytest.param("\n" * 100_000, id="newlines"),
        pytest.param("a" + " " * 30_000 + "a", id="spaces"),
        pytest.param("ab" * 50_000 + "'s" * 10_000, id="contractions"),
    ],
)
def test_long_runs_have_tiktokens_tokens(fast, theirs, text):
    assert fast.encode(text) == theirs.encode_ordinary(text)


# ---- Decoding


@EXAMPLES
@given(data=st.data())
def test_random_tokens_have_tiktokens_text(fast, theirs, data):
    tokens = data.draw(st.lists(st.integers(0, len(fast) - 1) | st.integers(0, 255)))
    assert fast.decode(tokens) == theirs.decode(tokens, errors="replace")
    assert fast.decode_bytes(tokens) == theirs.decode_bytes(tokens)


def test_every_token_has_tiktokens_bytes(fast, theirs):
    assert len(fast) == theirs.n_vocab
    assert [fast.decode_bytes([i]) for i in range(len(fast))] == [theirs.decode_bytes([i]) for i in range(len(fast))]


# ---- Vocabularies that others train


def together(vocabulary, merges):
    """npgpt2's two tokenizers and that of `tokenizers` for one vocabulary."""
    files = json.dumps(vocabulary).encode(), "\n".join(["#version: 0.2", *map(" ".join, merges)]).encode()
    theirs = byte_level(tokenizers.models.BPE(vocabulary, merges))
    return SimpleNamespace(plain=PLAIN(*files), fast=Tokenizer(*files), theirs=theirs)


@pytest.fixture(scope="session", params=["abc", "ab ", "aé1 "], ids=ascii)
def trained(request):
    """A vocabulary that `tokenizers` makes of random words in an alphabet, and the alphabet."""
    draw = random.Random(0)
    words = ["".join(draw.choices(request.param, k=draw.randrange(1, 15))) for _ in range(3000)]
    tokenizer = byte_level(tokenizers.models.BPE())
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return SimpleNamespace(
        vocabulary=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], alphabet=request.param
    )


@pytest.fixture(scope="session")
def as_trained(trained):
    return together(trained.vocabulary, trained.merges)


@pytest.fixture(scope="session")
def with_every_split(trained):
    """The same tokens, each made by every pair that could make it, as converters from other formats list merges."""
    ids = trained.vocabulary
    tokens = sorted(ids, key=ids.get)
    splits = [(token[:at], token[at:]) for token in tokens for at in range(1, len(token))]
    merges = [(left, right) for left, right in splits if left in ids and right in ids]
    assert len(merges) > len(trained.merges)
    return together(ids, merges)


@settings(EXAMPLES, max_examples=1000)
@given(data=st.data())
def test_a_trained_vocabulary_has_the_tokens_of_tokenizers(trained, as_trained, data):
    text = data.draw(st.text(st.sampled_from(trained.alphabet), max_size=60) | TEXTS)
    expected = as_trained.theirs.encode(text).ids
    assert as_trained.fast.encode(text) == expected
    assert as_trained.plain.encode(text) == expected


@settings(EXAMPLES, max_examples=1000)
@given(data=st.data())
def test_a_vocabulary_with_several_merges_for_a_token_has_the_tokens_of_tokenizers(trained, with_every_split, data):
    text = data.draw(st.text(st.sampled_from(trained.alphabet), max_size=60) | TEXTS)
    expected = with_every_split.theirs.encode(text).ids
    assert with_every_split.fast.encode(text) == expected
    assert with_every_split.plain.encode(text) == expected
