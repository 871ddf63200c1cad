"""The vocabulary of a model that is converted, and what its configuration says of its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from npgpt2.files import VOCABULARY_VALUES_LIMIT, parse_json_object, read_bounded
from npgpt2.kernels import Tokenizer
from npgpt2.tokenizer import BYTE_CHARACTERS
from npgpt2.vocabulary import END_OF_TEXT, AddedToken, SpecialTokens, Vocabulary, read_vocabulary

# A vocabulary that leaves more of a model's rows unused is another model's: at least so many, and such a share of them.
UNUSED_ROWS, UNUSED_SHARE = 1024, 4
# What transformers' GPT2Config takes for the tokens that begin and end a text where config.json says nothing.
DEFAULT_END = 50256


def find_vocabulary(folder: Path, n_vocab: int) -> Vocabulary | None:
    """The vocabulary in a folder, for a model of so many rows; None where it has none.

    One that is damaged, of another kind of tokenizer, or of another model raises ValueError.
    """
    found = read_vocabulary(folder)
    if found is None:
        return None
    tokenizer = Tokenizer(found.encoder_json, found.vocab_bpe, str(folder), found.special)
    notes = list(found.notes)
    try:
        unused = tokenizer.unused(n_vocab)
        if (rows := sum(last - first for first, last in unused)) > max(UNUSED_ROWS, n_vocab // UNUSED_SHARE):
            raise ValueError(f"the vocabulary has {len(tokenizer)} entries, but the model {n_vocab}")
        for token in tokenizer.special.added:
            if token.id >= n_vocab and not token.special:
                raise ValueError(f"the added token {token.text!r} is number {token.id}, but the model has {n_vocab}")
            if token.id >= n_vocab:
                what = f"the model has no row for {token.text!r}, number {token.id}, which is text like any other then"
                notes.append(f"{folder}: {what}")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; give the right one with --vocab DIR, or none: --no-vocab") from None
    if rows:
        notes.append(f"{rows} of the model's {n_vocab} rows belong to no token, and are never drawn")
    added = tuple(token for token in tokenizer.special.added if token.id < n_vocab)
    special = SpecialTokens(added, prefix_space=tokenizer.special.prefix_space, unused=unused)
    encoder = _with_added(found.encoder_json, special.added, n_vocab)
    return Vocabulary(encoder, found.vocab_bpe, special, tuple(notes))


def _with_added(encoder_json: bytes, added: tuple[AddedToken, ...], n_vocab: int) -> bytes:
    """The vocabulary with the tokens that were added to it, as far as the file can say them.

    For whoever reads the two files alone, such as earlier versions of npgpt2.
    """
    vocab = parse_json_object(encoder_json, "encoder.json", VOCABULARY_VALUES_LIMIT)
    known = len(vocab)
    for token in added:
        text = token.text  # where each character stands for a byte in the file
        if not set(text) <= set(BYTE_CHARACTERS):
            text = "".join(BYTE_CHARACTERS[byte] for byte in text.encode("utf-8", "replace"))
        if token.id < n_vocab:
            vocab.setdefault(text, token.id)
    return encoder_json if len(vocab) == known else json.dumps(vocab).encode()


def read_roles(folder: Path, n_vocab: int) -> tuple[SpecialTokens, list[str]]:
    """The tokens that begin, end and fill up texts, as a folder's `generation_config.json` and `config.json` say.

    Ids that the model doesn't have, such as those that a smaller vocabulary has left from GPT-2's, say nothing but a
    sentence that comes back too.
    """
    said: dict[str, Any] = {}
    notes = []
    for name in ("config.json", "generation_config.json"):
        if (path := folder / name).is_file():
            roles = parse_json_object(read_bounded(path), str(path))
            said |= {role: roles[role] for role in ("bos_token_id", "eos_token_id", "pad_token_id") if role in roles}
            said = {"bos_token_id": DEFAULT_END, "eos_token_id": DEFAULT_END} | said
    ids: dict[str, list[int]] = {}
    for role, value in said.items():
        ids[role] = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int for token in ids[role]):
            raise ValueError(f"{folder}: {role} is {shortened(value)}, where a token id is expected")
        beyond = [token for token in ids[role] if not 0 <= token < n_vocab]
        ids[role] = [token for token in ids[role] if token not in beyond]
        what = f"which the model of {n_vocab} rows doesn't have"
        notes += [f"{folder}: {role} is {token}, {what}" for token in beyond[:3] if token != DEFAULT_END]
    end = ids.get("eos_token_id", [])
    begin, pad = (next(iter(ids.get(role, [])), None) for role in ("bos_token_id", "pad_token_id"))
    never = "eos_token_id" in said and said["eos_token_id"] in (None, [])
    return SpecialTokens(end=tuple(end) if end or never else None, begin=begin, pad=pad), notes


def to_store(vocabulary: Vocabulary | None, roles: SpecialTokens) -> SpecialTokens | None:
    """What a model file has to say beside the vocabulary's two files; None where GPT-2's habits say it all."""
    ids = parse_json_object(vocabulary.encoder_json, "encoder.json", VOCABULARY_VALUES_LIMIT) if vocabulary else {}
    usual = ids.get(END_OF_TEXT)
    special = (vocabulary.special if vocabulary else None) or SpecialTokens()
    special = SpecialTokens(
        special.added,
        None if usual is not None and roles.end == (usual,) else roles.end,
        None if usual is not None and roles.begin == usual else roles.begin,
        roles.pad,
        special.prefix_space,
        special.unused,
    )
    plain = SpecialTokens(() if usual is None else (AddedToken(usual, END_OF_TEXT),))
    return None if special == plain else special
