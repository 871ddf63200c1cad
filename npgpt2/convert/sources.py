"""What a path holds that is to be converted: which kind of model, and of which sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from npgpt2.convert.checkpoint import Checkpoint, find_prefix
from npgpt2.convert.huggingface import AnyTensor, HuggingFaceModel, find_variables, find_weights
from npgpt2.convert.pytorch import PyTorchFile
from npgpt2.files import read_bounded
from npgpt2.model import HParams
from npgpt2.weights.hparams import checked, parse_hparams

Bytes = npt.NDArray[np.uint8]

# How the names of files that hold tensors end, the first being safetensors' and the others those of torch.save.
TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# What nanoGPT's `model_args` have, by our names; and what else they have, which changes no forward pass.
MODEL_ARGS = {
    "n_vocab": "vocab_size",
    "n_ctx": "block_size",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
OTHER_ARGS = {"bias", "dropout"}
NANOGPT_GELU = (
    "nanoGPT since May 2023 computes GELU by erf, and npgpt2 as GPT-2 does, by tanh: if this model was trained so, its"
    " activations differ by up to 0.0005 here, and now and then a token"
)
ADAPTER = (
    "a PEFT adapter (LoRA or another), which is not a whole model",
    "merge it with AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)",
)
# Files of other kinds: what they are, and what makes something of them that can be converted.
FOREIGN = {
    "adapter_config.json": ADAPTER,
    "adapter_model.*": ADAPTER,
    "openvino_model.*": ("a model in OpenVINO's format", "convert what it was exported from"),
    "rust_model.ot": ("a model in the format of rust-bert", "convert what it was exported from"),
    "*.tflite": ("a model in TensorFlow Lite's format", "convert what it was exported from"),
    "*.mlpackage": ("a model in Core ML's format", "convert what it was exported from"),
    "*.gguf": (
        "a model in llama.cpp's format",
        "convert what it was made from, or save it again with transformers:"
        " AutoModelForCausalLM.from_pretrained(…, gguf_file=…).save_pretrained(…)",
    ),
    "*.onnx": ("a model in ONNX's format", "convert what it was exported from"),
    "onnx/*.onnx": ("a model in ONNX's format", "convert what it was exported from"),
    "flax_model*.msgpack": (
        "Flax's weights",
        "save them again with transformers 4:"
        " AutoModelForCausalLM.from_pretrained(…, from_flax=True).save_pretrained(…)",
    ),
    "tf_model*.h5": (
        "TensorFlow 2's weights",
        "save them again with transformers 4: AutoModelForCausalLM.from_pretrained(…, from_tf=True).save_pretrained(…)",
    ),
}


@dataclass
class Source:
    """A model to convert: its own hyperparameters where it states them, and its variables under OpenAI's names.

    notes: what whoever converts it should know.
    """

    path: Path
    folder: Path
    hparams: HParams | None
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], tuple[Bytes, str]]
    notes: tuple[str, ...] = ()


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


def _source(path: Path, folder: Path, hparams: HParams | None, tensors: Mapping[str, AnyTensor]) -> Source:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return Source(path, folder, hparams, shapes, lambda name: tensors[name].read(name))


def _hugging_face(folder: Path, file: Path | None = None) -> Source:
    """file: the one to read, where it isn't one of those that transformers would take."""
    weights = find_weights(folder)
    if file is None and not weights:
        refuse_foreign(folder)
    path = folder if file is None or file in weights else file
    model = HuggingFaceModel(folder, weights if path == folder else [path])
    return _source(path, folder, model.hparams, model.tensors)


class _Zeros(NamedTuple):
    """A bias that a model doesn't have."""

    shape: tuple[int, ...]

    def read(self, name: str) -> tuple[Bytes, str]:
        return np.zeros(4 * prod(self.shape), np.uint8), "float32"


