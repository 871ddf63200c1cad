"""Reads the vocabulary of a folder as Hugging Face's `transformers` does, or refuses it by name.

Many files can say the same: `tokenizer.json` has everything; older folders have `vocab.json`, `merges.txt`,
`added_tokens.json` and `special_tokens_map.json`; `tokenizer_config.json` adds to either. Which of them decides, and
how tokens are numbered that the vocabulary doesn't have, is as in transformers 5 (`tokenization_utils_base.py`, and
`AddedVocabulary` of the tokenizers library).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from npgpt2.files import VOCABULARY_VALUES_LIMIT, parse_json_object, read_bounded
from npgpt2.vocabulary.special import AddedToken, SpecialTokens, Vocabulary

# What GPT-2's kind of tokenizer is called, and what any kind is called that is told by tokenizer.json alone.
GPT2_CLASS = "GPT2Tokenizer"
ANY_CLASS = ("PreTrainedTokenizer", "TokenizersBackend")
# What plain GPT-2 has for each part of tokenizer.json that changes the tokens. Where the file leaves one out,
# transformers takes the first.
PLAIN: dict[str, dict[str, tuple[Any, ...]]] = {
    "model": {
        "type": ("BPE",),
        "dropout": (None, 0),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
        "byte_fallback": (False,),
        "ignore_merges": (False,),
    },
    "pre_tokenizer": {"type": ("ByteLevel",), "use_regex": (True,)},
    "decoder": {"type": ("ByteLevel",)},
}
# Names under which settings have tokens, in the order in which transformers numbers those that are new.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
SETTINGS_FILES = ("tokenizer_config.json", "added_tokens.json", "tokenizer.json")
OPTIONS = {"lstrip": False, "rstrip": False, "single_word": False}
# What GPT-2's kind takes for the first three of them where nothing is said.
END_OF_TEXT = "<|endoftext|>"
WAY_OUT = "npgpt2 convert --no-vocab makes a model file for use with token ids"


def read_transformers(folder: Path) -> Vocabulary:
    """The vocabulary of a folder that has some of transformers' files; ValueError where it isn't GPT-2's kind."""
    path = folder / "tokenizer.json"
    saved = _read_object(path)
    settings = _read_object(folder / "tokenizer_config.json") or {}
    kind = _check_class(folder, settings, has_tokenizer_json=saved is not None)
    notes: list[str] = []
    set_by = [name for name in ("add_bos_token", "add_eos_token") if settings.get(name)]
    if saved is None:
        encoder, merges = (read_bounded(folder / name) for name in ("vocab.json", "merges.txt"))
        vocab, prefix_space = parse_json_object(encoder, str(folder / "vocab.json"), VOCABULARY_VALUES_LIMIT), False
        if set_by:
            raise ValueError(f"{folder}: {set_by[0]} is set in its tokenizer_config.json, which adds tokens; {WAY_OUT}")
    else:
        vocab, merges, prefix_space = _parse_saved(saved, str(path))
        encoder = json.dumps(vocab).encode()
        notes += [f"{folder / 'tokenizer_config.json'}: {name} adds no token, as in transformers" for name in set_by]
        if (folder / "vocab.json").is_file() and _read_object(folder / "vocab.json") != vocab:
            notes.append(f"{folder / 'vocab.json'} differs from {path.name}, which was taken, as transformers does")
    said = settings.get("add_prefix_space", False if kind == GPT2_CLASS else prefix_space)
    if not isinstance(said, bool):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: add_prefix_space is {shortened(said)}, not true or false"
        )
    if saved is not None and said != prefix_space:
        if kind != GPT2_CLASS:
            raise ValueError(
                f"{folder}: tokenizer.json and tokenizer_config.json differ in add_prefix_space; {WAY_OUT}"
            )
        notes.append(
            f"{path}: its add_prefix_space is {prefix_space}, but that of tokenizer_config.json counts: {said}"
        )
    added = _added_tokens(folder, kind, vocab, saved, settings, notes)
    return Vocabulary(encoder, merges, SpecialTokens(added, prefix_space=said), tuple(notes))


def _read_object(path: Path) -> dict[str, Any] | None:
    return parse_json_object(read_bounded(path), str(path), VOCABULARY_VALUES_LIMIT) if path.is_file() else None


def _check_class(folder: Path, settings: Mapping[str, Any], has_tokenizer_json: bool) -> str:
    """Which class of transformers reads the folder."""
    config = _read_object(folder / "config.json") or {}
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or GPT2_CLASS
    kind = str(name).removesuffix("Fast")
    if kind == GPT2_CLASS or (kind in ANY_CLASS and has_tokenizer_json):
        return kind
    raise ValueError(f"{folder}: its tokenizer is a {shortened(name)}, which is not GPT-2's; {WAY_OUT}")


# ---- The vocabulary and its merges


