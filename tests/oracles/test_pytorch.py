"""npgpt2 against PyTorch: whatever torch.save writes of a state dict, what it is after damage, and models that people
have, in the shapes and files that they have them in.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from builders import random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_model
from test_fuzz import survey
from transformers.activations import ACT2FN

import npgpt2
from npgpt2.convert import convert
from npgpt2.convert.huggingface import PLAIN
from npgpt2.convert.pytorch import FLOATS, PyTorchFile

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Both compute in float32.
TOLERANCE = 5e-5

# ---- Tensors

TYPES_WITH_STORAGES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
                       torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip
# The others can't be read from files of the older format by PyTorch itself.
TYPES = [*TYPES_WITH_STORAGES, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]


@st.composite
def tensors(draw, known, types):
    """A tensor of any type and shape, and views of it or of one that is known already."""
    if known and draw(st.booleans()):
        tensor = draw(st.sampled_from(known))
    else:
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        tensor = torch.randint(0, 2, shape) if draw(st.booleans()) else torch.randn(shape) * 10
        tensor = tensor.to(draw(st.sampled_from(types)))
    for change in draw(st.lists(st.sampled_from(["transpose", "slice", "step", "expand", "flatten"]), max_size=3)):
        if change == "transpose" and tensor.ndim > 1:
            tensor = tensor.transpose(0, draw(st.integers(1, tensor.ndim - 1)))
        elif change == "slice" and tensor.ndim:
            start = draw(st.integers(0, tensor.shape[-1]))
            tensor = tensor[..., start : draw(st.integers(start, tensor.shape[-1]))]
        elif change == "step" and tensor.ndim:
            tensor = tensor[:: draw(st.integers(1, 3))]
        elif change == "expand" and tensor.ndim < 4:
            tensor = tensor.expand(draw(st.integers(0, 3)), *tensor.shape)
        elif change == "flatten" and tensor.is_contiguous():
            tensor = tensor.view(-1)
    return tensor


@st.composite
def state_dicts(draw, types):
    """Tensors and parameters by name, buffers, and tensors with attributes; some of them several times."""
    found, known = {}, []
    for number in range(draw(st.integers(0, 6))):
        tensor = draw(tensors(known, types))
        known.append(tensor)
        dressed = draw(st.sampled_from(["plain", "parameter", "buffer", "attribute"]))
        if dressed == "parameter" and tensor.is_floating_point():
            tensor = torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
        elif dressed == "buffer":
            tensor = torch.nn.Buffer(tensor.detach())
        elif dressed == "attribute":
            tensor = tensor.detach()
            tensor.note = {"why": [1, 2.5, None]}
        found[draw(st.sampled_from(["a.weight", "b", "é"])) + str(number)] = tensor
    return found


@pytest.mark.parametrize("form", ["zip", "zip without checksums", "before 1.6"])
def test_every_state_dict_is_what_torch_load_reads(form, tmp_path):
    path = tmp_path / "x.pt"

    @settings(max_examples=500, derandomize=True, deadline=None)
    @given(state_dicts(TYPES if form != "before 1.6" else TYPES_WITH_STORAGES))
    def run(saved):
        torch.serialization.set_crc32_options(form != "zip without checksums")
        try:
            torch.save(saved, path, _use_new_zipfile_serialization=form != "before 1.6")
        finally:
            torch.serialization.set_crc32_options(True)
        theirs = torch.load(path, weights_only=True)
        file = PyTorchFile(path)
        ours = file.state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.shape == tuple(theirs[name].shape)
            assert tensor.view.dtype == str(theirs[name].dtype).removeprefix("torch.")
            assert file.read(tensor.view).tobytes() == bytes_of(theirs[name])
            if tensor.view.dtype in FLOATS:
                assert tensor.read(name)[1] == tensor.view.dtype

    run()


def bytes_of(tensor):
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_module():
    """A module with what a state dict can have: shared, transposed and sliced weights, buffers, several types."""
    module = torch.nn.Module()
    module.wte = torch.nn.Embedding(11, 8)
    module.head = torch.nn.Linear(8, 11, bias=False)
    module.head.weight = module.wte.weight
    module.turned = torch.nn.Parameter(torch.randn(6, 4).T)
    module.cropped = torch.nn.Parameter(torch.randn(9, 5)[2:6, 1:4])
    module.rounded = torch.nn.Parameter(torch.randn(7).half())
    module.brain = torch.nn.Parameter(torch.randn(3, 3).bfloat16())
    module.register_buffer("mask", torch.tril(torch.ones(4, 4, dtype=torch.bool)))
    return module


def saved_with_optimizer(path, **how):
    module = random_module()
    optimizer = torch.optim.AdamW(module.parameters(), fused=False)
    sum((parameter.float() ** 2).sum() for parameter in module.parameters()).backward()
    optimizer.step()
    sizes = {"n_layer": 12, "dropout": 0.0, "bias": False, "shape": torch.Size((2, 3)), "device": torch.device("cpu")}
    others = {"iter_num": 2000, "best_val_loss": torch.tensor(1.5), "config": {"dtype": "bfloat16", "lr": 6e-4}}
    saved = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "model_args": sizes} | others
    torch.save(saved, path, **how)
    return path.read_bytes()


def outcome_at(path):
    def outcome(contents):
        path.unlink(missing_ok=True)
        path.write_bytes(contents)
        file = PyTorchFile(path)
        return {name: (t.shape, file.read(t.view).tobytes()) for name, t in file.state_dict().items()}

    return outcome


def test_10_000_damaged_checkpoints_are_refused_or_hold_the_same_tensors(tmp_path):
    data, outcome = saved_with_optimizer(tmp_path / "ckpt.pt"), outcome_at(tmp_path / "ckpt.pt")
    theirs = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    expected = outcome(data)
    assert expected == {name: (tuple(tensor.shape), bytes_of(tensor)) for name, tensor in theirs.items()}
    refused, same = survey(data, np.arange(len(data)), outcome, expected, seed=1, cases=10_000)
    assert refused > 5000 < same + 5000


def test_damaged_checkpoints_of_before_1_6_are_refused_in_one_line_or_read(tmp_path):
    """They have no checksums."""
    data = saved_with_optimizer(tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    refused, _ = survey(data, np.arange(len(data)), outcome_at(tmp_path / "ckpt.pt"), None, seed=2, cases=3000)
    assert refused > 1000


# ---- Models that people have


def config_of(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(folder)


def make_model(config):
    """A model whose every parameter is random: as made, biases are zero and gains one, which hides mistakes."""
    model = transformers.GPT2LMHeadModel(config).eval()
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.from_numpy(rng.normal(".ln_" in name and name.endswith("weight"), 0.2, parameter.shape))
            )
    return model


def assert_same_model(ours, theirs, tolerance=TOLERANCE):
    """Equal logits, and the same greedy tokens."""
    tokens = random_tokens(ours, 2, min(40, ours.hparams.n_ctx // 2))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(ours.logits(tokens) - logits).max() < tolerance
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    ids = torch.from_numpy(tokens)
    whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    assert ours.generate_tokens(tokens, length=8).tolist() == whole[:, tokens.shape[1] :].tolist()


# What their config.json has, but for n_embd, n_head and n_layer, which are smaller here.
SUMMARY = {"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
           "summary_type": "cls_index", "summary_use_proj": True}  # fmt: skip
COMMON = {"architectures": ["GPT2LMHeadModel"], "bos_token_id": 50256, "eos_token_id": 50256, "initializer_range": 0.02,
          "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_embd": 24, "vocab_size": 50257} | SUMMARY  # fmt: skip
DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
CONFIGS = {
    "DialoGPT-small": {
        "activation_function": "gelu_new", "n_ctx": 1024, "n_head": 12, "n_layer": 4, "n_positions": 1024,
        "task_specific_params": {"conversational": {"max_length": 1000}},
    } | COMMON | DROPOUT,
    "distilgpt2": {
        "_num_labels": 1, "activation_function": "gelu_new", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
        "n_ctx": 1024, "n_head": 12, "n_layer": 2, "n_positions": 1024,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    } | COMMON | DROPOUT,
    "Cerebras-GPT-111M": {
        "activation_function": "gelu", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "n_head": 12, "n_inner": 96, "n_layer": 3,
        "n_positions": 2048, "reorder_and_upcast_attn": False, "resid_pdrop": 0.0, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "torch_dtype": "float32", "use_cache": True,
    } | COMMON,
}  # fmt: skip


@pytest.mark.parametrize("form", ["pytorch_model.bin", "pytorch_model.bin before 1.6", "model.safetensors"])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_the_shapes_that_people_have(name, form, tmp_path):
    folder, config = tmp_path / name, dict(CONFIGS[name])
    if name.startswith("Cerebras"):  # whose GELU is another function
        config["activation_function"] = "gelu_pytorch_tanh"
    theirs = make_model(config_of(folder, config))
    if form == "model.safetensors":
        save_model(theirs, str(folder / form))  # which leaves lm_head.weight alone of the two that are tied
    else:
        file = folder / "pytorch_model.bin"
        torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=not form.endswith("1.6"))
    assert_same_model(npgpt2.load(convert(folder).path), theirs)


def test_a_gelu_by_erf_is_refused_by_name(tmp_path):
    folder = tmp_path / "Cerebras-GPT-111M"
    theirs = make_model(config_of(folder, CONFIGS["Cerebras-GPT-111M"]))
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"config\.json: activation_function is 'gelu', where GPT-2 has 'gelu_new'"):
        convert(folder)


def test_a_gelu_under_another_name_is_the_same_function():
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float32)
    expected = ACT2FN["gelu_new"](x)
    for name in PLAIN["activation_function"]:
        assert (ACT2FN[name](x) - expected).abs().max() < 5e-7
    assert (ACT2FN["gelu"](x) - expected).abs().max() > 4e-4


@pytest.mark.parametrize(
    "entries",
    [{}, {"n_positions": 64}, {"n_positions": 64, "max_position_embeddings": 32}, {"hidden_size": 36, "n_embd": 24},
     {"num_hidden_layers": 1, "num_attention_heads": 4}, {"n_ctx": 64}, {"vocab_size": 99}],
)  # fmt: skip
def test_sizes_are_those_that_transformers_takes(entries, tmp_path):
    small = {"vocab_size": 101, "n_embd": 24, "n_layer": 2}  # or it would be 124M
    config = config_of(tmp_path / "hf", small | entries | {"model_type": "gpt2"})
    theirs = make_model(config)
    torch.save(theirs.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    ours = npgpt2.load(convert(tmp_path / "hf").path)
    assert tuple(ours.hparams) == (config.vocab_size, config.n_positions, config.n_embd, config.n_head, config.n_layer)
    assert_same_model(ours, theirs)


def test_a_pytorch_model_in_several_files(tmp_path):
    theirs = make_model(config_of(tmp_path / "hf", CONFIGS["distilgpt2"]))
    places, parts = {}, {}
    for number, (name, tensor) in enumerate(theirs.half().state_dict().items()):
        places[name] = f"pytorch_model-{number % 3:05}-of-00003.bin"
        parts.setdefault(places[name], {})[name] = tensor
    for file, part in parts.items():
        torch.save(part, tmp_path / "hf" / file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_model(npgpt2.load(convert(tmp_path / "hf").path), theirs.float())


# ---- nanoGPT


def as_nanogpt(model, bias):
    """A model of transformers as nanoGPT's modules have it: linear layers with weights of (out, in)."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2 and name.startswith("transformer.h."):
            tensor = tensor.T.contiguous()
        if bias or not name.endswith(".bias"):
            tensors[f"_orig_mod.{name}"] = tensor
    return tensors


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["gelu_new", "gelu"])
def test_a_checkpoint_of_nanogpt_is_the_model_that_it_was(gelu, bias, tmp_path):
    """But for GELU, which nanoGPT computes by erf since May 2023."""
    sizes = {"vocab_size": 65, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 3}
    theirs = make_model(config_of(tmp_path / "hf", sizes | {"activation_function": gelu, "model_type": "gpt2"}))
    if not bias:
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if name.endswith(".bias"):
                    parameter.zero_()
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in theirs.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    sum((parameter**2).sum() for parameter in parameters).backward()
    optimizer.step()
    arguments = {
        "n_layer": 3,
        "n_head": 4,
        "n_embd": 32,
        "block_size": 64,
        "bias": bias,
        "vocab_size": 65,
        "dropout": 0.2,
    }
    checkpoint = {"model": as_nanogpt(theirs, bias), "optimizer": optimizer.state_dict(), "model_args": arguments}
    others = {"iter_num": 250, "best_val_loss": torch.tensor(1.5), "config": {"compile": True, "device": "cuda"}}
    torch.save(checkpoint | others, tmp_path / "ckpt.pt")
    ours = npgpt2.load(convert(tmp_path / "ckpt.pt").path)
    if gelu == "gelu_new":
        assert_same_model(ours, theirs)
    else:
        tokens = random_tokens(ours, 64)
        with torch.no_grad():
            logits = theirs(torch.from_numpy(tokens[None])).logits[0].numpy()
        assert TOLERANCE < np.abs(ours.logits(tokens) - logits).max() < 0.02
