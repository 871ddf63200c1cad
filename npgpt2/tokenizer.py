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
from reprlib import repr as shortened
from typing import TypeVar

import regex

from npgpt2.checks import as_path, check_flag, check_iterable, is_whole, wrong_type
from npgpt2.files import VOCABULARY_VALUES_LIMIT, decode_utf8, parse_json_object
from npgpt2.vocabulary import END_OF_TEXT, AddedToken, AddedTokens, Ranges, SpecialTokens, ranges_of, read_vocabulary

Pair = tuple[int, int]
AnyTokenizer = TypeVar("AnyTokenizer", bound="Tokenizer")

# English contractions; letters, digits, or other signs, each with the space before them; white space, of which the
# last one is left to the word that follows.
WORDS = regex.compile(r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# Characters at the end of a text whose words could go on, or be split otherwise, if more text followed: where a word
# ends depends on no more than the three after its beginning, and the one that follows it.
UNCERTAIN = 3


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


def _parse_tokens(encoder_json: bytes, source: str, gaps: bool) -> tuple[dict[str, int], list[bytes | None]]:
    """The number of each token, by what `encoder.json` writes for it; and by number, the bytes that it stands for.

    gaps: whether numbers may be left out
    """
    ids = parse_json_object(encoder_json, f"{source}: encoder.json", VOCABULARY_VALUES_LIMIT)
    numbers = set(ids.values()) if all(type(token) is int for token in ids.values()) else set()
    size = max(numbers, default=0) + 1 if gaps else len(ids)
    if len(numbers) != len(ids) or min(numbers, default=0) < 0 or max(numbers, default=0) >= min(size, 16 * len(ids)):
        raise ValueError(f"{source}: encoder.json doesn't number its {len(ids)} tokens from 0 to {len(ids) - 1}")
    texts: list[bytes | None] = [None] * size
    for text, token in ids.items():
        try:
            texts[token] = _bytes_of(text)
        except UnicodeEncodeError:
            raise ValueError(f"{source}: encoder.json has the entry {text!r}, which doesn't stand for bytes") from None
    for character in BYTE_CHARACTERS:
        if character not in ids:
            raise ValueError(f"{source}: encoder.json has no entry {character!r}, the sign of a single byte")
    return ids, texts


def _bytes_of(text: str) -> bytes:
    """The bytes that characters stand for, as the files write them; UnicodeEncodeError where one stands for none."""
    return text.translate(_TO_LATIN_1).encode("latin-1")


def _parse_merges(vocab_bpe: bytes, ids: Mapping[str, int], source: str) -> tuple[dict[Pair, int], list[int]]:
    """Where in the list each pair of tokens stands, and the token that is made in each place, as `merge` wants them."""
    if vocab_bpe.count(b"\n") > VOCABULARY_VALUES_LIMIT:  # each takes twenty times the memory of its shortest text
        raise ValueError(f"{source}: vocab.bpe has more than {VOCABULARY_VALUES_LIMIT:,} lines")
    lines = decode_utf8(vocab_bpe, f"{source}: vocab.bpe").split("\n")
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
    if not isinstance(text, str):
        raise wrong_type("text", text, "a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """Encodes text as token ids, and decodes them.

    encoder_json, vocab_bpe: the contents of the two files · source: what to call them in errors · special: the tokens
    that byte pair encoding doesn't make; by default `<|endoftext|>`, if it is there. Files that are damaged, or don't
    belong together, raise ValueError. `len()` is the number of tokens, or one more than the highest where numbers are
    left out. `end_of_text` is `<|endoftext|>`, or None.
    """

    def __init__(
        self, encoder_json: bytes, vocab_bpe: bytes, source: str = "vocabulary", special: SpecialTokens | None = None
    ) -> None:
        for name, data in (("encoder_json", encoder_json), ("vocab_bpe", vocab_bpe)):
            if not isinstance(data, bytes):
                raise wrong_type(name, data, "the bytes of a file")
        ids, self._bytes = _parse_tokens(encoder_json, source, gaps=special is not None)
        self._byte_ids = [ids[character] for character in BYTE_CHARACTERS]
        self._ranks, self._made = _parse_merges(vocab_bpe, ids, source)
        self._own = len(self._bytes)
        if special is None:
            end = ids.get(END_OF_TEXT)
            special = SpecialTokens(() if end is None else (AddedToken(end, END_OF_TEXT),))
        self.special = special
        for token in special.added:
            self._add(token, source)
        added = {token.text: token.id for token in special.added}
        self.end_of_text: int | None = added.get(END_OF_TEXT, ids.get(END_OF_TEXT))
        self.special_ids = frozenset(token.id for token in special.added if token.special)
        self._added = AddedTokens(special.added, source)

    def _add(self, token: AddedToken, source: str) -> None:
        """Take note of what an added token stands for."""
        # As transformers decodes it: what could be the files' way of writing bytes is taken for that.
        as_bytes = all(ord(character) in _TO_LATIN_1 for character in token.text)
        text = _bytes_of(token.text) if as_bytes else token.text.encode("utf-8", "replace")
        if token.id >= 2 * self._own + 2**16:
            raise ValueError(f"{source}: the added token {token.text!r} has the number {token.id}, of {self._own}")
        self._bytes += [None] * (token.id + 1 - len(self._bytes))
        if self._bytes[token.id] not in (None, text):
            raise ValueError(f"{source}: token {token.id} is {self._bytes[token.id]!r}, and {token.text!r} too")
        self._bytes[token.id] = text

    @classmethod
    def load(cls: type[AnyTokenizer], folder: str | Path) -> AnyTokenizer:
        """Read the vocabulary in a folder: `encoder.json` and `vocab.bpe`, or the files that transformers would read.

        Raises FileNotFoundError where they are not there, ValueError where they are damaged or of another kind.

        >>> len(Tokenizer.load("tests/fixtures/tiny"))
        520
        """
        found = read_vocabulary(as_path("folder", folder))
        if found is None:
            raise FileNotFoundError(f"{folder}: holds no vocabulary (encoder.json and vocab.bpe)")
        return cls(found.encoder_json, found.vocab_bpe, str(folder), found.special)

    def __len__(self) -> int:
        return len(self._bytes)

    def __contains__(self, token: object) -> bool:
        """Whether a number is a token's."""
        return isinstance(token, int) and 0 <= token < len(self._bytes) and self._bytes[token] is not None

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The tokens of a text.

        `<|endoftext|>` in it is text like any other unless `allow_special`, which makes it the token of that name, and
        so for the model's other special tokens. Halves of surrogate pairs, which are not Unicode text, are put together
        or replaced by U+FFFD.

        >>> tokenizer.encode("A language model")                     # `tokenizer` is that of the tests' small model
        [32, 514, 352]
        """
        check_flag("allow_special", allow_special)
        text = _to_unicode(text)
        if not self._added.needed(allow_special):
            return self._encode_words(self._split(self._begun(text)))
        tokens: list[int] = []
        for part in self._added.split(text, allow_special):
            tokens += [part] if isinstance(part, int) else self._encode_words(self._split(self._begun(part)))
        return tokens

    def _begun(self, text: str) -> str:
        """With the space before it that the vocabulary may want."""
        return " " + text if self.special.prefix_space and text and not text.startswith(" ") else text

    def find_special(self, text: str) -> list[str]:
        """The special tokens that a text spells out, which are read as tokens where that is allowed.

        >>> tokenizer.find_special("The end.<|endoftext|>")
        ['<|endoftext|>']
        """
        return [token.text for token in self.special.added if token.special and token.text in text]

    def unused(self, n_vocab: int) -> Ranges:
        """Which of a model's rows no token has, as ranges. ValueError where there are more tokens than rows: but for
        special ones that were added, which are of no use then.
        """
        if self._own > n_vocab:
            raise ValueError(f"the vocabulary has {self._own} entries, but the model {n_vocab}")
        known = self._bytes[:n_vocab] + [None] * (n_vocab - len(self._bytes))
        return ranges_of(number for number, text in enumerate(known) if text is None)

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[list[int]]:
        """The tokens of a text that comes in pieces, such as a file too large for memory; the same as of the whole,
        if no surrogate pair is cut in two.

        >>> list(tokenizer.encode_pieces(["A lang", "uage model"]))
        [[32], [514], [352]]
        """
        check_iterable("pieces", pieces, "an iterable of texts")
        return self._encode_pieces(pieces)

    def _encode_pieces(self, pieces: Iterable[str]) -> Iterator[list[int]]:
        if self._added.needed(allow_special=False):  # which could be cut in two by the pieces
            yield self.encode("".join(pieces))
            return
        text, wanted, begun = "", 0, False
        for piece in pieces:
            if piece and not begun:
                piece, begun = self._begun(piece), True
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
        check_iterable("tokens", tokens, "a list of token ids")
        parts = []
        for token in tokens:
            if type(token) is not int and not is_whole(token):
                raise TypeError(f"tokens has {shortened(token)}, where token ids are expected")
            if not 0 <= token < len(self._bytes):
                raise ValueError(f"token {token} is not in the vocabulary, which goes from 0 to {len(self) - 1}")
            if (text := self._bytes[token]) is None:
                raise ValueError(f"token {token} is not in the vocabulary, which leaves it out")
            parts.append(text)
        return b"".join(parts)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; bytes that are not UTF-8, as when a character is cut in two, become U+FFFD.

        An id that is not in the vocabulary raises ValueError.

        >>> tokenizer.decode([32, 514, 352])
        'A language model'
        """
        return self.decode_bytes(tokens).decode("utf-8", "replace")
