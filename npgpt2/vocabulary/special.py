"""What a vocabulary consists of: tokens that byte pair encoding makes, those that it doesn't, and what they are for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from reprlib import repr as shortened
from typing import Any, NamedTuple

import regex

from npgpt2.files import parse_json_object

END_OF_TEXT = "<|endoftext|>"
Ranges = tuple[tuple[int, int], ...]
# What takes about a second to get ready for: 50 µs a token, and 7 µs a character.
ADDED_LIMIT, CHARACTERS_LIMIT = 10_000, 100_000
SPACE = regex.compile(r"\s")


class AddedToken(NamedTuple):
    """A token that is found in a text by what it says, before byte pair encoding sees the rest.

    id: its number · text: what it says · special: it has a meaning of its own, such as the end of a text, so that it is
    only looked for where that is allowed · lstrip, rstrip: white space before, or behind, belongs to it · normalized:
    it is looked for after those that are not
    """

    id: int
    text: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class SpecialTokens:
    """What is to be known of a model's tokens besides the two files of its vocabulary.

    added: tokens that are found by their texts · end: those with which the model ends a text, if it was said · begin:
    the one with which a text begins, if it was said · pad: the one that fills batches up, for those who ask ·
    prefix_space: whether a text is read as if a space came before its first word · unused: ranges of the model's rows,
    from and up to, that no token has: they fill a matrix up, and are never drawn
    """

    added: tuple[AddedToken, ...] = ()
    end: tuple[int, ...] | None = None
    begin: int | None = None
    pad: int | None = None
    prefix_space: bool = False
    unused: Ranges = ()

    def to_json(self) -> bytes:
        """As a model file keeps it.

        >>> SpecialTokens(end=(5, 7)).to_json()
        b'{"added": [], "end": [5, 7]}'
        """
        said = asdict(self) | {"added": [token._asdict() for token in self.added]}
        default = asdict(SpecialTokens())
        return json.dumps({name: value for name, value in said.items() if value != default[name]}).encode()

    @classmethod
    def parse(cls, data: bytes, n_vocab: int, source: str) -> SpecialTokens:
        """What `to_json` made; ValueError where it is anything else.

        n_vocab: how many rows the model has, which those that are unused are some of
        """
        said = parse_json_object(data, source)
        try:
            if unknown := said.keys() - cls.__dataclass_fields__:
                raise ValueError(f"it has the unknown entry {min(unknown)!r}")
            added = tuple(_parse_added(entry) for entry in said.pop("added", []))
            unused = tuple((_whole(first), _whole(last)) for first, last in said.pop("unused", []))
            end, prefix_space = said.pop("end", None), said.pop("prefix_space", False)
            if not isinstance(prefix_space, bool):
                raise ValueError("prefix_space is neither true nor false")
            ends = None if end is None else tuple(_whole(token) for token in end)
            begin, pad = (None if said.get(name) is None else _whole(said[name]) for name in ("begin", "pad"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}; convert the model again") from None
        edges = [0, *(edge for pair in unused for edge in pair), n_vocab]
        if edges != sorted(edges):
            raise ValueError(f"{source}: unused has ranges that lie outside of the {n_vocab} rows, or out of order")
        return cls(added, ends, begin, pad, prefix_space, unused)


class Vocabulary(NamedTuple):
    """A vocabulary as files say it.

    encoder_json, vocab_bpe: the contents of OpenAI's two files · special: what they don't say, or None where they are
    all that there is · notes: sentences about what was found, for whoever asked for it to be read
    """

    encoder_json: bytes
    vocab_bpe: bytes
    special: SpecialTokens | None = None
    notes: tuple[str, ...] = ()


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{shortened(value)} is no token id")
    return value


def _parse_added(entry: Any) -> AddedToken:
    fields = entry if isinstance(entry, dict) and entry.keys() <= set(AddedToken._fields) else {}
    text, flags = fields.get("text"), [value for name, value in fields.items() if name not in ("id", "text")]
    if not isinstance(text, str) or not text or any(type(flag) is not bool for flag in flags):
        raise ValueError(f"added has {shortened(entry)}, which describes no token")
    return AddedToken(**fields | {"id": _whole(fields.get("id"))})


def ranges_of(ids: Iterable[int]) -> Ranges:
    """Ids in rising order, as ranges: from and up to.

    >>> ranges_of([1, 2, 3, 7])
    ((1, 4), (7, 8))
    """
    found: list[tuple[int, int]] = []
    for token in ids:
        if found and found[-1][1] == token:
            found[-1] = (found[-1][0], token + 1)
        else:
            found.append((token, token + 1))
    return tuple(found)


class AddedTokens:
    """Tokens that are found in a text by what they say: those that are not `normalized` first, the longest of those
    that begin at the same place, as the tokenizers library does.
    """

    def __init__(self, tokens: Iterable[AddedToken], source: str = "vocabulary") -> None:
        self._by_text = {token.text: token for token in tokens}
        if len(self._by_text) > ADDED_LIMIT or sum(map(len, self._by_text)) > CHARACTERS_LIMIT:
            raise ValueError(
                f"{source}: has {len(self._by_text):,} added tokens, where {ADDED_LIMIT:,} of {CHARACTERS_LIMIT:,}"
                " characters in all are the most"
            )
        self._has_ordinary = not all(token.special for token in self._by_text.values())
        self._patterns: list[regex.Pattern[str]] | None = None  # made when they are needed

    def needed(self, allow_special: bool) -> bool:
        """Whether there are any to look for."""
        return bool(self._by_text) if allow_special else self._has_ordinary

    def split(self, text: str, allow_special: bool) -> Iterator[str | int]:
        """The parts of a text between the tokens, and the tokens, in order."""
        if self._patterns is None:
            groups = [[t for t, token in self._by_text.items() if token.normalized == last] for last in (False, True)]
            self._patterns = [regex.compile(r"\L<texts>", texts=texts) for texts in groups if texts]
        parts: Iterable[str | int] = [text]
        for pattern in self._patterns:
            parts = [piece for part in parts for piece in self._split(part, pattern, allow_special)]
        return iter(parts)

    def _split(self, part: str | int, pattern: regex.Pattern[str], allow_special: bool) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        start = 0
        for match in pattern.finditer(part):
            token, (first, last) = self._by_text[match[0]], match.span()
            if token.special and not allow_special:
                continue  # also for ordinary tokens within it
            while token.lstrip and first > start and SPACE.match(part, first - 1):
                first -= 1
            while token.rstrip and SPACE.match(part, last):
                last += 1
            if first > start:
                yield part[start:first]
            if not (token.lstrip and max(first, start) >= last):  # what white space of the last one is all of
                yield token.id
            start = last
        if start < len(part):
            yield part[start:]
