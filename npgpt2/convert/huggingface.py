"""Reads what Hugging Face's `transformers` saves of a GPT-2: `config.json` and `model.safetensors`.

A safetensors file is a JSON header, which says each tensor's type, shape and place, and then the numbers. What
becomes of them is in `sources.py`.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from npgpt2.files import parse_json_object, read_bounded
from npgpt2.model import HParams
from npgpt2.weights.hparams import checked

Bytes = npt.NDArray[np.uint8]

# The format's own bound on its header is 100 MB; GPT-2's takes 60 kB.
HEADER_LIMIT = 4 * 2**20
DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}

# What plain GPT-2 has for each entry of config.json that changes the computation. Where the file leaves one out,
# transformers takes the first.
PLAIN: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}


def _require_plain(values: dict[str, Any], plain: dict[str, tuple[Any, ...]], source: str) -> None:
    """Raise ValueError for the first of the values that isn't what plain GPT-2 has."""
    for name, allowed in plain.items():
        value = values.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{source}: {name} is {shortened(value)}, where GPT-2 has {allowed[0]!r}; this is another model"
            )


def read_config(path: Path) -> HParams:
    """The hyperparameters in a `config.json`; ValueError where it describes anything but plain GPT-2."""
    config = parse_json_object(read_bounded(path), str(path))
    _require_plain(config, PLAIN, str(path))
    missing = [name for name in HPARAMS.values() if name not in config]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing")
    try:
        hparams = checked(HParams(**{ours: config[theirs] for ours, theirs in HPARAMS.items()}))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _require_plain(config, {"n_inner": (4 * hparams.n_embd, None)}, str(path))
    return hparams


class Tensor(NamedTuple):
    """Where a tensor lies: `offset` counts from the start of the file `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file by name; ValueError where the header is damaged."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or size > HEADER_LIMIT:
            raise ValueError(f"{path}: not a safetensors file, or cut short")
        header = parse_json_object(file.read(size), f"{path}: header")
        end = file.seek(0, 2)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, start, stop)
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{path}: tensor {name!r} is not described properly") from None
        if (
            not isinstance(dtype, str)
            or not all(type(number) is int and number >= 0 for number in numbers)
            or len(shape) > 8
            or stop < start
        ):
            raise ValueError(f"{path}: tensor {name!r} has the impossible type, shape or place {shortened(entry)}")
        if 8 + size + stop > end:
            raise ValueError(f"{path}: {end:,} bytes, cut short before the end of tensor {name!r}")
        tensors[name] = Tensor(path, dtype, shape, 8 + size + start, stop - start)
    return tensors


def to_checkpoint_name(name: str) -> str:
    """A tensor's name in OpenAI's checkpoint.

    >>> to_checkpoint_name("transformer.h.11.attn.c_attn.weight")
    'h11/attn/c_attn/w'
    >>> to_checkpoint_name("wte.weight")
    'wte'
    """
    name = name.removeprefix("transformer.")
    name = re.sub(r"^h\.(\d+)\.", r"h\1.", name)
    name = re.sub(r"^(wte|wpe)\.weight$", r"\1", name)
    name = re.sub(r"(ln_\w)\.weight$", r"\1.g", name)
    name = re.sub(r"\.weight$", ".w", re.sub(r"\.bias$", ".b", name))
    return name.replace(".", "/")


class HuggingFaceModel:
    """A folder with a GPT-2 as transformers saves it: `hparams`, `tensors` by OpenAI's names, and `read`.

    Files that are damaged, or hold another kind of model, raise ValueError; missing ones FileNotFoundError.
    """

    def __init__(self, folder: Path) -> None:
        self.hparams = read_config(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            places = parse_json_object(read_bounded(index), str(index)).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
                raise ValueError(f"{index}: has no weight_map from tensors to files")
            files = sorted(set(places.values()))
        else:
            files = ["model.safetensors"]
        self.tensors: dict[str, Tensor] = {}
        for file in files:
            if not re.fullmatch(r"\w[\w.-]*", file):
                raise ValueError(f"{index}: {shortened(file)} is not a file of this folder")
            for name, tensor in read_header(folder / file).items():
                if (ours := to_checkpoint_name(name)) in self.tensors:
                    raise ValueError(f"{tensor.path}: tensor {name!r} is there twice")
                self.tensors[ours] = tensor
        self._refuse_untied_head()

    def _refuse_untied_head(self) -> None:
        """Some files hold the output projection too; it has to be `wte`."""
        if "lm_head/w" in self.tensors and "wte" in self.tensors:
            head, wte = self.read("lm_head/w"), self.read("wte")
            if head[1] != wte[1] or not np.array_equal(head[0], wte[0]):
                raise ValueError(f"{self.tensors['lm_head/w'].path}: lm_head.weight differs from wte (untied head)")

    def read(self, name: str) -> tuple[Bytes, str]:
        """The bytes of a tensor, little-endian, and the name of its type."""
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{tensor.path}: tensor {name} has type {shortened(tensor.dtype)}, not F32, F16 or BF16")
        dtype, item_size = DTYPES[tensor.dtype]
        if tensor.size != prod(tensor.shape) * item_size:
            raise ValueError(f"{tensor.path}: tensor {name} of shape {tensor.shape} has {tensor.size} bytes")
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset)
            data = np.fromfile(file, np.uint8, tensor.size)
        if len(data) != tensor.size:
            raise ValueError(f"{tensor.path}: cut short before the end of tensor {name}")
        return data, dtype
