"""What a model's tokens are, as files say it: the vocabulary in a folder, and what a model file keeps of it.

A `Vocabulary` is OpenAI's two files and the `SpecialTokens`: what stands outside of byte pair encoding, such as tokens
that were added later, and what begins and ends a text. `read_vocabulary` finds them in a folder, whether OpenAI's code
or transformers wrote it. How text becomes tokens is in `tokenizer.py`.
"""

from npgpt2.vocabulary.folder import read_vocabulary
from npgpt2.vocabulary.special import END_OF_TEXT, AddedToken, AddedTokens, Ranges, SpecialTokens, Vocabulary, ranges_of

__all__ = [
    "END_OF_TEXT",
    "AddedToken",
    "AddedTokens",
    "Ranges",
    "SpecialTokens",
    "Vocabulary",
    "ranges_of",
    "read_vocabulary",
]
