"""Hugging Face's folders: what transformers saved is read exactly, and what isn't plain GPT-2 is refused by name."""

import json
import struct

import numpy as np
import pytest
from builders import SMALL, random_arrays
from writers import (
    CONFIG,
    hf_name,
    hf_tensors,
    safetensors,
    safetensors_header,
    write_hugging_face,
)

import npgpt2
from npgpt2.convert import convert
from npgpt2.convert.conversion import widen
from npgpt2.convert.huggingface import (
    HEADER_LIMIT,
    HuggingFaceModel,
    read_config,
    read_header,
    to_checkpoint_name,
)
from npgpt2.model import variable_shapes
from npgpt2.weights import Weights


def read_all(folder):
    model = HuggingFaceModel(folder)
    return {
        name: widen(*model.read(name)).reshape(model.tensors[name].shape) for name in variable_shapes(model.hparams)
    }


def assert_equal(loaded, arrays):
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


# ---- What transformers wrote


@pytest.mark.parametrize("fixture", ["hf", "hf-sharded"])
def test_logits_equal_those_of_transformers(fixture, fixtures, tmp_path):
    model = npgpt2.load(convert(fixtures / fixture, tmp_path / "m.npz").path)
    with np.load(fixtures / fixture / "expected.npz") as expected:
        np.testing.assert_allclose(model.logits(expected["tokens"]), expected["logits"], rtol=0, atol=2e-4)


def test_the_fixtures_are_of_both_kinds(fixtures):
    assert all(name.startswith("transformer.") for name in read_header(fixtures / "hf" / "model.safetensors"))
    sharded = read_header(fixtures / "hf-sharded" / "model-00001-of-00002.safetensors")
    assert not any(name.startswith("transformer.") for name in sharded)
    assert {tensor.dtype for tensor in sharded.values()} == {"BF16"}


# ---- What it could have written


PREFIXES = [
    "transformer.",
    "",
    "module.transformer.",
    "_orig_mod.module.",
    "model.",
    "a.b.c.d.transformer.",
    "h.transformer.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_whatever_all_names_begin_with_is_taken_off(prefix, tmp_path):
    head = {f"{prefix.removesuffix('transformer.')}lm_head.weight": random_arrays()["wte"]}
    assert_equal(read_all(write_hugging_face(tmp_path / "1", hf_tensors(prefix=prefix))), random_arrays())
    assert_equal(read_all(write_hugging_face(tmp_path / "2", hf_tensors(prefix=prefix) | head)), random_arrays())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_output_projection_stands_for_the_embedding_that_is_missing(prefix, tmp_path):
    """As safetensors' save_model leaves it, which keeps the first name of what is there twice."""
    tensors = hf_tensors(prefix=prefix)
    tensors[f"{prefix.removesuffix('transformer.')}lm_head.weight"] = tensors.pop(f"{prefix}wte.weight")
    assert_equal(read_all(write_hugging_face(tmp_path, tensors)), random_arrays())


def test_tensors_of_other_heads_are_passed_over(tmp_path):
    heads = {"score.weight": np.ones((2, 8), np.float32), "v_head.summary.bias": np.ones(1, np.float32)}
    assert_equal(read_all(write_hugging_face(tmp_path, hf_tensors() | heads)), random_arrays())


@pytest.mark.parametrize(
    "name",
    ["transformer.h.0.attn.q_norm.weight", "transformer.h.1.crossattention.c_attn.weight", "lm_head.bias",
     "transformer.h.0.mlp.c_gate.weight", "transformer.wte.extra", "transformer.h.0.attn.c_attn.weight_scale"],
)  # fmt: skip
def test_tensors_that_no_gpt_2_has_are_named(name, tmp_path):
    tensors = hf_tensors() | {name: np.ones(8, np.float32)}
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor '.*' is none of GPT-2's; this is another model"):
        read_all(write_hugging_face(tmp_path, tensors))


@pytest.mark.parametrize(
    "name",
    ["base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight",
     "base_model.model.transformer.h.0.attn.c_attn.base_layer.weight"],
)  # fmt: skip
def test_adapters_that_are_not_merged_are_named(name, tmp_path):
    tensors = hf_tensors(prefix="base_model.model.transformer.") | {name: np.ones((4, 8), np.float32)}
    with pytest.raises(
        ValueError, match=r"is of a LoRA adapter; merge it into the model with PEFT's merge_and_unload\(\)"
    ):
        read_all(write_hugging_face(tmp_path, tensors))


def test_two_models_in_one_file_are_refused(tmp_path):
    tensors = hf_tensors(prefix="actor.transformer.") | hf_tensors(prefix="critic.transformer.")
    with pytest.raises(ValueError, match=r"tensors 'actor\..*' and 'critic\..*' are of two models; save one alone"):
        read_all(write_hugging_face(tmp_path, tensors))


def test_every_name_has_one_in_openai_s_checkpoint():
    for name in variable_shapes(SMALL):
        for prefix in PREFIXES:
            assert to_checkpoint_name(hf_name(name, prefix)) == name


def test_buffers_of_older_versions_are_passed_over(tmp_path):
    mask = {f"transformer.h.{n}.attn.bias": np.ones((1, 1, 5, 5), np.uint8) for n in range(2)}
    mask |= {f"transformer.h.{n}.attn.masked_bias": np.float32(-1e4) for n in range(2)}
    write_hugging_face(tmp_path / "hf", hf_tensors() | mask)
    assert_equal(read_all(tmp_path / "hf"), random_arrays())
    convert(tmp_path / "hf", tmp_path / "m.npz")
    assert_equal({**{name: Weights(tmp_path / "m.npz")[name] for name in random_arrays()}}, random_arrays())


@pytest.mark.parametrize("kind", ["float16", "float64", "BF16"])
def test_other_precisions_are_widened(kind, tmp_path):
    if kind != "BF16":
        expected = {name: array.astype(kind) for name, array in random_arrays().items()}
        tensors = hf_tensors(expected)
    else:
        upper = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in random_arrays().items()}
        expected = {name: (array.astype(np.uint32) << 16).view(np.float32) for name, array in upper.items()}
        tensors = hf_tensors({name: ("BF16", array) for name, array in upper.items()})
    assert_equal(read_all(write_hugging_face(tmp_path, tensors)), expected)


