"""The tokens that were added to a vocabulary in transformers' files, with the numbers that transformers gives them.

Four files can name them. `added_tokens_decoder` of `tokenizer_config.json` is the latest, and where it is there decides
alone; `tokenizer.json` comes next, then `added_tokens.json` with `special_tokens_map.json`. Settings can name tokens
for what they do, such as `eos_token`, without a number: they have that of the vocabulary, or the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

from npgpt2.files import VOCABULARY_VALUES_LIMIT, parse_json_object, read_bounded
from npgpt2.vocabulary.special import END_OF_TEXT, AddedToken

# What a token can be named for, in the order in which transformers numbers those that are new. Where nothing is said of
# the first three, GPT-2's kind of tokenizer takes END_OF_TEXT.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Where lists of others are, under the newer name and the older.
EXTRA, OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"
OPTIONS = {"lstrip": False, "rstrip": False, "single_word": False}
WAY_OUT = "npgpt2 convert --no-vocab makes a model file of it for the library, which takes token ids"


class Added(NamedTuple):
    """The tokens, and sentences about what was found."""

    tokens: tuple[AddedToken, ...]
    notes: list[str]


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, if there is one."""
    return parse_json_object(read_bounded(path), str(path), VOCABULARY_VALUES_LIMIT) if path.is_file() else None


def read_added(
    folder: Path, vocab: Mapping[str, int], saved: Mapping[str, Any] | None, settings: Mapping[str, Any], is_gpt2: bool
) -> Added:
    """All tokens of a folder that are found by their texts.

    vocab: the vocabulary to which they were added · saved, settings: the contents of `tokenizer.json`, if it is there,
    and of `tokenizer_config.json` · is_gpt2: whether transformers' class for GPT-2 reads it
    """
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
    path, map_path, older_path, saved_path = (folder / name for name in names)
    decoder = settings.get("added_tokens_decoder")
    named = _Named(settings, (read_object(map_path) or {}) if decoder is None else {}, str(path), is_gpt2)
    in_saved = list(_listed(saved.get("added_tokens", []), str(saved_path))) if saved else []
    in_older = [
        _added({"id": number, "content": text, "special": text in named.special}, str(older_path))
        for text, number in (read_object(older_path) or {}).items()
    ]
    if decoder is None:
        declared = _joined(in_saved, in_older)
    elif isinstance(decoder, dict):
        entries = [{"id": _id(key)} | _object(entry, str(path)) for key, entry in decoder.items()]
        declared = list(_listed(entries, str(path)))
        if len({token.text for token in declared}) < len(declared):
            raise ValueError(f"{path}: added_tokens_decoder has a token twice; {WAY_OUT}")
    else:
        raise ValueError(f"{path}: added_tokens_decoder is {shortened(decoder)}, where an object is expected")
    if not is_gpt2 and decoder is not None and set(declared) != set(in_saved):
        raise ValueError(f"{folder}: its tokenizer.json and tokenizer_config.json have other added tokens; {WAY_OUT}")
    counting = {(token.text, token.id) for token in declared}
    notes = [
        f"{other}: has added tokens that differ from those that count, as in transformers"
        for other, tokens in ((older_path, in_older), (saved_path, in_saved))
        if any((token.text, token.id) not in counting for token in tokens)
    ]
    named.check(vocab, declared)
    return Added(tuple(_numbered(folder, vocab, declared, named)), notes)


