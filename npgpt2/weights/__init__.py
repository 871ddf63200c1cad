"""The model file: a model's sizes, variables and vocabulary, opened in milliseconds and checked before they are used;
and writing one. It knows how numbers are stored, and leaves out what is computed with them (`kernels`), where model
files are kept (`models`), and the formats that others publish models in (`convert`).

`Weights` is an open file, a mapping from names to arrays; `writer.write` makes one, in one of `DTYPES`, with the texts
of `VOCABULARY_FILES`. `parse_hparams` and `checked` refuse sizes that no GPT-2 can have, and `all_finite` finds numbers
that no model can have. `quantize` is how matrices are rounded to int8.
"""

from npgpt2.weights.hparams import checked, parse_hparams
from npgpt2.weights.int8 import quantize
from npgpt2.weights.reader import DTYPES, VOCABULARY_FILES, Weights, all_finite

__all__ = [
    "DTYPES",
    "VOCABULARY_FILES",
    "Weights",
    "all_finite",
    "checked",
    "parse_hparams",
    "quantize",
]