def _parse_saved(saved: Mapping[str, Any], source: str) -> tuple[dict[str, int], bytes, bool]:
    """What tokenizer.json says: vocabulary, merges as `vocab.bpe` has them, and whether a space comes before each text.

    Whether vocabulary and merges belong together is for `Tokenizer` to find out.
    """
    if saved.get("normalizer") is not None:
        raise ValueError(f"{source}: normalizer is {shortened(saved['normalizer'])}, where GPT-2 has none; {WAY_OUT}")
    for name, plain in PLAIN.items():
        if (part := saved.get(name)) is None and name == "decoder":
            continue
        if not isinstance(part, dict):
            raise ValueError(f"{source}: {name} is {shortened(part)}: not GPT-2's kind of vocabulary; {WAY_OUT}")
        for entry, allowed in plain.items():
            if (value := part.get(entry, allowed[0])) not in allowed:
                raise ValueError(
                    f"{source}: {name}: {entry} is {shortened(value)}, where GPT-2 has {allowed[0]!r}; this is not"
                    f" GPT-2's kind of vocabulary; {WAY_OUT}"
                )
    _check_post_processor(saved.get("post_processor"), source)
    vocab, merges = saved["model"].get("vocab"), saved["model"].get("merges")
    if not isinstance(vocab, dict) or not all(type(token) is int for token in vocab.values()):
        raise ValueError(f"{source}: model has no vocab that numbers its tokens")
    if not isinstance(merges, list):
        raise ValueError(f"{source}: merges is not a list")
    lines = ["#version: 0.2"]
    for merge in merges:  # "a b", or in newer files ["a", "b"]
        line = " ".join(merge) if isinstance(merge, list) and all(isinstance(part, str) for part in merge) else merge
        if not isinstance(line, str) or not re.fullmatch(r"\S+ \S+", line):
            raise ValueError(f"{source}: merges has {shortened(merge)}, where two tokens are expected")
        lines.append(line)
    text = "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")
    return vocab, text, bool(saved["pre_tokenizer"].get("add_prefix_space", True))


def _check_post_processor(processor: Any, source: str) -> None:
    """One that adds tokens to each text is refused; GPT-2's only says where in the text tokens are."""
    kind = processor.get("type") if isinstance(processor, dict) else processor
    if kind in (None, "ByteLevel"):
        return
    single = processor.get("single") if kind == "TemplateProcessing" else None
    if not isinstance(single, list) or [list(part) for part in single if isinstance(part, dict)] != [["Sequence"]]:
        raise ValueError(f"{source}: post_processor ({shortened(kind)}) adds tokens to each text; {WAY_OUT}")


# ---- Added tokens


def _added_tokens(
    folder: Path,
    kind: str,
    vocab: Mapping[str, int],
    saved: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    notes: list[str],
) -> tuple[AddedToken, ...]:
    """All tokens that are found by their texts, numbered as transformers does."""
    path, older_path, saved_path = (folder / name for name in SETTINGS_FILES)
    in_settings = settings.get("added_tokens_decoder")
    if in_settings is None:
        settings = dict(settings) | (_read_object(folder / "special_tokens_map.json") or {})
    named = _named_tokens(kind, settings, str(path))
    names = {token.text for token in named}
    saved_ones = list(_listed(saved.get("added_tokens", []), str(saved_path))) if saved else []
    older_ones = [
        _added({"id": number, "content": text, "special": text in names}, str(older_path))
        for text, number in (_read_object(older_path) or {}).items()
    ]
    if in_settings is None:
        declared = _joined(saved_ones, older_ones)
    elif not isinstance(in_settings, dict):
        raise ValueError(f"{path}: added_tokens_decoder is {shortened(in_settings)}, where an object is expected")
    else:
        entries = [{"id": _id(key)} | _object(entry, str(path)) for key, entry in in_settings.items()]
        declared = list(_listed(entries, str(path)))
    if kind != GPT2_CLASS:
        declared = _joined(saved_ones, declared)
    counting = {(token.text, token.id) for token in declared}
    for other, tokens in ((older_path, older_ones), (saved_path, saved_ones)):
        if any((token.text, token.id) not in counting for token in tokens):
            notes.append(f"{other}: has added tokens that differ from those that count, as in transformers")
    return tuple(_numbered(folder, vocab, declared, named))


def _joined(first: list[AddedToken], others: list[AddedToken]) -> list[AddedToken]:
    """Tokens of two lists; of two that say the same, the one of the first."""
    known = {token.text for token in first}
    return first + [token for token in others if token.text not in known]


def _numbered(
    folder: Path, vocab: Mapping[str, int], declared: list[AddedToken], named: list[AddedToken]
) -> Iterator[AddedToken]:
    """Tokens with the numbers that transformers gives them: that of the vocabulary, or else the next."""
    names, done, following = {token.text for token in named}, set(), len(vocab)
    for token in [*sorted(declared, key=lambda token: token.id), *named]:
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
        yield token._replace(id=number, special=token.special or token.text in names)


def _named_tokens(kind: str, settings: Mapping[str, Any], source: str) -> list[AddedToken]:
    """The tokens that settings name for what they do; those of no number (-1) have the vocabulary's, or the next."""
    usual = END_OF_TEXT if kind == GPT2_CLASS else None
    values: list[Any] = [settings.get(role, usual if role in ROLES[:3] else None) for role in ROLES]
    for name in EXTRA:
        if extra := settings.get(name):
            values += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else [extra]
            break
    values += [value for name, value in settings.items() if name.endswith("_token") and name not in ROLES]
    named = []
    for value in values:
        if isinstance(value, str):
            named.append(AddedToken(-1, value))
        elif isinstance(value, dict):
            named.append(_added({"id": -1} | value | {"special": True}, source))
        elif value is not None and not isinstance(value, bool):
            raise ValueError(f"{source}: has {shortened(value)}, where a token is expected")
    return [token for token in named if token.text]


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
