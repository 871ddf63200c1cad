"""Converting: every kind of source gives the model that it holds; what is wrong is named, and leaves no file."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import writers
from builders import SMALL, random_arrays, zero_arrays
from writers import as_saved, hf_tensors, nanogpt_checkpoint, write_checkpoint, write_hugging_face, write_openai

import npgpt2
from npgpt2.convert import conversion, convert
from npgpt2.convert.conversion import widen
from npgpt2.model import HParams
from npgpt2.weights import Weights


def assert_holds(path, arrays):
    loaded = Weights(path)
    assert set(loaded.shapes) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


@pytest.fixture
def fails(tmp_path):
    """A function that converts what is wrong, expects an error in one line, and looks for what it left behind."""

    def attempt(error, message, source, **more):
        output = tmp_path / "output" / "m.npz"
        output.parent.mkdir(exist_ok=True)
        for before in (None, b"the old one"):
            output.unlink(missing_ok=True)
            if before:
                output.write_bytes(before)
            with pytest.raises(error, match=message) as caught:
                convert(source, output, **more)
            assert "\n" not in str(caught.value)
            assert os.listdir(output.parent) == (["m.npz"] if before else [])
            assert not before or output.read_bytes() == before

    return attempt


# ---- Sources


@pytest.mark.parametrize("name", ["tiny", "finetuned"])
def test_logits_of_tensorflow_s_models(name, fixtures, tmp_path):
    model = npgpt2.load(convert(fixtures / name, tmp_path / "m.npz").path)
    with np.load(fixtures / name / "expected.npz") as expected:
        np.testing.assert_allclose(model.logits(expected["tokens"]), expected["logits"], rtol=0, atol=2e-4)


def test_values_of_all_types_equal_those_that_tensorflow_reads(fixtures, tmp_path):
    convert(fixtures / "dtypes", tmp_path / "m.npz")
    with np.load(fixtures / "dtypes" / "values.npz") as values:
        shapes = Weights(tmp_path / "m.npz").shapes
        assert_holds(
            tmp_path / "m.npz", {name: values[f"model/{name}"].reshape(shape) for name, shape in shapes.items()}
        )


def test_what_convert_says(fixtures, tmp_path):
    converted = convert(fixtures / "tiny", tmp_path / "m.npz")
    assert converted.path == tmp_path / "m.npz"
    assert converted.hparams == Weights(converted.path).hparams
    assert converted.hparams._asdict() == json.loads((fixtures / "tiny" / "hparams.json").read_text())
    assert converted.has_vocabulary
    assert not convert(fixtures / "finetuned", tmp_path / "m.npz").has_vocabulary


def test_a_checkpoint_comes_back_whatever_its_layout(tmp_path):
    for number, layout in enumerate([{}, {"shards": 3}, {"per_block": 2}]):
        folder = write_openai(tmp_path / f"run{number}", **layout)
        assert_holds(convert(folder).path, random_arrays())


def test_plain_matrices_are_read_as_well_as_convolutions(tmp_path):
    folder = write_openai(tmp_path / "run")
    write_checkpoint(folder / "model.ckpt", {f"model/{name}": array for name, array in random_arrays().items()})
    assert_holds(convert(folder).path, random_arrays())


def test_what_an_optimizer_keeps_is_passed_over(tmp_path):
    arrays = as_saved(random_arrays())
    slots = {f"{name}/Adam": np.full_like(array, np.nan) for name, array in arrays.items()}
    others = {"global_step": np.array(40, np.int32), "beta1_power": np.float32(np.inf)}
    folder = write_openai(tmp_path / "run")
    write_checkpoint(folder / "model.ckpt", arrays | slots | others)
    assert_holds(convert(folder).path, random_arrays())


def test_the_same_source_gives_the_same_bytes(fixtures, tmp_path):
    for name in ("tiny", "hf"):
        first, second = (convert(fixtures / name, tmp_path / f"{n}.npz").path.read_bytes() for n in range(2))
        assert first == second


def test_numbers_of_every_type_are_widened_exactly():
    numbers = np.array([0, -0.0, 1, -1.5, 2**-24, 65504, np.inf])
    for dtype in ("float16", "float32", "float64"):
        np.testing.assert_array_equal(widen(numbers.astype(dtype).view(np.uint8), dtype), numbers.astype(dtype))
    brain = np.array([0x0000, 0x8000, 0x3F80, 0xBFC0, 0x7F7F, 0x0001], "<u2")
    expected = [0, -0.0, 1, -1.5, 3.3895314e38, 9.1835496e-41]
    np.testing.assert_array_equal(widen(brain.view(np.uint8), "bfloat16"), np.float32(expected))
    assert widen(np.array([1e300]).view(np.uint8), "float64").tolist() == [np.inf]


def test_float32_is_not_copied():
    data = np.arange(4, dtype=np.float32).view(np.uint8)
    assert np.shares_memory(widen(data, "float32"), data)


# ---- Names


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, fixtures):
    """A folder to work in, with a downloaded model, a fine-tuned one and one of Hugging Face's."""
    for fixture, name in (("dtypes", "models/124M"), ("finetuned", "run1"), ("hf", "hf")):
        shutil.copytree(fixtures / fixture, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("models/124M", "models/124M.npz"),
        ("models/124M/", "models/124M.npz"),
        ("./models/../models/124M", "models/124M.npz"),
        ("models/124M/model.ckpt", "models/124M/model.ckpt.npz"),
        ("run1", "run1.npz"),
        ("run1/model-40", "run1/model-40.npz"),
        ("run1/model-40.index", "run1/model-40.npz"),
        ("run1/model-40.data-00001-of-00002", "run1/model-40.npz"),
        ("hf", "hf.npz"),
        ("hf/model.safetensors", "hf.npz"),
    ],
)
def test_the_model_file_lies_beside_the_source(source, output, elsewhere):
    before = {path.name for path in elsewhere.rglob("*")}
    converted = convert(Path(source))
    assert converted.path.resolve() == (elsewhere / output).resolve()
    assert Weights(elsewhere / output).hparams == converted.hparams
    assert {path.name for path in elsewhere.rglob("*")} == before | {Path(output).name}
    assert (elsewhere / output).is_file()