def _pytorch(path: Path) -> Source:
    """What a program that trains saved with torch.save: nanoGPT's `ckpt.pt`, or a model's state_dict() and no more."""
    file = PyTorchFile(path)
    tensors = find_variables(file.state_dict(), path)
    arguments = file.saved.get("model_args")
    hparams = None if arguments is None else _read_model_args(arguments, f"{path}: model_args")
    # nn.Linear's weights are (out, in), where OpenAI's and transformers' are (in, out). Which of the two a model has is
    # plain from one that isn't square.
    rows, columns = [*(first.shape if (first := tensors.get("h0/attn/c_attn/w")) else ()), 0, 0][:2]
    if arguments is None and rows != 3 * columns:
        return _source(path, path.parent, hparams, tensors)
    variables: dict[str, AnyTensor] = {
        name: tensor.transposed if name.endswith("/w") else tensor for name, tensor in tensors.items()
    }
    biases = [name for name in variables if name.endswith("/b")]
    if biases and arguments and arguments.get("bias") is False:
        raise ValueError(f"{path}: model_args: bias is False, but {biases[0]} is there")
    if not biases and not (arguments and arguments.get("bias", True)):
        variables |= {
            f"{name[:-2]}/b": _Zeros(tensor.shape[-1:])
            for name, tensor in variables.items()
            if name[-2:] in ("/w", "/g")
        }
    source = _source(path, path.parent, hparams, variables)
    source.notes = (NANOGPT_GELU,)
    return source


def _read_model_args(arguments: Any, source: str) -> HParams:
    """The hyperparameters in nanoGPT's `model_args`; ValueError, which names `source`, where there are others."""
    if type(arguments) is not dict:
        raise ValueError(f"{source}: is {shortened(arguments)}, where a dictionary is expected")
    for name in arguments:
        if name not in {*MODEL_ARGS.values(), *OTHER_ARGS}:
            raise ValueError(
                f"{source}: nanoGPT has no {shortened(name)}; if this is a GPT-2 all the same, save the state_dict()"
                " alone, and convert that with --n-head N"
            )
    for name in MODEL_ARGS.values():
        if name not in arguments:
            raise ValueError(f"{source}: {name} is missing")
    try:
        return checked(HParams(**{ours: arguments[theirs] for ours, theirs in MODEL_ARGS.items()}))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def refuse_foreign(path: Path) -> None:
    """ValueError where a file, or a file of a folder, is of a kind that we don't read: what it is, and the way out."""
    for pattern, (kind, advice) in FOREIGN.items():
        found = path if path.is_file() and path.match(pattern) else next(iter(sorted(path.glob(pattern))), None)
        if found is not None:
            raise ValueError(f"{found}: is {kind}; {advice}")


def open_source(path: Path) -> Source:
    """Find out what kind of model a path is, and open it."""
    if not path.exists() and find_prefix(path) is None:
        raise FileNotFoundError(f"{path}: no such folder, nor a checkpoint of this name ({path.name}.index)")
    folder = path.parent if path.is_file() else path
    if (folder / "adapter_config.json").is_file():  # even beside a whole model, since transformers then takes both
        refuse_foreign(folder)
    if path.suffix in TENSORS and path.is_file() and find_prefix(path) is None:
        with_config = path.suffix == ".safetensors" or (path.suffix == ".bin" and (folder / "config.json").is_file())
        return _hugging_face(folder, path) if with_config else _pytorch(path)
    if (path / "config.json").is_file():
        return _hugging_face(path)
    if (prefix := find_prefix(path)) is not None:
        return _tensorflow(prefix)
    if (path / "ckpt.pt").is_file():
        return _pytorch(path / "ckpt.pt")
    refuse_foreign(path)
    raise FileNotFoundError(
        f"{path}: holds no model; a TensorFlow checkpoint (*.index), a Hugging Face model (config.json, and"
        " model.safetensors or pytorch_model.bin) or nanoGPT's ckpt.pt is expected"
    )


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
            raise ValueError(
                f"{source.folder}: nothing there says how many heads the model has; say it with --n-head N"
            )
        (n_vocab, n_embd), (n_ctx, _) = source.shapes["wte"], source.shapes["wpe"]
        return checked(HParams(n_vocab, n_ctx, n_embd, n_head, len(layers)))
    if n_head not in (None, source.hparams.n_head):
        raise ValueError(f"{source.folder}: n_head is {source.hparams.n_head} there, but {n_head} was asked for")
    if len(layers) != source.hparams.n_layer:
        raise ValueError(
            f"{source.path}: holds {len(layers)} layers, but n_layer is {source.hparams.n_layer} in its hyperparameters"
        )
    return source.hparams
