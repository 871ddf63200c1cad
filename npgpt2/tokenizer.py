"""Text to tokens and back: GPT-2's byte-level byte pair encoding.

Text is split into words by a pattern; each word becomes UTF-8 bytes, and neighbours are merged, the most frequent
pairs of the training text first, until no more merges apply. What is left are the tokens. Every string can be encoded,
since every byte is a token, and decoding gives it back.

A vocabulary is two files: `encoder.json` numbers the tokens, and `vocab.bpe` lists the merges in order. Both write
bytes as printable characters. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2;
the same as OpenAI's `src/encoder.py`.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise, repeat
from pathlib import Path

import regex

from npgpt2.files import parse_json_object, read_bounded

END_OF_TEXT = "<|endoftext|>"
# English contractions; letters, digits, or other signs, each with the space before them; white space, of which the
# last one is left to the word that follows.
WORDS = regex.compile(r"'(?:[stmd]|re|ve|ll)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+")
# The same on ASCII, where Python's own `re` finds words more than twice as fast. Its white space would be four more.
ASCII_WORDS = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
# Text is split in blocks of about so many characters, which end where a word does, whatever comes before and after:
# between a printable character of ASCII and a single space. A text of mostly ASCII has few blocks of anything else.
BLOCK = 2048
BLOCK_END = re.compile(r"(?<=[!-~])(?= [!-~])")
# Characters at the end of a text whose words could go on, or be split otherwise, if more text followed.
UNCERTAIN = 3
# The names that OpenAI and transformers give the two files.
FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
# English text of any length uses fewer words than this, and nearly all are shorter.
CACHED_WORDS = 2**16
CACHED_LENGTH = 32
# More than the number of any merge.
NO_MERGE = 2**62


def _byte_characters() -> str:
    """The character that stands for each byte in a vocabulary's files.

    Bytes that are printable in Latin-1 stand for themselves; the others, in order, are the characters from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_CHARACTERS = _byte_characters()
_TO_LATIN_1 = {ord(character): byte for byte, character in enumerate(BYTE_CHARACTERS)}


def _to_unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_vocabulary(folder: Path) -> tuple[bytes, bytes] | None:
    """The contents of a folder's two vocabulary files; None where it has neither. One without the other is an error."""
    for names in FILES:
        paths = [folder / name for name in names]
        if any(path.is_file() for path in paths):
            encoder, merges = (read_bounded(path) for path in paths)
            return encoder, merges
    return None


def _split(text: str) -> Iterator[str]:
    """The words of a text, as WORDS finds them."""
    start, blocks = 0, []
    while start < len(text):
        end = BLOCK_END.search(text, start + BLOCK)
        blocks.append(text[start : end.start() if end else len(text)])
        start += len(blocks[-1])
    return chain.from_iterable((ASCII_WORDS if block.isascii() else WORDS).findall(block) for block in blocks)


class _Cache(dict[str, tuple[int, ...]]):
    """The tokens of words that were seen lately; of others, `encode` says them."""

    def __init__(self, encode: Callable[[str], tuple[int, ...]]) -> None:
        self._encode = encode

    def __missing__(self, word: str) -> tuple[int, ...]:
        tokens = self._encode(word)
        if len(word) <= CACHED_LENGTH:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = tokens
        return tokens


