"""Text to tokens and back: GPT-2's byte-level byte pair encoding, as one would write it on a blackboard.

Text is split into words by a pattern; each word becomes UTF-8 bytes, and neighbours are merged by a list of pairs, the
most frequent of the training text first, until none are left to merge. What remains are the tokens. Every string can
be encoded, since every byte is a token, and decoding gives it back.

A vocabulary is two files: `encoder.json` numbers the tokens, and `vocab.bpe` lists the merges in order. Both write
bytes as printable characters. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2;
the same as OpenAI's `src/encoder.py`.

`kernels/tokenizer.py` has the same class with faster insides. That is the one to use: a long word takes n² steps here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import regex

from npgpt2.files import parse_json_object, read_bounded

Pair = tuple[int, int]
AnyTokenizer = TypeVar("AnyTokenizer", bound="Tokenizer")

END_OF_TEXT = "<|endoftext|>"
# English contractions; letters, digits, or other signs, each with the space before them; white space, of which the
# last one is left to the word that follows.
WORDS = regex.compile(r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# Characters at the end of a text whose words could go on, or be split otherwise, if more text followed: where a word
# ends depends on no more than the three after its beginning, and the one that follows it.
UNCERTAIN = 3
# The names that OpenAI and transformers give the two files.
FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def _byte_characters() -> str:
    """The character that stands for each byte in a vocabulary's files.

    Bytes that are printable in Latin-1 stand for themselves; the others, in order, are the characters from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_CHARACTERS = _byte_characters()
_TO_LATIN_1 = {ord(character): byte for byte, character in enumerate(BYTE_CHARACTERS)}


def merge(tokens: list[int], ranks: Mapping[Pair, int], made: Sequence[int]) -> list[int]:
    """Merge neighbours for as long as any two are a pair of the list: always the earliest, in every place.

    tokens: the bytes of a word, as tokens · ranks: where in the list each pair stands · made: for each place in the
    list, the token that is made there.

    >>> merge([0, 1, 2, 0, 1], ranks={(1, 2): 0, (0, 1): 1}, made=[3, 4])
    [0, 3, 4]
    """
    while pairs := [pair for pair in pairwise(tokens) if pair in ranks]:
        earliest = min(pairs, key=ranks.__getitem__)
        merged: list[int] = []
        for token in tokens:
            if merged and (merged[-1], token) == earliest:
                merged[-1] = made[ranks[earliest]]
            else:
                merged.append(token)
        tokens = merged
    return tokens


def read_vocabulary(folder: Path) -> tuple[bytes, bytes] | None:
    """The contents of a folder's two vocabulary files; None where it has neither. One without the other is an error."""
    for names in FILES:
        paths = [folder / name for name in names]
        if any(path.is_file() for path in paths):
            encoder, merges = (read_bounded(path) for path in paths)
            return encoder, merges
    return None


def _parse_tokens(encoder_json: bytes, source: str) -> tuple[dict[str, int], list[bytes]]:
    """The number of each token, by what `encoder.json` writes for it; and by number, the bytes that it stands for."""
    ids = parse_json_object(encoder_json, f"{source}: encoder.json")
    if any(type(token) is not int for token in ids.values()) or set(ids.values()) != set(range(len(ids))):
        raise ValueError(f"{source}: encoder.json doesn't number its {len(ids)} tokens from 0 to {len(ids) - 1}")
    texts = [b""] * len(ids)
    for text, token in ids.items():
        try:
            texts[token] = text.translate(_TO_LATIN_1).encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(f"{source}: encoder.json has the entry {text!r}, which doesn't stand for bytes") from None
    for character in BYTE_CHARACTERS:
        if character not in ids:
            raise ValueError(f"{source}: encoder.json has no entry {character!r}, the sign of a single byte")
    return ids, texts