def test_a_file_that_was_not_fetched_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"x\.safetensors: is Git LFS's note of a file that wasn't fetched; fetch it with"
    ):
        header_of(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def test_metadata_is_passed_over(tmp_path):
    write_hugging_face(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors(hf_tensors(), metadata={"format": "pt"}))
    assert_equal(read_all(tmp_path), random_arrays())


def test_a_head_that_is_the_embedding_is_accepted(tmp_path):
    tensors = hf_tensors() | {"lm_head.weight": random_arrays()["wte"]}
    assert_equal(read_all(write_hugging_face(tmp_path, tensors)), random_arrays())


@pytest.mark.parametrize(
    "change", [lambda a: a + np.eye(11, 8, dtype=np.float32), lambda a: a.astype(np.float16), lambda a: a[:5]]
)
def test_a_head_of_its_own_is_refused(change, tmp_path):
    tensors = hf_tensors() | {"lm_head.weight": change(random_arrays()["wte"])}
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight differs from wte"):
        read_all(write_hugging_face(tmp_path, tensors))


# ---- config.json


def config_with(tmp_path, text=None, **changes):
    path = tmp_path / "config.json"
    path.write_bytes(text if text is not None else json.dumps(CONFIG | changes).encode())
    return path


def test_what_config_leaves_out_is_plain_gpt_2(tmp_path):
    assert read_config(config_with(tmp_path)) == SMALL


@pytest.mark.parametrize(
    "changes",
    [
        {"n_inner": None},
        {"n_inner": 32},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_fast"},
        {"activation_function": "gelu_python_tanh"},
        {"activation_function": "gelu_accurate"},
        {"layer_norm_epsilon": 1e-05, "n_ctx": 5, "resid_pdrop": 0.3, "architectures": ["GPT2LMHeadModel"]},
        {"reorder_and_upcast_attn": True},
    ],
)
def test_what_does_not_change_the_computation_is_accepted(changes, tmp_path):
    assert read_config(config_with(tmp_path, **changes)) == SMALL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "gpt_neo"),
        ("model_type", None),
        ("model_type", ["gpt2"]),
        ("activation_function", "relu"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("layer_norm_epsilon", None),
        ("layer_norm_epsilon", float("nan")),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("n_inner", 33),
        ("n_inner", {"a": {}}),
    ],
)
def test_other_models_are_refused_by_name(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"config\.json: {name} is .*, where GPT-2 has .*; this is another model"):
        read_config(config_with(tmp_path, **{name: value}))


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd", "n_head", "n_layer"])
def test_sizes_that_are_missing_are_those_of_transformers_defaults(name, tmp_path):
    usual = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    given = {key: value for key, value in (CONFIG | {"n_embd": 24}).items() if key != name}
    hparams = read_config(config_with(tmp_path, json.dumps(given).encode()))
    expected = usual | given | {name: usual[name]}
    assert tuple(hparams) == tuple(expected[key] for key in usual)


