"""Reads what Hugging Face's `transformers` saves of a GPT-2: `config.json`, and `model.safetensors` or
`pytorch_model.bin`.

A safetensors file is a JSON header, which says each tensor's type, shape and place, and then the numbers. What
becomes of them is in `sources.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from npgpt2.convert.pytorch import PyTorchFile, pointer
from npgpt2.files import parse_json_object, read_bounded
from npgpt2.model import HParams
from npgpt2.weights.hparams import checked

Bytes = npt.NDArray[np.uint8]

# The format's own bound on its header is 100 MB; GPT-2's takes 60 kB.
HEADER_LIMIT = 4 * 2**20
DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F64": ("float64", 8)}
# Where transformers looks for the weights, in its order: the one file, or the index of several.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# What plain GPT-2 has for each entry of config.json that changes the computation. Where the file leaves one out,
# transformers takes the first.
PLAIN: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    # All of them the same function, written in five ways.
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
# The sizes: transformers' names for them, the name that it uses for all models first, and what it takes where a file
# has neither.
HPARAMS: dict[str, tuple[tuple[str, ...], int]] = {
    "n_vocab": (("vocab_size",), 50257),
    "n_ctx": (("max_position_embeddings", "n_positions"), 1024),
    "n_embd": (("hidden_size", "n_embd"), 768),
    "n_head": (("num_attention_heads", "n_head"), 12),
    "n_layer": (("num_hidden_layers", "n_layer"), 12),
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
    sizes = {
        ours: next((config[name] for name in theirs if name in config), usual)
        for ours, (theirs, usual) in HPARAMS.items()
    }
    try:
        hparams = checked(HParams(**sizes))
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

    def read(self, name: str) -> tuple[Bytes, str]:
        """Its bytes, little-endian, and the name of its type, which must be a float; errors call it `name`."""
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.path}: tensor {name} has type {shortened(self.dtype)}, not F32, F16, BF16 or F64")
        dtype, item_size = DTYPES[self.dtype]
        if self.size != prod(self.shape) * item_size:
            raise ValueError(f"{self.path}: tensor {name} of shape {self.shape} has {self.size} bytes")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = np.fromfile(file, np.uint8, self.size)
        if len(data) != self.size:
            raise ValueError(f"{self.path}: cut short before the end of tensor {name}")
        return data, dtype


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file by name; ValueError where the header is damaged."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        size = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise pointer(path)
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


# ---- Names

# The first part of a GPT-2's own names for its tensors, behind whatever it was wrapped in when it was saved.
_OWN = re.compile(r"(?:^|(?<=\.))(h\.\d+|wte|wpe|ln_f|lm_head)\.")
_VARIABLE = re.compile(
    r"wte|wpe|ln_f/[gb]|lm_head/w|h\d+/(ln_[12]/[gb]|(attn/c_attn|attn/c_proj|mlp/c_fc|mlp/c_proj)/[wb])"
)
# What older versions save of the causal mask.
_BUFFER = re.compile(r"h\d+/attn/(b|masked_bias)")


class AnyTensor(Protocol):
    """A tensor in a file of some kind."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, name: str) -> tuple[Bytes, str]: ...


T = TypeVar("T", bound=AnyTensor)


def to_checkpoint_name(name: str) -> str:
    """A tensor's name in OpenAI's checkpoint.

    >>> to_checkpoint_name("transformer.h.11.attn.c_attn.weight")
    'h11/attn/c_attn/w'
    >>> to_checkpoint_name("_orig_mod.module.wte.weight")
    'wte'
    """
    if own := _OWN.search(name):
        name = name[own.start() :]
    name = re.sub(r"^h\.(\d+)\.", r"h\1.", name)
    name = re.sub(r"^(wte|wpe)\.weight$", r"\1", name)
    name = re.sub(r"(ln_\w)\.weight$", r"\1.g", name)
    name = re.sub(r"\.weight$", ".w", re.sub(r"\.bias$", ".b", name))
    return name.replace(".", "/")


def find_variables(tensors: Mapping[str, T], source: Path) -> dict[str, T]:
    """A GPT-2's tensors by OpenAI's names, from those that it was saved under, and without what isn't of it.

    All begin with the same prefix, whatever that is, but for the output projection, which can stand outside of the rest
    of the model. It has to be the same as `wte`, and is taken for it where that is missing. ValueError, which names
    `source`, where it is another, or where there are tensors that no GPT-2 has.
    """
    variables: dict[str, T] = {}
    prefixes: dict[str, str] = {}  # each with a name that has it
    for name, tensor in tensors.items():
        if "lora_" in name or ".base_layer." in name:
            raise ValueError(
                f"{source}: tensor {shortened(name)} is of a LoRA adapter; merge it into the model with PEFT's"
                " merge_and_unload(), and save that"
            )
        if (own := _OWN.search(name)) is None:
            continue  # other heads
        ours, prefix = to_checkpoint_name(name), name[: own.start()]
        if _BUFFER.fullmatch(ours):
            continue
        if not _VARIABLE.fullmatch(ours):
            raise ValueError(f"{source}: tensor {shortened(name)} is none of GPT-2's; this is another model")
        if ours != "lm_head/w":
            prefixes.setdefault(prefix, name)
        if ours in variables or len(prefixes) > 1:
            several = " and ".join(shortened(name) for name in [*prefixes.values(), name][:2])
            raise ValueError(f"{source}: tensors {several} are of two models; save one alone")
        variables[ours] = tensor
    head = variables.pop("lm_head/w", None)
    if head is not None and variables.setdefault("wte", head) != head:
        (embedding, kind), (projection, other) = variables["wte"].read("wte"), head.read("lm_head.weight")
        if kind != other or not np.array_equal(embedding, projection):
            raise ValueError(f"{source}: lm_head.weight differs from wte (untied head)")
    return variables


# ---- Folders


def find_weights(folder: Path) -> list[Path]:
    """The files of a folder that hold the weights, which are those that transformers would take; or none."""
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None or not name.endswith(".index.json"):
        return [folder / name] if name else []
    index = folder / name
    places = parse_json_object(read_bounded(index), str(index)).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index}: has no weight_map from tensors to files")
    for file in places.values():
        if not re.fullmatch(r"\w[\w.-]*", file):
            raise ValueError(f"{index}: {shortened(file)} is not a file of this folder")
    return [folder / file for file in sorted(set(places.values()))]


class HuggingFaceModel:
    """A folder with a GPT-2 as transformers saves it: `hparams`, `tensors` by OpenAI's names, and `read`.

    files: what holds the weights, by default what transformers would take. Files that are damaged, or hold another kind
    of model, raise ValueError; missing ones FileNotFoundError.
    """

    def __init__(self, folder: Path, files: Sequence[Path] = ()) -> None:
        self.hparams = read_config(folder / "config.json")
        files = files or find_weights(folder)
        if not files:
            raise FileNotFoundError(f"{folder}: has neither model.safetensors nor pytorch_model.bin beside config.json")
        tensors: dict[str, AnyTensor] = {}
        for path in files:
            found = read_header(path) if path.suffix == ".safetensors" else PyTorchFile(path).state_dict()
            for name, tensor in found.items():
                if name in tensors:
                    raise ValueError(f"{path}: tensor {name!r} is there twice")
                tensors[name] = tensor
        self.tensors = find_variables(tensors, files[0] if len(files) == 1 else folder)

    def read(self, name: str) -> tuple[Bytes, str]:
        """The bytes of a tensor, little-endian, and the name of its type."""
        return self.tensors[name].read(name)