def _parse_merges(vocab_bpe: bytes, ids: Mapping[str, int], source: str) -> tuple[dict[Pair, int], list[int]]:
    """Where in the list each pair of tokens stands, and the token that is made in each place, as `merge` wants them."""
    try:
        lines = vocab_bpe.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: vocab.bpe is not UTF-8 at byte {error.start}") from None
    ranks: dict[Pair, int] = {}
    made: list[int] = []
    first = 1 if lines[0].startswith("#version") else 0
    for number, line in enumerate(lines[first:], first + 1):
        if not line.rstrip("\r"):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        try:
            ranks[ids[left], ids[right]] = len(made)  # of two the same, the last counts, as in OpenAI's encoder.py
            made.append(ids[left + right])
        except KeyError as error:
            raise ValueError(
                f"{source}: vocab.bpe line {number}: {error} is not in encoder.json; the two files"
                " don't belong together, or are damaged"
            ) from None
    return ranks, made


def _to_unicode(text: str) -> str:
    """The text without halves of surrogate pairs, which are put together or replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """Encodes text as token ids, and decodes them.

    encoder_json, vocab_bpe: the contents of the two files · source: what to call them in errors. Files that are
    damaged, or don't belong together, raise ValueError. `len()` is the number of tokens.
    """

    def __init__(self, encoder_json: bytes, vocab_bpe: bytes, source: str = "vocabulary") -> None:
        ids, self._bytes = _parse_tokens(encoder_json, source)
        self._byte_ids = [ids[character] for character in BYTE_CHARACTERS]
        self._ranks, self._made = _parse_merges(vocab_bpe, ids, source)
        self.end_of_text: int | None = ids.get(END_OF_TEXT)

    @classmethod
    def load(cls: type[AnyTokenizer], folder: str | Path) -> AnyTokenizer:
        """Read the vocabulary in a folder: `encoder.json` and `vocab.bpe`, or `vocab.json` and `merges.txt`.

        Raises FileNotFoundError where they are not there, ValueError where they are damaged.

        >>> len(Tokenizer.load("tests/fixtures/tiny"))
        520
        """
        texts = read_vocabulary(Path(folder))
        if texts is None:
            raise FileNotFoundError(f"{folder}: holds no vocabulary (encoder.json and vocab.bpe)")
        return cls(*texts, source=str(folder))

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The tokens of a text.

        `<|endoftext|>` in it is text like any other unless `allow_special`, which makes it the token of that name.
        Halves of surrogate pairs, which are not Unicode text, are put together or replaced by U+FFFD.

        >>> tokenizer.encode("A language model")                     # `tokenizer` is that of the tests' small model
        [32, 514, 352]
        """
        text = _to_unicode(text)
        if not allow_special or self.end_of_text is None:
            return self._encode_words(self._split(text))
        first, *others = text.split(END_OF_TEXT)
        tokens = self._encode_words(self._split(first))
        for part in others:
            tokens += [self.end_of_text, *self._encode_words(self._split(part))]
        return tokens

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[list[int]]:
        """The tokens of a text that comes in pieces, such as a file too large for memory; the same as of the whole,
        if no surrogate pair is cut in two.

        >>> list(tokenizer.encode_pieces(["A lang", "uage model"]))
        [[32], [514], [352]]
        """
        text, wanted = "", 0
        for piece in pieces:
            text += _to_unicode(piece)
            if len(text) < wanted:
                continue
            words, text = list(self._split(text)), ""
            while words and len(text) < UNCERTAIN:
                text = words.pop() + text
            wanted = 2 * len(text)  # so that a word that fills many pieces isn't split anew with each
            yield self._encode_words(words)
        yield self._encode_words(self._split(text))

    def _split(self, text: str) -> Iterable[str]:
        return WORDS.findall(text)

    def _encode_words(self, words: Iterable[str]) -> list[int]:
        return [token for word in words for token in self._encode_word(word)]

    def _encode_word(self, word: str) -> Sequence[int]:
        return merge([self._byte_ids[byte] for byte in word.encode("utf-8")], self._ranks, self._made)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes that tokens stand for; an id that is not in the vocabulary raises ValueError."""
        parts = []
        for token in tokens:
            if not 0 <= token < len(self._bytes):
                raise ValueError(f"token {token} is not in the vocabulary, which goes from 0 to {len(self) - 1}")
            parts.append(self._bytes[token])
        return b"".join(parts)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; bytes that are not UTF-8, as when a character is cut in two, become U+FFFD.

        An id that is not in the vocabulary raises ValueError.

        >>> tokenizer.decode([32, 514, 352])
        'A language model'
        """
        return self.decode_bytes(tokens).decode("utf-8", "replace")
