"""GPT-2 inference in NumPy, and nothing else.

>>> model = load("tests/fixtures/tiny.npz")                          # doctest: +SKIP
>>> model.generate("A language model", length=20, stop=".")          # doctest: +SKIP
' is a patient reader'
"""

from npgpt2.generation import GPT2, load
from npgpt2.tokenizer import Tokenizer
from npgpt2.version import __version__
from npgpt2.weights import HParams

__all__ = ["GPT2", "HParams", "Tokenizer", "__version__", "load"]
