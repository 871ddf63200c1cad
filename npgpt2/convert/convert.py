"""Turns a model as others publish it into a model file: from TensorFlow's checkpoints and Hugging Face's folders.

This runs once for a model. Nothing that runs a model imports it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from reprlib import repr as shortened
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from npgpt2.convert.checkpoint import Checkpoint, find_prefix
from npgpt2.convert.huggingface import HuggingFaceModel, read_tokenizer
from npgpt2.files import read_bounded
from npgpt2.kernels.kernels import Array
from npgpt2.model import HParams, variable_shapes
from npgpt2.tokenizer import Tokenizer, read_vocabulary
from npgpt2.weights import reader as weights
from npgpt2.weights.hparams import checked, parse_hparams
from npgpt2.weights.writer import write

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


def find_vocabulary(folder: Path, n_vocab: int) -> tuple[bytes, bytes] | None:
    """The contents of `encoder.json` and `vocab.bpe` for the vocabulary in a folder; None where it has none.

    A vocabulary that is damaged or doesn't have `n_vocab` entries raises ValueError.
    """
    texts, newer = read_vocabulary(folder), folder / "tokenizer.json"
    if texts is None and newer.is_file():
        texts = read_tokenizer(newer)
    if texts is not None and (found := len(Tokenizer(*texts, source=str(folder)))) != n_vocab:
        raise ValueError(
            f"{folder}: the vocabulary has {found} entries, but the model {n_vocab};"
            " give the right one with --vocab DIR"
        )
    return texts


def widen(data: Bytes, dtype: str) -> Array:
    """Little-endian numbers of one of the types that weights come in, as float32; those of that type aren't copied."""
    if dtype == "bfloat16":  # the upper half of a float32
        wide = data.view("<u2").astype("<u4")
        wide <<= 16
        return wide.view("<f4").astype(np.float32, copy=False)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is refused by name
        return data.view({"float32": "<f4", "float64": "<f8", "float16": "<f2"}[dtype]).astype(np.float32, copy=False)


def _read_variables(source: Source, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Array]]:
    """The variables one after another, so that no more than one is in memory."""
    total = sum(4 * prod(shape) for shape in shapes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"convert {source.path.name}", disable=None) as bar:
        for name, shape in shapes.items():
            array = widen(*source.read(name)).reshape(shape)
            if not weights.all_finite(array):
                raise ValueError(f"{source.path}: variable {name} holds NaN or infinity; the model is broken")
            yield name, array
            bar.update(array.nbytes)
            del array  # before the next one is read


class Converted(NamedTuple):
    """What `convert` wrote, and whether it found a vocabulary to go with it."""

    path: Path
    hparams: HParams
    has_vocabulary: bool


def convert(
    source: Path,
    output: Path | None = None,
    vocabulary: Path | None = None,
    n_head: int | None = None,
    dtype: str = "float32",
) -> Converted:
    """Convert a TensorFlow checkpoint or a Hugging Face folder into a model file.

    source: a folder, or a checkpoint's prefix (`run1/model-40`) or file · output: the `.npz` to write, replaced if it
    is there; by default the source's name beside it · vocabulary: the folder of `encoder.json` and `vocab.bpe` (or
    `vocab.json` and `merges.txt`, or `tokenizer.json`), by default the source's · n_head: see `find_hparams` ·
    dtype: see `writer.write`.

    Everything is checked on the way: checksums, that no variable is missing or has a shape that doesn't fit the
    hyperparameters, that all numbers are finite, that the vocabulary belongs to the model. What fails raises
    ValueError or OSError, and leaves no file. Takes as much memory as the largest variable twice, and a little.
    """
    opened = open_source(source)
    hparams = find_hparams(opened, n_head)
    shapes = variable_shapes(hparams)
    for name, shape in shapes.items():
        if name not in opened.shapes:
            raise ValueError(f"{opened.path}: variable {name} is missing")
        if (found := opened.shapes[name]) != shape:
            raise ValueError(
                f"{opened.path}: variable {name} has shape {shortened(found)}, where {shape} is expected ({hparams})"
            )
    texts = find_vocabulary(vocabulary or opened.folder, hparams.n_vocab)
    if texts is None and vocabulary:
        raise FileNotFoundError(f"{vocabulary}: holds no vocabulary (encoder.json and vocab.bpe)")
    if output is None:
        named = opened.path if source.is_file() else source
        named = named if named.name not in ("", "..") else named.resolve()
        output = named.with_name(named.name + ".npz")
    write(output, hparams, _read_variables(opened, shapes), texts, dtype)
    return Converted(output, hparams, texts is not None)