class Tokenizer:
    """Encodes text as token ids, and decodes them.

    encoder_json, vocab_bpe: the contents of the two files · source: what to call them in errors. Files that are
    damaged, or don't belong together, raise ValueError. `len()` is the number of tokens.
    """

    def __init__(self, encoder_json: bytes, vocab_bpe: bytes, source: str = "vocabulary") -> None:
        ids = parse_json_object(encoder_json, f"{source}: encoder.json")
        if any(type(token) is not int for token in ids.values()) or set(ids.values()) != set(range(len(ids))):
            raise ValueError(f"{source}: encoder.json doesn't number its {len(ids)} tokens from 0 to {len(ids) - 1}")
        self._bytes: list[bytes] = [b""] * len(ids)
        for text, token in ids.items():
            try:
                self._bytes[token] = text.translate(_TO_LATIN_1).encode("latin-1")
            except UnicodeEncodeError:
                raise ValueError(
                    f"{source}: encoder.json has the entry {text!r}, which doesn't stand for bytes"
                ) from None
        for character in BYTE_CHARACTERS:
            if character not in ids:
                raise ValueError(f"{source}: encoder.json has no entry {character!r}, the sign of a single byte")
        self._byte_ids = [ids[character] for character in BYTE_CHARACTERS]
        # (left token, right token) -> which merge this is, from 1; and the token that each makes
        self._merges: dict[tuple[int, int], int] = {}
        self._made = [0]
        try:
            lines = vocab_bpe.decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: vocab.bpe is not UTF-8 at byte {error.start}") from None
        self._in_order = True  # whether each token is higher than those made before, and than those that it is made of
        first = 1 if lines[0].startswith("#version") else 0
        for number, line in enumerate(lines[first:], first + 1):
            if not line.rstrip("\r"):
                continue
            before, _, after = line.rstrip("\r").partition(" ")
            try:
                left, right, token = ids[before], ids[after], ids[before + after]
            except KeyError as error:
                raise ValueError(
                    f"{source}: vocab.bpe line {number}: {error} is not in encoder.json; the two files"
                    " don't belong together, or are damaged"
                ) from None
            self._in_order = self._in_order and token > self._made[-1] and left < token > right
            self._merges[left, right] = len(self._made)  # of two the same, the last counts, as in OpenAI's encoder.py
            self._made.append(token)
        self.end_of_text: int | None = ids.get(END_OF_TEXT)
        self._cache = _Cache(self._encode_word)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
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
            return self._encode_ordinary(text)
        first, *others = text.split(END_OF_TEXT)
        tokens = self._encode_ordinary(first)
        for part in others:
            tokens.append(self.end_of_text)
            tokens += self._encode_ordinary(part)
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
            # Where a word ends depends on no more than the three characters after its beginning, and the one that
            # follows it: the last few have to wait. While a single word fills the text, it is looked at again only
            # when it has doubled.
            words, text = list(_split(text)), ""
            while words and len(text) < UNCERTAIN:
                text = words.pop() + text
            wanted = 2 * len(text)
            yield self._encode_words(words)
        yield self._encode_words(_split(text))

    def _encode_ordinary(self, text: str) -> list[int]:
        return self._encode_words(_split(text))

    def _encode_words(self, words: Iterable[str]) -> list[int]:
        return list(chain.from_iterable(map(self._cache.__getitem__, words)))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Apply the merges to a word's bytes: always the earliest in the list, to all its pairs from left to right."""
        tokens = list(map(self._byte_ids.__getitem__, word.encode("utf-8")))
        if len(tokens) <= CACHED_LENGTH and self._in_order:
            return tuple(self._merge(tokens))
        return tuple(self._merge_long(tokens))

    def _merge(self, tokens: list[int]) -> list[int]:
        """Merge the tokens of a word of a few letters, looking at all pairs in each step.

        A pair can be merged before others of its kind, since in order no merge makes way for an earlier one.
        """
        merge_of, made = self._merges.get, self._made
        tokens.append(-1)  # so that the last token has a pair too, which is no merge
        merges = list(map(merge_of, pairwise(tokens), repeat(NO_MERGE)))
        while (merge := min(merges)) < NO_MERGE:
            left = merges.index(merge)
            del merges[left], tokens[left]
            tokens[left] = token = made[merge]
            if left:
                merges[left - 1] = merge_of((tokens[left - 1], token), NO_MERGE)
            merges[left] = merge_of((token, tokens[left + 1]), NO_MERGE)
        tokens.pop()
        return tokens

    def _merge_long(self, tokens: list[int]) -> list[int]:
        """The same in about n log n steps for n tokens, where looking at all pairs in each takes n².

        Pairs are kept by merge, and the merges in a heap, so that each step looks only at what it changes.
        """
        merge_of, made = self._merges.get, self._made
        end = len(tokens)
        following, preceding = list(range(1, end + 1)), list(range(-1, end - 1))
        pairs: dict[int, list[int]] = {}  # merge -> where its left tokens are
        for position in range(end - 1):
            if merge := merge_of((tokens[position], tokens[position + 1])):
                pairs.setdefault(merge, []).append(position)
        heap = list(pairs)
        heapq.heapify(heap)
        while heap:
            merge = heapq.heappop(heap)
            for left in sorted(pairs.pop(merge)):
                # A token that another merge took away is -1; one that it changed may no longer make this pair.
                right = following[left]
                if right >= end or merge_of((tokens[left], tokens[right])) != merge:
                    continue
                tokens[left], tokens[right] = made[merge], -1
                following[left] = after = following[right]
                if after < end:
                    preceding[after] = left
                for position in (preceding[left], left):
                    if position >= 0 and following[position] < end:
                        found = merge_of((tokens[position], tokens[following[position]]))
                        if found and found not in pairs:
                            pairs[found] = [position]
                            heapq.heappush(heap, found)
                        elif found:
                            pairs[found].append(position)
        return [token for token in tokens if token >= 0]

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
