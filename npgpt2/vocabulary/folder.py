"""A folder's vocabulary, by the names of the files that are there."""

from __future__ import annotations

from pathlib import Path

from npgpt2.files import read_bounded
from npgpt2.vocabulary.special import Vocabulary

# Files of tokenizers that work otherwise, and what those are called.
OTHER_KINDS = {
    "vocab.txt": "WordPiece, as BERT's",
    "spiece.model": "SentencePiece",
    "tokenizer.model": "SentencePiece",
    "sentencepiece.bpe.model": "SentencePiece",
}
# What says how the tokens of vocab.json are made of each other.
BESIDE = ("merges.txt", "tokenizer.json")


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary in a folder: OpenAI's `encoder.json` and `vocab.bpe`, or the files that transformers would read.

    None where there is none. Of two files that belong together, one without the other raises FileNotFoundError; what
    is damaged, or describes anything but byte pair encoding as GPT-2's, ValueError.
    """
    ours = folder / "encoder.json", folder / "vocab.bpe"
    if any(path.is_file() for path in ours):
        encoder, merges = map(read_bounded, ours)
        return Vocabulary(encoder, merges)
    if (folder / "vocab.json").is_file() and not any((folder / other).is_file() for other in BESIDE):
        raise FileNotFoundError(
            f"{folder}: has vocab.json, but neither merges.txt nor tokenizer.json, which belong to it"
        )
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")):
        from npgpt2.vocabulary.transformers import read_transformers  # which only these folders need

        return read_transformers(folder)
    for name, kind in OTHER_KINDS.items():
        if (folder / name).is_file():
            raise ValueError(
                f"{folder / name}: the vocabulary of another kind of tokenizer ({kind}), which is not GPT-2's;"
                " npgpt2 convert --no-vocab makes a model file for use with token ids"
            )
    return None
