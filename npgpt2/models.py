"""Where model files are: the names of OpenAI's models, and the folder in which they are looked up."""

from __future__ import annotations

import os
from pathlib import Path

MODELS = ("124M", "355M", "774M", "1558M")
# What OpenAI first called them, before it counted parameters again.
ALIASES = {"117M": "124M", "345M": "355M"}


def models_folder(models_dir: str | Path | None = None) -> Path:
    """The folder for models: the one given, else $NPGPT2_MODELS, else ./models if there, else ~/.cache/npgpt2."""
    if named := models_dir or os.environ.get("NPGPT2_MODELS"):
        return Path(os.path.expanduser(os.path.expandvars(named)))
    if (here := Path("models")).is_dir():
        return here
    try:
        return Path.home() / ".cache" / "npgpt2"
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder; give --models-dir or set $NPGPT2_MODELS") from None


def find_model(model: str | Path, models_dir: str | Path | None = None) -> Path:
    """The file that a model's name or path means; FileNotFoundError says where it was looked for, and what to do.

    A name is one without a slash and without `.npz`; anything else is a path.
    """
    text = os.fspath(model)
    if text.endswith(".npz") or os.path.basename(text) != text:
        path = Path(text)
        if path.is_dir():
            raise IsADirectoryError(f"{path}: is a folder; make a model file of it with: npgpt2 convert {path}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; npgpt2 download fetches {', '.join(MODELS)}")
        return path
    folder = models_folder(models_dir)
    for name in dict.fromkeys((text, ALIASES.get(text, text))):
        if (path := folder / f"{name}.npz").is_file():
            return path
    elsewhere = f" --models-dir {models_dir}" if models_dir else ""
    if (folder / text).is_dir():
        advice = f"make it from the checkpoint there with: npgpt2 convert {folder / text}"
    elif text in MODELS or text in ALIASES:
        advice = f"get it with: npgpt2 download {text}{elsewhere}"
    else:
        advice = f"give a path to an .npz file, or download one of {', '.join(MODELS)} with: npgpt2 download NAME"
    raise FileNotFoundError(f"model {text!r} not found: there is no {folder / f'{text}.npz'}; {advice}")
