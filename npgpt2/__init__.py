"""GPT-2 inference in NumPy, and nothing else.

>>> import npgpt2
>>> model = npgpt2.load()
>>> model.generate("Once upon a time there", length=1)
' was'

This model comes with npgpt2. `npgpt2 download 124M` fetches OpenAI's, `npgpt2 convert` makes a file of any other. To
read how GPT-2 works, begin with `model.py` and `formulas.py`.
"""

from npgpt2.engine import Engine
from npgpt2.gpt2 import GPT2, load
from npgpt2.kernels import Tokenizer
from npgpt2.model import HParams
from npgpt2.version import __version__

__all__ = ["GPT2", "Engine", "HParams", "Tokenizer", "__version__", "load"]
