"""GPT-2 inference in NumPy, and nothing else.

>>> import npgpt2
>>> model = npgpt2.load()
>>> model.generate("Once upon a time there", length=1)
' was'

This model comes with npgpt2. `npgpt2 download 124M` fetches OpenAI's, `npgpt2 convert` makes a file of any other. To
read how GPT-2 works, begin with `model.py` and `formulas.py`.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it for true; typing's own would have to be imported
if TYPE_CHECKING:
    from npgpt2.engine import Engine
    from npgpt2.gpt2 import GPT2, load
    from npgpt2.kernels import Tokenizer
    from npgpt2.model import HParams
else:
    _HOMES = {
        "Engine": "npgpt2.engine",
        "GPT2": "npgpt2.gpt2",
        "HParams": "npgpt2.model",
        "Tokenizer": "npgpt2.kernels",
        "load": "npgpt2.gpt2",
    }

    def __getattr__(name: str) -> object:
        """Import what these names stand for when one is first used. The command begins by saying what Ctrl-C does,
        which it couldn't if Python had to import NumPy before.
        """
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        from npgpt2.forks import whole

        with whole("package"):
            value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = ["GPT2", "Engine", "HParams", "Tokenizer", "__version__", "load"]