@pytest.mark.parametrize(
    ("folder", "source", "output"),
    [
        ("models/124M", ".", "models/124M.npz"),
        ("hf", "model.safetensors", "hf.npz"),
        ("run1", "model-40", "run1/model-40.npz"),
        ("models", "../hf/../run1/.", "run1.npz"),
    ],
)
def test_the_model_file_lies_beside_a_source_that_has_no_name(folder, source, output, elsewhere, monkeypatch):
    monkeypatch.chdir(folder)
    assert convert(Path(source)).path.resolve() == (elsewhere / output).resolve()


def test_the_folder_above_is_a_source(elsewhere, monkeypatch):
    (elsewhere / "run1" / "logs").mkdir()
    monkeypatch.chdir("run1/logs")
    assert convert(Path("..")).path == elsewhere.resolve() / "run1.npz"


HASH = "2290a62682d06624634c1f46a6ad5be0f47f38aa"


@pytest.mark.parametrize("name", ["models--distilbert--distilgpt2", "models--distilgpt2"])
@pytest.mark.parametrize("within", ["", "model.safetensors", ".", "../" + HASH])
def test_a_snapshot_of_the_hub_is_named_after_its_model_in_the_current_folder(name, within, fixtures, elsewhere):
    snapshot = elsewhere / "hub" / name / "snapshots" / HASH
    shutil.copytree(fixtures / "hf", snapshot)
    before = sorted(path for path in elsewhere.rglob("*") if path.is_file())
    for source in (snapshot / within, snapshot.relative_to(elsewhere) / within):
        assert convert(source).path == Path("distilgpt2.npz")
        after = sorted(path for path in elsewhere.rglob("*") if path.is_file())
        assert after == sorted([*before, elsewhere / "distilgpt2.npz"])