@pytest.mark.parametrize(
    ("general", "name"),
    [
        ("max_position_embeddings", "n_positions"),
        ("hidden_size", "n_embd"),
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
    ],
)
def test_sizes_under_the_names_that_all_models_share(general, name, tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != name} | {general: CONFIG[name]}
    assert read_config(config_with(tmp_path, json.dumps(config).encode())) == SMALL
    assert read_config(config_with(tmp_path, json.dumps(config | {name: 24}).encode())) == SMALL


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd", "n_head", "n_layer", "hidden_size"])
def test_sizes_that_are_silly_are_named(name, tmp_path):
    for value in (0, -1, 1.5, True, "8", None, [1], 10**30):
        with pytest.raises(ValueError, match=r"config\.json: n_\w+ is .*, where a whole number of at least 1"):
            read_config(config_with(tmp_path, **{name: value}))


@pytest.mark.parametrize("depth", [100, 500, 900, 960, 980, 990, 10_000])
@pytest.mark.parametrize("name", ["model_type", "n_embd", "n_inner", "nothing"])
def test_deeply_nested_values_are_refused_or_passed_over(depth, name, tmp_path):
    text = json.dumps(CONFIG | {name: "NESTED"}).replace('"NESTED"', "[" * depth + "]" * depth).encode()
    if name == "nothing" and depth < 900:
        assert read_config(config_with(tmp_path, text)) == SMALL
    elif name != "nothing":
        with pytest.raises(ValueError, match=r"config\.json: ") as caught:
            read_config(config_with(tmp_path, text))
        assert len(str(caught.value)) < 1000


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: n_embd 8 can't be divided among n_head 3 heads"):
        read_config(config_with(tmp_path, n_head=3))


@pytest.mark.parametrize("text", [b"", b"[]", b"<html>", b"\xff"])
def test_a_config_that_is_no_json_object_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: (not valid JSON|holds a JSON list)"):
        read_config(config_with(tmp_path, text))


# ---- safetensors


def header_of(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    return read_header(tmp_path / "x.safetensors")


PLAIN = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_a_plain_header(tmp_path):
    tensor = header_of(tmp_path, safetensors_header({"a": PLAIN}) + bytes(8))["a"]
    assert (tensor.dtype, tensor.shape, tensor.size) == ("F32", (2,), 8)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        b"<!DOCTYPE html><html>",
        struct.pack("<Q", HEADER_LIMIT + 1) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<q", -1) + b"{}",
    ],
)
def test_what_is_no_safetensors_file_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"x\.safetensors: not a safetensors file, or cut short"):
        header_of(tmp_path, data)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff", b"[" * 10**5, b"null", b'{"a": 1} x', b'{"a": ' + b"9" * 5000]
)
def test_headers_that_are_no_json_object_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"x\.safetensors: header: (not valid JSON|holds a JSON)"):
        header_of(tmp_path, safetensors_header(text))


def test_a_header_that_is_cut_short_is_refused(tmp_path):
    whole = safetensors_header({"a": PLAIN})
    for size in range(8, len(whole)):
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            header_of(tmp_path, whole[:size])


@pytest.mark.parametrize(
    "entry",
    [
        None, 1, "F32", [], {}, ["dtype", "shape", "data_offsets"],
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "data_offsets": [0, 8]},
        {"shape": [2], "data_offsets": [0, 8]},
        PLAIN | {"shape": 2},
        PLAIN | {"shape": None},
        PLAIN | {"data_offsets": 8},
        PLAIN | {"data_offsets": None},
        PLAIN | {"data_offsets": []},
        PLAIN | {"data_offsets": [0]},
        PLAIN | {"data_offsets": [0, 8, 16]},
    ],
)  # fmt: skip
def test_tensors_that_are_not_described_are_refused(entry, tmp_path):
    with pytest.raises(ValueError, match="tensor 'a' is not described properly"):
        header_of(tmp_path, safetensors_header({"a": entry}) + bytes(8))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": 1},
        {"dtype": None},
        {"dtype": ["F32"]},
        {"dtype": {"F32": "F32"}},
        {"shape": [-2]},
        {"shape": [2.0]},
        {"shape": ["2"]},
        {"shape": [True]},
        {"shape": [None]},
        {"shape": [[2]]},
        {"shape": "2"},
        {"shape": {"2": 2}},
        {"shape": [1] * 9},
        {"shape": [1] * 100_000},
        {"data_offsets": [8, 0]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [0, 8.0]},
        {"data_offsets": [False, True]},
        {"data_offsets": "08"},
        {"data_offsets": [[], {}]},
    ],
)
def test_tensors_that_cannot_be_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="tensor 'a' has the impossible type, shape or place") as caught:
        header_of(tmp_path, safetensors_header({"a": PLAIN | changes}) + bytes(8))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("place", [[1, 9], [0, 9], [10**30, 10**30 + 8], [2**63, 2**63]])
