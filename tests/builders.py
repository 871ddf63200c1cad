"""Small models of known numbers, which tests build for themselves, as arrays or as model files."""

import numpy as np

import npgpt2
from npgpt2.model import HParams, variable_shapes
from npgpt2.weights.writer import write

SMALL = HParams(n_vocab=11, n_ctx=5, n_embd=8, n_head=2, n_layer=2)
# The two files as a model file keeps them, which isn't a vocabulary for SMALL, nor for any other model.
VOCABULARY = (b'{"a": 0}', b"#version: 0.2\n")


def random_arrays(hparams=SMALL, seed=0):
    """A model's variables by name, random."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in variable_shapes(hparams).items()}


def zero_arrays(hparams=SMALL):
    return {name: np.zeros(shape, np.float32) for name, shape in variable_shapes(hparams).items()}


def write_model(path, hparams=SMALL, arrays=None, vocabulary=None, dtype="float32"):
    """Write a model file, of random arrays by default; returns its path."""
    arrays = random_arrays(hparams) if arrays is None else arrays
    write(path, hparams, arrays.items(), vocabulary, dtype)
    return path


def echo_model(path, n_vocab=8, n_ctx=128):
    """A model that always says its last token again: one-hot embeddings, and layers that add nothing."""
    hparams = HParams(n_vocab, n_ctx, n_embd=n_vocab, n_head=1, n_layer=1)
    arrays = zero_arrays(hparams) | {"wte": np.eye(n_vocab, dtype=np.float32), "ln_f/g": np.ones(n_vocab, np.float32)}
    return npgpt2.load(write_model(path, hparams, arrays))


def random_tokens(model, *shape, seed=0):
    """Any of the model's tokens, as an array of this shape."""
    return np.random.default_rng(seed).integers(model.hparams.n_vocab, size=shape)


def random_model(hparams, seed=0, scale=0.3):
    """A model of random weights, without a file or a vocabulary."""
    arrays = random_arrays(hparams, seed)
    for name, array in arrays.items():
        array *= scale
        array += name.endswith("/g")
    return npgpt2.GPT2(arrays, hparams)


def arrays_of(weights):
    """A model's variables as float32 arrays, where some are in int8: each value times the scale of its output."""
    arrays = {}
    for name, array in weights.items():
        if array.dtype == np.int8:
            scales = weights[f"{name}/scales"]
            array = array * (scales[:, None] if name == "wte" else scales)
        if not name.endswith("/scales"):
            arrays[name] = array
    return arrays
