"""Where model files are: the one that comes with npgpt2, the names of OpenAI's, and the folder where those are kept."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

from npgpt2.files import read_packaged

# OpenAI's models, and how many parameters each has.
MODELS = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}
# What OpenAI first called them, before it counted parameters again.
ALIASES = {"117M": "124M", "345M": "355M"}
# A small model for a first look, without a download: README.md in this folder says what it is.
BUNDLED = "storyteller"
# Where it is, or would be: a package needn't lie in a folder, nor have a __file__. `open_model` opens it all the same.
BUNDLED_FILE = Path(globals().get("__file__", __name__)).absolute().with_name(f"{BUNDLED}.npz")

# How files end that have weights in them which can be converted, or something that tells where such files are.
WEIGHTS_FILES = {".index", ".safetensors", ".bin", ".pt"}


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


def installed_models(models_dir: str | Path | None = None) -> dict[str, Path]:
    """The model files that can be used by name: the bundled one, then those in the models folder.

    >>> list(installed_models("no-such-folder"))
    ['storyteller']
    """
    try:
        files = sorted(models_folder(models_dir).glob("*.npz"))
    except FileNotFoundError:  # who has no folder has no models in it
        files = []
    return {BUNDLED: BUNDLED_FILE} | {path.stem: path for path in files if path.is_file() and path.stem != BUNDLED}


def open_model(path: Path) -> BinaryIO:
    """A model file, for reading. The bundled one is in memory where it is in no folder, as in a program of one file."""
    try:
        return open(path, "rb")
    except OSError:
        if path != BUNDLED_FILE:
            raise
    return io.BytesIO(read_packaged(__name__, path.name))


def file_size(path: Path) -> int:
    """A model file's size in bytes."""
    if path != BUNDLED_FILE or path.is_file():
        return path.stat().st_size
    with open_model(path) as file:
        return file.seek(0, os.SEEK_END)


def find_model(model: str | Path, models_dir: str | Path | None = None) -> Path:
    """The file that a model's name or path means; FileNotFoundError says where it was looked for, and what to do.

    A name is one without a slash and without `.npz`; anything else is a path. The bundled model's name always means
    the bundled model, so that no folder that a program happens to run in can put another in its place.
    """
    text = os.fspath(model)
    if text == BUNDLED:
        return BUNDLED_FILE
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
    elif os.path.isfile(f"{text}.npz"):
        advice = f"give the path of the one here: {text}.npz"
    elif Path(text).is_dir() and any(file.suffix in WEIGHTS_FILES for file in Path(text).glob("*")):
        advice = f"make a model file of the folder here with: npgpt2 convert {text}"
    elif text in MODELS or text in ALIASES:
        advice = f"get it with: npgpt2 download {text}{elsewhere}"
    else:
        advice = f"give a path to an .npz file, or download one of {', '.join(MODELS)} with: npgpt2 download NAME"
    raise FileNotFoundError(f"model {text!r} not found: there is no {folder / f'{text}.npz'}; {advice}")
