"""Turns a model as others publish it into a model file, one variable after another."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from reprlib import repr as shortened
from typing import Literal, NamedTuple

import numpy as np

from npgpt2.bars import Bar
from npgpt2.checks import as_path, check_whole
from npgpt2.convert.sources import TENSORS, Bytes, Source, find_hparams, open_source
from npgpt2.convert.vocabulary import find_vocabulary, read_roles, to_store
from npgpt2.formulas import Array
from npgpt2.model import HParams, variable_shapes
from npgpt2.weights import DTYPES, all_finite
from npgpt2.weights.writer import write


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
    with Bar(total=total, unit="B", unit_scale=True, desc=f"convert {source.path.name}", disable=None) as bar:
        for name, shape in shapes.items():
            array = widen(*source.read(name)).reshape(shape)
            if not all_finite(array):
                raise ValueError(f"{source.path}: variable {name} holds NaN or infinity; the model is broken")
            yield name, array
            bar.update(array.nbytes)
            del array  # before the next one is read


def default_output(source: Path) -> Path:
    """Where a model goes if nothing else is said: beside the source, under its name, with `.npz`.

    A snapshot in the cache of Hugging Face's hub is named by a hash: its model goes into the current folder, under the
    name that it has on the hub. Whoever is in that cache has to say where to, since what is there isn't theirs.

    >>> default_output(Path("run1/model-40")).as_posix()
    'run1/model-40.npz'
    >>> snapshot = Path("hub/models--distilbert--distilgpt2/snapshots/2290a62682d06624634c1f46a6ad5be0f47f38aa")
    >>> default_output(snapshot).as_posix()
    'distilgpt2.npz'
    """
    cached = re.search(r"(.*[/\\]models--([^/\\]+))[/\\]snapshots[/\\][0-9a-f]{40}\b", os.path.abspath(source))
    if cached is None:
        named = source if source.name not in ("", "..") else source.resolve()
        stem = named.stem if named.suffix in TENSORS and named.is_file() else named.name
        return named.with_name(f"{stem}.npz")
    if Path.cwd().is_relative_to(cached[1]):
        raise ValueError(f"{source}: is in the cache of Hugging Face's hub; say where to put the model with -o OUT.npz")
    return Path(cached[2].split("--")[-1] + ".npz")


class Converted(NamedTuple):
    """What `convert` wrote, whether it found a vocabulary to go with it, and sentences about what it found."""

    path: Path
    hparams: HParams
    has_vocabulary: bool
    notes: tuple[str, ...] = ()


def convert(
    source: str | Path,
    output: str | Path | None = None,
    vocabulary: str | Path | Literal[False] | None = None,
    n_head: int | None = None,
    dtype: str = "float32",
) -> Converted:
    """Convert a TensorFlow checkpoint, a Hugging Face folder or nanoGPT's `ckpt.pt` into a model file.

    source: a folder, or a checkpoint's prefix (`run1/model-40`) or file · output: the `.npz` to write, replaced if it
    is there; see `default_output` · vocabulary: the folder of `encoder.json` and `vocab.bpe` (or
    of transformers' files), by default the source's; False for none · n_head: see `find_hparams` ·
    dtype: see `writer.write`.

    Everything is checked on the way: checksums, that no variable is missing or has a shape that doesn't fit the
    hyperparameters, that all numbers are finite, that the vocabulary belongs to the model. What fails raises
    ValueError or OSError, and leaves no file. Takes as much memory as the largest variable twice, and a little.
    """
    source = as_path("source", source)
    output = output if output is None else as_path("output", output)
    vocabulary = vocabulary if vocabulary in (None, False) else as_path("vocabulary", vocabulary)
    if n_head is not None:
        check_whole("n_head", n_head, 1)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, where one of {', '.join(DTYPES)} is expected")
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
    texts = None if vocabulary is False else find_vocabulary(vocabulary or opened.folder, hparams.n_vocab)
    if texts is None and vocabulary:
        raise FileNotFoundError(f"{vocabulary}: holds no vocabulary (encoder.json and vocab.bpe)")
    if output is None:
        output = default_output(opened.path if source.is_file() else source)
    roles, said = read_roles(opened.folder, hparams.n_vocab)
    special = to_store(texts, roles)
    write(output, hparams, _read_variables(opened, shapes), texts[:2] if texts else None, dtype, special)
    notes = (*opened.notes, *(texts.notes if texts else ()), *said)
    return Converted(output, hparams, texts is not None, notes)