class _Named:
    """The tokens that settings name, without their numbers.

    roles: those that are named for what they do · extra: others that are special · own: others that only this model
    knows a name for · special: which make a token of `added_tokens.json` a special one
    """

    def __init__(self, settings: Mapping[str, Any], older: Mapping[str, Any], source: str, is_gpt2: bool) -> None:
        self._source = source
        self.roles: list[AddedToken] = []
        for role in ROLES:
            usual = END_OF_TEXT if is_gpt2 and role in ROLES[:3] else None
            value = older[role] if role in older else settings.get(role, usual)
            if _is_token(value) or (role in older and isinstance(value, dict)):
                value = value | {"__type": "AddedToken", "special": True}
            self.roles += self._tokens([value] if value else [])
        said = [settings.get(EXTRA) or settings.get(OLDER_EXTRA), older.get(EXTRA)]
        listed = self._tokens([value for values in said if isinstance(values, list) for value in values])
        renamed = older.get(OLDER_EXTRA)
        self.extra = [*listed, *self._tokens(renamed if isinstance(renamed, list) else [])]
        both = [*settings.items(), *older.items()]
        own = [value for name, value in both if name.endswith("_token") and name not in ROLES]
        for values in (*said, settings.get("model_specific_special_tokens")):
            own += values.values() if isinstance(values, dict) else []
        self.own = self._tokens([value for value in own if isinstance(value, str) or _is_token(value)])
        self.special = {token.text for token in (*self.roles, *listed)}

    def _tokens(self, values: Iterable[Any]) -> list[AddedToken]:
        found = []
        for value in values:
            if isinstance(value, str) and value:
                found.append(AddedToken(-1, value))
            elif _is_token(value):
                found.append(_added({"id": -1} | value, self._source))
            else:
                raise ValueError(f"{self._source}: has {shortened(value)}, where a token is expected")
        return found

    def check(self, vocab: Mapping[str, int], declared: list[AddedToken]) -> None:
        """Refuse what depends on the order in which transformers finds tokens: those that no file numbers."""
        numbered = {token.text: token.special for token in declared}
        first: dict[str, AddedToken] = {}
        for token in self.roles:
            if token.text not in numbered and first.setdefault(token.text, token) != token:
                raise ValueError(
                    f"{self._source}: describes {shortened(token.text)} twice, in different ways; {WAY_OUT}"
                )
        lost = [token for token in self.extra if token.text not in numbered and token.text not in vocab]
        lost += [token for token in self.own if not numbered.get(token.text, False)]
        if lost:
            raise ValueError(
                f"{self._source}: no file says the number of the special token {shortened(lost[0].text)}; save the"
                f" tokenizer again with transformers, or: {WAY_OUT}"
            )


def _is_token(value: Any) -> bool:
    """Whether it is how settings describe a token with its options."""
    return isinstance(value, dict) and value.get("__type") == "AddedToken"


def _joined(first: list[AddedToken], others: list[AddedToken]) -> list[AddedToken]:
    """Tokens of two lists; of two that say the same, the one of the first."""
    known = {token.text for token in first}
    return first + [token for token in others if token.text not in known]


def _numbered(
    folder: Path, vocab: Mapping[str, int], declared: list[AddedToken], named: _Named
) -> Iterator[AddedToken]:
    """Tokens with the numbers that transformers gives them: that of the vocabulary, or else the next."""
    roles, done, following = {token.text for token in named.roles}, set(), len(vocab)
    for token in [*sorted(declared, key=lambda token: token.id), *named.roles, *named.extra]:
        if token.text in done:
            continue
        done.add(token.text)
        number = vocab.get(token.text, following)
        if type(number) is not int or token.id not in (-1, number):
            raise ValueError(
                f"{folder}: the added token {shortened(token.text)} has the number {token.id}, where transformers would"
                f" give it {number}; {WAY_OUT}"
            )
        following = max(following, number + 1)
        yield token._replace(id=number, special=token.special or token.text in roles)


def _listed(entries: Any, source: str) -> Iterator[AddedToken]:
    if not isinstance(entries, list):
        raise ValueError(f"{source}: added_tokens is not a list")
    for entry in entries:
        yield _added(_object(entry, source), source)


def _added(entry: dict[str, Any], source: str) -> AddedToken:
    number, text = entry["id"] if type(entry.get("id")) is int else None, entry.get("content")
    special = entry.get("special", False)
    options = OPTIONS | {"special": special, "normalized": not special} | entry
    flags = {name: options[name] for name in (*OPTIONS, "special", "normalized")}
    flagged = all(type(flag) is bool for flag in flags.values())
    if number is None or not isinstance(text, str) or not text or not flagged:
        raise ValueError(f"{source}: added_tokens has {shortened(entry)}, where an id and a content are expected")
    if flags.pop("single_word"):
        raise ValueError(f"{source}: the added token {shortened(text)} is a single_word one; {WAY_OUT}")
    return AddedToken(number, text, **flags)


def _object(entry: Any, source: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{source}: added_tokens has {shortened(entry)}, where an id and a content are expected")
    return entry


def _id(key: str) -> int:
    return int(key) if re.fullmatch("[0-9]{1,9}", key) else -1
