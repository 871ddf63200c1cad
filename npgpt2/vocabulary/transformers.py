"""Reads the vocabulary of a folder as Hugging Face's `transformers` does, or refuses it by name.

Many files can say the same: `tokenizer.json` has everything; older folders have `vocab.json`, `merges.txt`,
`added_tokens.json` and `special_tokens_map.json`; `tokenizer_config.json` adds to either. Which of them decides, and
how tokens are numbered that the vocabulary doesn't have, is as in transformers 5 (`tokenization_utils_base.py`, and
`AddedVocabulary` of the tokenizers library).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from npgpt2.files import VOCABULARY_VALUES_LIMIT, parse_json_object, read_bounded
from npgpt2.vocabulary.added import WAY_OUT, read_added, read_object
from npgpt2.vocabulary.special import SpecialTokens, Vocabulary

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


def read_transformers(folder: Path) -> Vocabulary:
    """The vocabulary of a folder that has some of transformers' files; ValueError where it isn't GPT-2's kind."""
    path = folder / "tokenizer.json"
    saved = read_object(path)
    settings = read_object(folder / "tokenizer_config.json") or {}
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
        if (folder / "vocab.json").is_file() and read_object(folder / "vocab.json") != vocab:
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
    if settings.get("split_special_tokens"):
        notes.append(f"{folder}: split_special_tokens is set, which --allow-special decides here")
    added = read_added(folder, vocab, saved, settings, is_gpt2=kind == GPT2_CLASS)
    return Vocabulary(encoder, merges, SpecialTokens(added.tokens, prefix_space=said), (*notes, *added.notes))


def _check_class(folder: Path, settings: Mapping[str, Any], has_tokenizer_json: bool) -> str:
    """Which class of transformers reads the folder."""
    config = read_object(folder / "config.json") or {}
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
        if name == "pre_tokenizer":
            part = _pre_tokenizer(saved)
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
    return vocab, text, bool(_pre_tokenizer(saved).get("add_prefix_space", True))


def _pre_tokenizer(saved: Mapping[str, Any]) -> Any:
    """What splits texts into words; a sequence of one is that one."""
    part = saved.get("pre_tokenizer")
    parts = part.get("pretokenizers") if isinstance(part, dict) and part.get("type") == "Sequence" else None
    return parts[0] if isinstance(parts, list) and len(parts) == 1 else part


def _check_post_processor(processor: Any, source: str) -> None:
    """One that adds tokens to each text is refused; GPT-2's only says where in the text tokens are."""
    kind = processor.get("type") if isinstance(processor, dict) else processor
    if kind in (None, "ByteLevel"):
        return
    if kind == "Sequence" and isinstance(parts := processor.get("processors"), list) and len(parts) < 10:
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "Sequence":
                _check_post_processor(part, source)
        return
    single = processor.get("single") if kind == "TemplateProcessing" else None
    if not isinstance(single, list) or [list(part) for part in single if isinstance(part, dict)] != [["Sequence"]]:
        raise ValueError(f"{source}: post_processor ({shortened(kind)}) adds tokens to each text; {WAY_OUT}")
