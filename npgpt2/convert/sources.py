"""What a path holds that is to be converted: which kind of model, and of which sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from npgpt2.convert.checkpoint import Checkpoint, find_prefix
from npgpt2.convert.huggingface import HuggingFaceModel
from npgpt2.files import read_bounded
from npgpt2.model import HParams
from npgpt2.weights.hparams import checked, parse_hparams

Bytes = npt.NDArray[np.uint8]


@dataclass
class Source:
    """A model to convert: its own hyperparameters where it states them, and its variables under OpenAI's names."""

    path: Path
    folder: Path
    hparams: HParams | None
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], tuple[Bytes, str]]


def _tensorflow(prefix: Path) -> Source:
    checkpoint = Checkpoint(prefix)
    hparams_path = prefix.parent / "hparams.json"
    hparams = parse_hparams(read_bounded(hparams_path), str(hparams_path)) if hparams_path.is_file() else None
    shapes = {}
    for name, entry in checkpoint.entries.items():
        if name.startswith("model/"):
            if entry.sliced:
                raise ValueError(f"{prefix}: variable {name} is sliced (partitioned); save it whole with TensorFlow")
            # OpenAI computes its linear layers as convolutions of width 1, with weights of shape (1, in, out).
            convolution = len(entry.shape) == 3 and entry.shape[0] == 1
            shapes[name.removeprefix("model/")] = entry.shape[1:] if convolution else entry.shape
    return Source(prefix, prefix.parent, hparams, shapes, lambda name: checkpoint.read(f"model/{name}"))


def _hugging_face(folder: Path, file: Path | None = None) -> Source:
    model = HuggingFaceModel(folder)
    if file is not None and file not in {tensor.path for tensor in model.tensors.values()}:
        raise ValueError(f"{file}: is not the model of {folder}; give the folder of a file called model.safetensors")
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    return Source(folder, folder, model.hparams, shapes, model.read)


def open_source(path: Path) -> Source:
    """Find out what kind of model a path is, and open it."""
    if not path.exists() and (prefix := find_prefix(path)) is None:
        raise FileNotFoundError(f"{path}: no such folder, nor a checkpoint of this name ({path.name}.index)")
    if path.suffix == ".safetensors" and path.is_file():
        return _hugging_face(path.parent, path)
    if (path / "config.json").is_file():
        return _hugging_face(path)
    if (prefix := find_prefix(path)) is None:
        expected = "a TensorFlow checkpoint (*.index) or a Hugging Face model (config.json, model.safetensors)"
        raise FileNotFoundError(f"{path}: holds no model; {expected} is expected")
    return _tensorflow(prefix)


def find_hparams(source: Source, n_head: int | None) -> HParams:
    """The source's hyperparameters, or those that its shapes show; ValueError where the two contradict each other.

    n_head: how many heads the model has, which no shape shows; for sources that don't state their hyperparameters.
    """
    layers = {match[1] for name in source.shapes if (match := re.match(r"h(\d+)/", name))}
    if not layers:
        raise ValueError(f"{source.path}: has no variables of GPT-2's layers (h0/…); this is not a GPT-2")
    if source.hparams is None:
        for name in ("wte", "wpe"):
            if len(source.shapes.get(name, ())) != 2:
                raise ValueError(f"{source.path}: variable {name} is missing, or not a matrix; this is not a GPT-2")
        if n_head is None:
            raise ValueError(f"{source.folder}: has no hparams.json; say how many heads the model has with --n-head N")
        (n_vocab, n_embd), (n_ctx, _) = source.shapes["wte"], source.shapes["wpe"]
        return checked(HParams(n_vocab, n_ctx, n_embd, n_head, len(layers)))
    if n_head not in (None, source.hparams.n_head):
        raise ValueError(f"{source.folder}: n_head is {source.hparams.n_head} there, but {n_head} was asked for")
    if len(layers) != source.hparams.n_layer:
        raise ValueError(
            f"{source.path}: holds {len(layers)} layers, but n_layer is {source.hparams.n_layer} in its hyperparameters"
        )
    return source.hparams