def test_in_the_cache_of_the_hub_an_output_has_to_be_named(fixtures, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--distilgpt2" / "snapshots" / HASH
    shutil.copytree(fixtures / "hf", snapshot)
    before = sorted(tmp_path.rglob("*"))
    for here, source in ((snapshot, "."), (snapshot, "model.safetensors"), (snapshot.parent, HASH)):
        monkeypatch.chdir(here)
        with pytest.raises(ValueError, match=r"is in the cache of Hugging Face's hub; .* -o OUT\.npz$"):
            convert(Path(source))
        assert sorted(tmp_path.rglob("*")) == before
    assert convert(Path(HASH), tmp_path / "m.npz").path == tmp_path / "m.npz"


def test_a_link_to_a_snapshot_has_a_name(fixtures, tmp_path):
    snapshot = tmp_path / "models--distilgpt2" / "snapshots" / HASH
    shutil.copytree(fixtures / "hf", snapshot)
    (tmp_path / "mine").symlink_to(snapshot)
    assert convert(tmp_path / "mine").path == tmp_path / "mine.npz"


def test_an_output_that_is_there_is_replaced(fixtures, tmp_path):
    (tmp_path / "m.npz").write_bytes(b"the old one")
    convert(fixtures / "hf", tmp_path / "m.npz")
    assert Weights(tmp_path / "m.npz").hparams.n_embd == 24
    assert os.listdir(tmp_path) == ["m.npz"]


def test_what_is_no_model_is_named(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").touch()
    for name in ("empty", "text.txt"):
        fails(FileNotFoundError, rf"{name}: holds no model; a TensorFlow checkpoint", tmp_path / name)
    for name in ("none", "none.index", "empty/model.ckpt", "none.safetensors"):
        message = rf"{Path(name).name}: no such folder, nor a checkpoint of this name"
        fails(FileNotFoundError, message, tmp_path / name)


def test_a_folder_of_several_checkpoints_without_a_state_file(fails, fixtures, tmp_path):
    shutil.copytree(fixtures / "finetuned", tmp_path / "run")
    (tmp_path / "run" / "checkpoint").unlink()
    (tmp_path / "run" / "model-20.index").touch()
    fails(ValueError, "run: holds model-20, model-40, and no file `checkpoint` to tell which", tmp_path / "run")
    assert convert(tmp_path / "run" / "model-40").path == tmp_path / "run" / "model-40.npz"


def test_a_file_of_tensors_is_read_with_the_config_beside_it(fails, tmp_path):
    folder = write_hugging_face(tmp_path / "hf")
    other = random_arrays(seed=1)
    (folder / "other.safetensors").write_bytes(writers.safetensors(hf_tensors(other)))
    (folder / "other.bin").write_bytes(writers.torch_saved(hf_tensors(other)))
    for name in ("other.safetensors", "other.bin"):
        assert convert(folder / name).path == folder / "other.npz"
        assert_holds(folder / "other.npz", other)
        (folder / "other.npz").unlink()
    assert_holds(convert(folder / "model.safetensors").path, random_arrays())
    lone = tmp_path / "lone"
    write_openai(lone)
    (lone / "model.safetensors").write_bytes(writers.safetensors(hf_tensors()))
    fails(FileNotFoundError, r"config\.json", lone / "model.safetensors")


def test_a_hugging_face_folder_without_its_tensors(fails, tmp_path):
    folder = write_hugging_face(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    fails(FileNotFoundError, r"hf: has neither model\.safetensors nor pytorch_model\.bin beside config\.json", folder)


FOREIGN = {
    "adapter_config.json": r"is a PEFT adapter \(LoRA or another\), which is not a whole model; merge it with AutoPeft",
    "model-q4_0.gguf": r"is a model in llama\.cpp's format; convert what it was made from, or save it again with",
    "decoder_model.onnx": r"is a model in ONNX's format; convert what it was exported from",
    "onnx/model.onnx": r"is a model in ONNX's format; convert what it was exported from",
    "flax_model.msgpack": r"is Flax's weights; save them again with transformers 4: AutoModel.*from_flax=True",
    "tf_model.h5": r"is TensorFlow 2's weights; save them again with transformers 4: AutoModel.*from_tf=True",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("with_config", [True, False])
def test_what_is_not_ours_is_named(name, with_config, fails, tmp_path):
    folder = write_hugging_face(tmp_path / "hf")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x89something")
    for other in ("model.safetensors", *(() if with_config else ("config.json",))):
        (folder / other).unlink()
    fails(ValueError, name.replace(".", r"\.") + ": " + FOREIGN[name], folder)
    fails(ValueError, name.replace(".", r"\.") + ": " + FOREIGN[name], folder / name)


def test_an_adapter_is_not_passed_over_beside_a_whole_model(fails, tmp_path):
    """transformers would apply it."""
    folder = write_hugging_face(tmp_path / "hf")
    for name in FOREIGN:
        if name != "adapter_config.json":
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
    convert(folder)
    (folder / "adapter_config.json").touch()
    for source in (folder, folder / "model.safetensors"):
        fails(ValueError, r"adapter_config\.json: " + FOREIGN["adapter_config.json"], source)


# ---- Vocabulary


def test_a_vocabulary_from_another_folder(fixtures, tmp_path):
    shutil.copytree(fixtures / "hf", tmp_path / "hf", ignore=shutil.ignore_patterns("vocab.json", "merges.txt"))
    assert not convert(tmp_path / "hf").has_vocabulary
    assert Weights(tmp_path / "hf.npz").vocabulary() is None
    assert convert(tmp_path / "hf", vocabulary=fixtures / "tiny").has_vocabulary
    expected = tuple((fixtures / "tiny" / name).read_bytes() for name in ("encoder.json", "vocab.bpe"))
    assert Weights(tmp_path / "hf.npz").vocabulary() == expected


def test_a_vocabulary_of_another_model_is_refused(fails, fixtures, tmp_path):
    message = "tiny: the vocabulary has 520 entries, but the model 11; give the right one with --vocab DIR"
    fails(ValueError, message, write_openai(tmp_path / "run"), vocabulary=fixtures / "tiny")
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(fixtures / "tiny" / name, tmp_path / "run")
    fails(ValueError, "run: the vocabulary has 520 entries, but the model 11", tmp_path / "run")


def test_a_folder_without_a_vocabulary_is_refused(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    source = write_openai(tmp_path / "run")
    for name in ("empty", "none"):
        fails(FileNotFoundError, rf"{name}: holds no vocabulary", source, vocabulary=tmp_path / name)


def test_half_a_vocabulary_or_a_damaged_one_is_refused(fails, fixtures, tmp_path):
    source = write_openai(tmp_path / "run")
    shutil.copy(fixtures / "tiny" / "encoder.json", source)
    fails(FileNotFoundError, r"vocab\.bpe", source)
    (source / "vocab.bpe").write_bytes(b"a b\nhh hh\n")
    fails(ValueError, r"vocab\.bpe line \d", source)
    (source / "vocab.bpe").write_bytes(b"<!DOCTYPE html>")
    fails(ValueError, r"vocab\.bpe line 1", source)


# ---- Hyperparameters


def test_heads_are_asked_for_where_no_file_says_them(fails, tmp_path):
    source = write_openai(tmp_path / "run", hparams=None)
    fails(ValueError, r"run: nothing there says how many heads the model has; say it with --n-head N", source)
    for n_head in (3, 0, -1):
        fails(ValueError, r"n_head", source, n_head=n_head)
    assert convert(source, n_head=4).hparams == HParams(**{**SMALL._asdict(), "n_head": 4})
    assert_holds(tmp_path / "run.npz", random_arrays())


def test_heads_must_be_those_of_hparams_json(fails, tmp_path):
    for source in (write_openai(tmp_path / "run"), write_hugging_face(tmp_path / "hf")):
        fails(ValueError, rf"{source.name}: n_head is 2 there, but 4 was asked for", source, n_head=4)
        assert convert(source, n_head=2).hparams == SMALL


@pytest.mark.parametrize("n_layer", [1, 3, 2**31 - 1])
def test_layers_must_be_those_of_hparams_json(n_layer, fails, tmp_path):
    message = f"holds 2 layers, but n_layer is {n_layer} in its hyperparameters"
    hparams = HParams(**{**SMALL._asdict(), "n_layer": n_layer})
    fails(ValueError, message, write_openai(tmp_path / "run", hparams=hparams))
    config = writers.CONFIG | {"n_layer": n_layer}
    fails(ValueError, message, write_hugging_face(tmp_path / "hf", config=config))


@pytest.mark.parametrize("name", ["n_vocab", "n_ctx", "n_embd"])
def test_sizes_must_be_those_of_hparams_json(name, fails, tmp_path):
    hparams = HParams(**{**SMALL._asdict(), name: 2**31 - 2})
    message = r"variable \w+ has shape \(.*\), where \(.*\) is expected \(HParams\(.*\)\)"
    fails(ValueError, message, write_openai(tmp_path / "run", hparams=hparams))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"n_vocab": 1e3}', "<html>"])
def test_broken_hparams_json_is_named(text, fails, tmp_path):
    source = write_openai(tmp_path / "run")
    (source / "hparams.json").write_text(text)
    fails(ValueError, r"run.hparams\.json: ", source)


# ---- Variables


def test_missing_variables_are_named(fails, tmp_path):
    for name in ("wte", "wpe", "ln_f/b", "h0/ln_1/g", "h1/attn/c_attn/w", "h1/mlp/c_proj/b"):
        arrays = {other: array for other, array in random_arrays().items() if other != name}
        fails(ValueError, rf"model\.ckpt: variable {name} is missing", write_openai(tmp_path / "run", arrays))
        fails(ValueError, rf"hf: variable {name} is missing", write_hugging_face(tmp_path / "hf", hf_tensors(arrays)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("wte", (8, 11)), ("wpe", (5, 9)), ("ln_f/b", (9,)), ("ln_f/g", (1, 8)), ("h0/attn/c_attn/w", (24, 8)),
     ("h1/mlp/c_fc/w", (8, 31)), ("h1/mlp/c_fc/b", ()), ("h0/mlp/c_proj/w", (2, 32, 8)), ("wte", (1, 1, 11, 8))],
)  # fmt: skip
def test_misshapen_variables_are_named(name, shape, fails, tmp_path):
    arrays = random_arrays() | {name: np.zeros(shape, np.float32)}
    source = write_openai(tmp_path / "run")
    saved = as_saved(arrays)
    saved[f"model/{name}"] = arrays[name]
    write_checkpoint(source / "model.ckpt", saved)
    fails(ValueError, rf"variable {name} has shape \({', '.join(map(str, shape))}", source)
    hf = write_hugging_face(tmp_path / "hf", hf_tensors(arrays))
    fails(ValueError, rf"variable {name} has shape \({', '.join(map(str, shape))}", hf)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_named(value, fails, tmp_path):
    arrays = random_arrays()
    arrays["h1/attn/c_proj/w"][3, 4] = value
    message = "variable h1/attn/c_proj/w holds NaN or infinity; the model is broken"
    fails(ValueError, message, write_openai(tmp_path / "run", arrays))
    fails(ValueError, message, write_hugging_face(tmp_path / "hf", hf_tensors(arrays)))


def test_values_too_large_for_float32_are_named(fails, tmp_path):
    arrays = random_arrays() | {"wpe": np.full((5, 8), 1e300)}
    fails(ValueError, "variable wpe holds NaN or infinity", write_openai(tmp_path / "run", arrays))


@pytest.mark.parametrize("n_head", [None, 2])
def test_what_is_no_gpt_2_is_named(n_head, fails, tmp_path):
    source = write_openai(tmp_path / "run", {"dense/w": np.zeros((2, 2), np.float32)}, hparams=None)
    fails(ValueError, r"has no variables of GPT-2's layers \(h0/…\); this is not a GPT-2", source, n_head=n_head)
    for wte in (np.zeros(8, np.float32), np.zeros((2, 2, 2), np.float32)):
        write_openai(source, {"h0/ln_1/g": np.zeros(8, np.float32), "wte": wte}, hparams=None)
        fails(ValueError, "variable wte is missing, or not a matrix; this is not a GPT-2", source, n_head=n_head)


def test_a_variable_in_slices_is_named(fails, fixtures):
    message = r"model\.ckpt: variable model/wte is sliced \(partitioned\); save it whole with TensorFlow"
    fails(ValueError, message, fixtures / "sliced", n_head=2)


def test_a_type_that_is_no_float_is_named(fails, tmp_path):
    arrays = random_arrays() | {"wpe": np.zeros((5, 8), np.int32)}
    fails(ValueError, "variable model/wpe has TensorFlow's type number 3", write_openai(tmp_path / "run", arrays))


# ---- Damage


def test_a_web_page_in_place_of_a_file_is_named(fails, tmp_path):
    page = b"<!DOCTYPE html><html><body>Sign in</body></html>"
    source = write_openai(tmp_path / "run")
    (source / "model.ckpt.data-00000-of-00001").write_bytes(page)
    fails(ValueError, rf"data-00000-of-00001: {len(page)} bytes, cut short before the end of variable", source)
    (source / "model.ckpt.data-00000-of-00001").write_bytes(page * 1000)
    fails(ValueError, r"data-00000-of-00001: variable .* is damaged", source)
    (source / "model.ckpt.index").write_bytes(page)
    fails(ValueError, r"model\.ckpt\.index: it is not a TensorFlow checkpoint's index", source)
    folder = write_hugging_face(tmp_path / "hf")
    (folder / "model.safetensors").write_bytes(page)
    fails(ValueError, r"model\.safetensors: not a safetensors file, or cut short", folder)


def test_a_missing_shard_is_named(fails, fixtures, tmp_path):
    shutil.copytree(fixtures / "finetuned", tmp_path / "run")
    (tmp_path / "run" / "model-40.data-00001-of-00002").unlink()
    fails(FileNotFoundError, r"model-40\.data-00001-of-00002", tmp_path / "run")


def test_damage_in_the_last_variable_leaves_no_file(fails, tmp_path):
    source = write_openai(tmp_path / "run")
    path = source / "model.ckpt.data-00000-of-00001"
    data = bytearray(path.read_bytes())
    data[data.index(random_arrays()["ln_f/b"].tobytes()) + 5] ^= 0x10
    path.write_bytes(data)
    fails(ValueError, r"data-00000-of-00001: variable model/ln_f/b is damaged \(its checksum is wrong\)", source)


def test_interrupting_leaves_no_file(fixtures, tmp_path, monkeypatch):
    seen = []

    def interrupt(array):
        seen.append(array)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(conversion, "all_finite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(fixtures / "hf", tmp_path / "m.npz")
    assert os.listdir(tmp_path) == []


# ---- Memory and progress


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "safetensors", "nanoGPT"])
def test_memory_is_that_of_the_largest_variable(dtype, tmp_path, allocated_peak, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: None)  # only memory is of interest here
    hparams = HParams(n_vocab=8192, n_ctx=8192, n_embd=768, n_head=2, n_layer=1)
    sizes = zero_arrays(hparams)
    largest = sizes["wte"].nbytes
    assert sizes["wpe"].nbytes == largest == 24 * 2**20
    if dtype == "safetensors":
        config = {"vocab_size": 8192, "n_positions": 8192, "n_embd": 768, "n_head": 2, "n_layer": 1}
        source = write_hugging_face(tmp_path / "hf", hf_tensors(sizes), config)
    elif dtype == "nanoGPT":
        source = tmp_path / "out"
        source.mkdir()
        (source / "ckpt.pt").write_bytes(writers.torch_saved(nanogpt_checkpoint(sizes, hparams)))
    else:
        kind = ("bfloat16", np.uint16) if dtype == "bfloat16" else (dtype, np.dtype(dtype))
        source = write_openai(tmp_path / "run", hparams=hparams)
        saved = {name: (kind[0], np.zeros(a.shape, kind[1])) for name, a in as_saved(sizes).items()}
        write_checkpoint(source / "model.ckpt", saved)
    del sizes
    # As it is read, and as float32, where these are not the same; no other variable; and some pieces to work on.
    held = {"float32": 1, "safetensors": 1, "nanoGPT": 1, "bfloat16": 1.5, "float64": 3}[dtype] * largest
    assert allocated_peak(lambda: convert(source, tmp_path / "m.npz")) < held + 16 * 2**20
    shutil.rmtree(source)
    (tmp_path / "m.npz").unlink()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_progress_bar_is_shown_to_people_alone(fixtures, tmp_path, monkeypatch, capsys):
    convert(fixtures / "dtypes", tmp_path / "m.npz")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    convert(fixtures / "dtypes", tmp_path / "m.npz")
    assert "convert model.ckpt: 100%" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""
