"""The tokenizer as fast as Python goes: the same tokens as those of `npgpt2.tokenizer`, which says what they are.

Words are found in blocks, most by a pattern of ASCII; those that were seen lately have their tokens in a cache; the
others are merged one place at a time, short ones with all their ranks in view, and long ones by a heap of them. So a
text of n bytes takes n log n steps at most, whatever is in it. `make bench` measures it, beside other tokenizers.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise, repeat
from operator import lt

from npgpt2 import tokenizer as plain
from npgpt2.tokenizer import WORDS, Pair
from npgpt2.vocabulary import SpecialTokens

# WORDS on ASCII, where Python's own `re` finds words about twice as fast. Its white space would be four more.
ASCII_WORDS = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
# Text is split in blocks of about so many characters, which end where a word does, whatever comes before and after:
# between a printable character of ASCII and a single space. A text of mostly ASCII has few blocks of anything else.
BLOCK = 2048
BLOCK_END = re.compile(r"(?<=[!-~])(?= [!-~])")
# English text of any length uses fewer words than this, and nearly all are shorter.
CACHED_WORDS = 2**16
CACHED_LENGTH = 32
# More than the place of any merge in the list.
NO_MERGE = 2**62


def merge_in_order(tokens: Iterable[int], ranks: Mapping[Pair, int], made: Sequence[int]) -> list[int]:
    """What `npgpt2.tokenizer.merge` gives, where each merge makes a higher token than those before and than its parts.

    A pair can be merged before others of its kind then, since no merge makes way for an earlier one. Each step looks at
    all ranks, which is fastest for a word of a few letters.

    >>> merge_in_order([0, 1, 2, 0, 1], ranks={(1, 2): 0, (0, 1): 1}, made=[3, 4])
    [0, 3, 4]
    """
    tokens = [*tokens, -1]  # so that the last token has a pair too, which is no merge
    rank_of = ranks.get
    found = list(map(rank_of, pairwise(tokens), repeat(NO_MERGE)))
    while (rank := min(found)) < NO_MERGE:
        left = found.index(rank)
        del found[left], tokens[left]
        tokens[left] = token = made[rank]
        if left:
            found[left - 1] = rank_of((tokens[left - 1], token), NO_MERGE)
        found[left] = rank_of((token, tokens[left + 1]), NO_MERGE)
    tokens.pop()
    return tokens


def merge_long(tokens: Iterable[int], ranks: Mapping[Pair, int], made: Sequence[int]) -> list[int]:
    """What `npgpt2.tokenizer.merge` gives, in about n log n steps for n tokens, where that takes n².

    Pairs are kept by rank, and the ranks in a heap, so that each step looks only at what it changes.

    >>> merge_long([0, 1, 2, 0, 1], ranks={(1, 2): 0, (0, 1): 1}, made=[3, 4])
    [0, 3, 4]
    """
    tokens, rank_of = list(tokens), ranks.get
    end = len(tokens)
    following, preceding = list(range(1, end + 1)), list(range(-1, end - 1))
    pairs: dict[int, list[int]] = {}  # rank -> where its left tokens are
    for position, pair in enumerate(pairwise(tokens)):
        if (rank := rank_of(pair)) is not None:
            pairs.setdefault(rank, []).append(position)
    heap = list(pairs)
    heapq.heapify(heap)
    while heap:
        rank = heapq.heappop(heap)
        for left in sorted(pairs.pop(rank)):
            # A token that another merge took away is -1; one that it changed may no longer make this pair.
            right = following[left]
            if right >= end or rank_of((tokens[left], tokens[right])) != rank:
                continue
            tokens[left], tokens[right] = made[rank], -1
            following[left] = after = following[right]
            if after < end:
                preceding[after] = left
            for position in (preceding[left], left):
                if position >= 0 and following[position] < end:
                    found = rank_of((tokens[position], tokens[following[position]]))
                    if found in pairs:
                        pairs[found].append(position)
                    elif found is not None:
                        pairs[found] = [position]
                        heapq.heappush(heap, found)
    return [token for token in tokens if token >= 0]


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


class Tokenizer(plain.Tokenizer):
    """Encodes text as token ids, and decodes them.

    encoder_json, vocab_bpe: the contents of the two files · source: what to call them in errors · special: the tokens
    that byte pair encoding doesn't make; by default `<|endoftext|>`, if it is there. Files that are damaged, or don't
    belong together, raise ValueError. `len()` is the number of tokens, or one more than the highest where numbers are
    left out. `end_of_text` is `<|endoftext|>`, or None.

    >>> tokenizer.encode("A language model")                         # `tokenizer` is that of the tests' small model
    [32, 514, 352]
    """

    def __init__(
        self, encoder_json: bytes, vocab_bpe: bytes, source: str = "vocabulary", special: SpecialTokens | None = None
    ) -> None:
        super().__init__(encoder_json, vocab_bpe, source, special)
        self._in_order = all(map(lt, self._made, self._made[1:])) and all(
            left < token > right for (left, right), token in zip(self._ranks, self._made, strict=True)
        )
        self._cache = _Cache(self._encode_word)

    def _split(self, text: str) -> Iterator[str]:
        start, blocks = 0, []
        while start < len(text):
            end = BLOCK_END.search(text, start + BLOCK)
            blocks.append(text[start : end.start() if end else len(text)])
            start += len(blocks[-1])
        return chain.from_iterable((ASCII_WORDS if block.isascii() else WORDS).findall(block) for block in blocks)

    def _encode_words(self, words: Iterable[str]) -> list[int]:
        return list(chain.from_iterable(map(self._cache.__getitem__, words)))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        text = word.encode("utf-8")
        merge = merge_in_order if self._in_order and len(text) <= CACHED_LENGTH else merge_long
        return tuple(merge(map(self._byte_ids.__getitem__, text), self._ranks, self._made))