def test_tensors_beyond_the_end_are_refused(place, tmp_path):
    data = safetensors_header({"a": PLAIN | {"data_offsets": place}}) + bytes(8)
    with pytest.raises(ValueError, match=rf"x\.safetensors: {len(data)} bytes, cut short before the end of tensor 'a'"):
        header_of(tmp_path, data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "I64"}, r"tensor wte has type 'I64', not F32, F16, BF16 or F64"),
        ({"dtype": "F64"}, r"tensor wte of shape \(11, 8\) has 352 bytes"),
        ({"dtype": "x" * 10**5}, r"tensor wte has type 'x+\.\.\.x+'"),
        ({"dtype": "F16"}, r"tensor wte of shape \(11, 8\) has 352 bytes"),
        ({"data_offsets": [0, 348]}, r"tensor wte of shape \(11, 8\) has 348 bytes"),
    ],
)
def test_tensors_of_another_type_or_size_are_named(changes, message, tmp_path):
    write_hugging_face(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    described = json.loads(data[8 : 8 + size])
    described["transformer.wte.weight"] |= changes
    path.write_bytes(safetensors_header(described) + data[8 + size :])
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "hf", tmp_path / "m.npz")


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    model = HuggingFaceModel(write_hugging_face(tmp_path))
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(model.tensors["ln_f/b"].offset + 4)
    with pytest.raises(ValueError, match=r"model\.safetensors: cut short before the end of tensor ln_f/b"):
        model.read("ln_f/b")


def test_names_with_line_breaks_make_no_message_of_two_lines(tmp_path):
    for entry in (1, PLAIN | {"shape": [-1]}, PLAIN | {"data_offsets": [0, 99]}):
        with pytest.raises(ValueError, match=r"tensor 'a\\nb") as caught:
            header_of(tmp_path, safetensors_header({"a\nb": entry}) + bytes(8))
        assert "\n" not in str(caught.value)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    tensors = hf_tensors() | {"wte.weight": random_arrays(seed=1)["wte"]}
    with pytest.raises(
        ValueError, match=r"model\.safetensors: tensors 'transfor.*' and 'wte\.weight' are of two models"
    ):
        HuggingFaceModel(write_hugging_face(tmp_path, tensors))


# ---- Shards


def write_index(folder, weight_map):
    (folder / "model.safetensors").unlink(missing_ok=True)
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_tensors_in_several_files(tmp_path):
    write_hugging_face(tmp_path)
    tensors, weight_map = hf_tensors(), {}
    for number, name in enumerate(tensors):
        weight_map[name] = f"part-{number % 3}.safetensors"
    for file in set(weight_map.values()):
        (tmp_path / file).write_bytes(safetensors({n: a for n, a in tensors.items() if weight_map[n] == file}))
    write_index(tmp_path, weight_map)
    assert_equal(read_all(tmp_path), random_arrays())
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-1\.safetensors"):
        HuggingFaceModel(tmp_path)


@pytest.mark.parametrize(
    "file", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "..\\x", "C:\\x", "x" * 10**5 + "/"]
)
def test_files_of_other_folders_are_refused(file, tmp_path):
    write_hugging_face(tmp_path / "hf")
    (tmp_path / "x").write_bytes(safetensors(hf_tensors()))
    write_index(tmp_path / "hf", {"wte.weight": file})
    with pytest.raises(ValueError, match=r"index\.json: '.*' is not a file of this folder") as caught:
        HuggingFaceModel(tmp_path / "hf")
    assert len(str(caught.value)) < 500


def test_of_several_forms_of_the_weights_the_one_that_transformers_takes_is_read(tmp_path):
    write_index(write_hugging_face(tmp_path), {"wte.weight": "none.safetensors"})
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(safetensors(hf_tensors()))
    assert_equal(read_all(tmp_path), random_arrays())


@pytest.mark.parametrize("weight_map", [None, [], 1, "x", {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": "b", "c": {}}])
def test_an_index_without_a_map_is_refused(weight_map, tmp_path):
    write_index(write_hugging_face(tmp_path), weight_map)
    with pytest.raises(ValueError, match=r"index\.json: has no weight_map from tensors to files"):
        HuggingFaceModel(tmp_path)


def test_an_index_of_nothing_holds_no_model(tmp_path):
    write_index(write_hugging_face(tmp_path / "hf"), {})
    with pytest.raises(ValueError, match=r"index\.json: has no weight_map from tensors to files"):
        convert(tmp_path / "hf", tmp_path / "m.npz")
    (tmp_path / "hf" / "model.safetensors").write_bytes(safetensors({}))
    with pytest.raises(ValueError, match="has no variables of GPT-2's layers"):
        convert(tmp_path / "hf", tmp_path / "m.npz")
