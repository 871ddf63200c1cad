"""int8: how matrices are rounded, products with them, and files of them."""

import json
import zipfile

import numpy as np
import pytest
from builders import SMALL, VOCABULARY, arrays_of, random_arrays

import npgpt2
from npgpt2.convert import convert
from npgpt2.kernels import int8 as module
from npgpt2.kernels import linear, products, threads
from npgpt2.kernels.int8 import Quantized, QuantizedRows, prepare
from npgpt2.weights import Weights, quantize, writer
from npgpt2.weights import int8 as rounding


def random_matrix(n_out, n_in, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, (n_out, n_in)).astype(np.float32)


# ---- Rounding


def test_every_number_is_within_half_a_step_of_its_own():
    rows = random_matrix(300, 70) * np.logspace(-30, 30, 300, dtype=np.float32)[:, None]
    values, scales = quantize(rows)
    assert (values.dtype, scales.dtype) == (np.int8, np.float32)
    assert np.abs(values.astype(int)).max(axis=1).tolist() == [127] * 300  # so that a row uses the whole range
    error = np.abs(values * scales.astype(np.float64)[:, None] - rows)
    assert (error <= 0.5001 * scales[:, None]).all()


@pytest.mark.parametrize("number", [0, -0.0, 2.5e-43, 1e-45, -1e-42, 3.4e38, -3.4e38])
def test_rows_of_extreme_numbers_stay_finite(number):
    values, scales = quantize(np.full((2, 3), number, np.float32))
    np.testing.assert_allclose(values * scales[:, None], np.full((2, 3), number), rtol=0.01, atol=1e-40)


def test_large_matrices_are_rounded_as_small_ones(monkeypatch):
    rows = random_matrix(50, 33)
    whole = quantize(rows)
    monkeypatch.setattr(rounding, "CHUNK", 100)
    for ours, theirs in zip(quantize(rows), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# ---- Products


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 100])
@pytest.mark.parametrize(
    ("n_out", "n_in", "tile_bytes"),
    [(1, 5, 2**20), (2, 3, 2**20), (333, 64, 2**16), (1000, 768, 2**20), (100, 768, 2**10)],
)
def test_products_are_those_of_the_dequantized_matrix(n, n_out, n_in, tile_bytes, count, monkeypatch):
    """Of tiles that hold the whole matrix, a few rows, or not even one."""
    monkeypatch.setattr(products, "THREAD_WORTH", 1)
    monkeypatch.setattr(module, "TILE_BYTES", tile_bytes)
    values, scales = quantize(random_matrix(n_out, n_in))
    x = random_matrix(n, n_in, seed=1) * 10
    expected = x.astype(np.float64) @ (values * scales.astype(np.float64)[:, None]).T
    with threads.sharing(count):
        product = linear(x, Quantized(values, scales))
    assert (product.shape, product.dtype) == ((n, n_out), np.float32)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4)


def test_rows_can_be_looked_up():
    values, scales = quantize(random_matrix(9, 4))
    rows = QuantizedRows(values, scales)
    chosen = rows[np.array([3, 3, 0])]
    np.testing.assert_allclose(chosen, (values * scales[:, None])[[3, 3, 0]], rtol=1e-6)
    assert chosen.dtype == np.float32
    assert (rows.shape, rows.T.shape) == ((9, 4), (4, 9))


def test_no_float_copy_of_a_matrix_is_made(allocated_peak, monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", 2**20)
    matrix = Quantized(*quantize(random_matrix(20_000, 256)))
    for n in (1, 5):
        x = random_matrix(n, 256)
        allowed = 2 * module.TILE_BYTES + 3 * 4 * n * 20_000 + 100_000
        with threads.sharing(2):
            assert allocated_peak(lambda x=x: linear(x, matrix)) < allowed < 4 * 20_000 * 256


# ---- Models


@pytest.fixture(scope="module")
def tiny8(fixtures, tmp_path_factory):
    """The small model that TensorFlow trained, as a file in int8."""
    path = tmp_path_factory.mktemp("int8") / "tiny8.npz"
    return convert(fixtures / "tiny", path, dtype="int8").path


def test_logits_are_those_of_the_dequantized_weights(tiny8, tmp_path):
    quantized = npgpt2.load(tiny8)
    writer.write(tmp_path / "wide.npz", quantized.hparams, arrays_of(quantized.weights).items(), None)
    wide = npgpt2.load(tmp_path / "wide.npz")
    tokens = np.random.default_rng(0).integers(520, size=(3, 192))
    np.testing.assert_allclose(quantized.logits(tokens), wide.logits(tokens), rtol=0, atol=1e-3)


def test_a_model_that_is_quantized_when_loaded_is_that_of_the_file(tiny, tiny8):
    loaded, stored = npgpt2.load(tiny, dtype="int8"), npgpt2.load(tiny8)
    tokens = np.random.default_rng(0).integers(520, size=50)
    np.testing.assert_array_equal(loaded.logits(tokens), stored.logits(tokens))
    np.testing.assert_array_equal(npgpt2.load(tiny8, dtype="int8").logits(tokens), stored.logits(tokens))


def test_it_still_knows_its_passage_by_heart(tiny8, model):
    prompt = "A language model plays one small"
    assert npgpt2.load(tiny8).generate(prompt, length=100) == model.generate(prompt, length=100)
    assert npgpt2.load(tiny8).generate_tokens([[1, 2], [3, 4]], length=3).shape == (2, 3)


def test_other_types_than_int8_cannot_be_asked_for(tiny):
    with pytest.raises(ValueError, match="dtype is 'int4', where 'int8' is expected"):
        npgpt2.load(tiny, dtype="int4")


# ---- Files


@pytest.fixture
def small8(tmp_path):
    writer.write(tmp_path / "small8.npz", SMALL, random_arrays().items(), VOCABULARY, "int8")
    return tmp_path / "small8.npz"


def test_the_file_opens_with_plain_numpy(small8):
    arrays = random_arrays()
    with np.load(small8) as loaded:
        for name, array in arrays.items():
            found = loaded[name]
            assert found.shape == array.shape
            if name == "wte" or name.endswith("/w"):
                assert found.dtype == np.int8
                scales = loaded[f"{name}/scales"]
                wide = found * (scales[:, None] if name == "wte" else scales)
                assert np.abs(wide - array).max() <= 0.51 * scales.max()
            else:
                np.testing.assert_array_equal(found, array)


def test_values_are_mapped_and_not_copied(small8):
    loaded = Weights(small8)
    values = prepare(loaded)["h0/attn/c_attn/w"].values
    assert not values.flags.writeable
    assert not values.flags.owndata
    assert values.flags.c_contiguous
    assert np.shares_memory(values, loaded["h0/attn/c_attn/w"])


def test_the_mapping_holds_what_the_file_does(small8):
    loaded = Weights(small8)
    with np.load(small8) as archive:
        assert [f"{name}.npy" for name in loaded] == [info for info in archive.zip.namelist() if info.endswith(".npy")]
        for name, array in loaded.items():
            np.testing.assert_array_equal(array, archive[name], strict=True)
            assert not array.flags.writeable


def test_rounding_on_loading_gives_the_arrays_of_a_file_in_int8(small8, tmp_path):
    for dtype in ("float32", "float16"):
        arrays = {name: array.astype(np.float16).astype(np.float32) for name, array in random_arrays().items()}
        writer.write(tmp_path / "wide.npz", SMALL, arrays.items(), None, dtype)
        writer.write(tmp_path / "narrow.npz", SMALL, arrays.items(), None, "int8")
        rounded, stored = Weights(tmp_path / "wide.npz", "int8"), Weights(tmp_path / "narrow.npz")
        assert list(rounded) == list(stored)
        for name in reversed(list(stored)):  # scales before what they belong to
            np.testing.assert_array_equal(rounded[name], stored[name], strict=True)
            assert rounded[name] is rounded[name]
            assert not rounded[name].flags.writeable
        assert rounded.dtype == dtype


# ---- Matrices made of what is stored


@pytest.mark.parametrize("kind", [lambda weights: weights, dict])
def test_matrices_are_made_of_any_mapping(kind, small8):
    matrices = prepare(kind(Weights(small8)))
    names = [*Weights(small8).shapes]
    assert (len(matrices), list(matrices), {*{**matrices}}) == (len(names), names, {*names})
    assert all(name in matrices for name in names)
    for absent in ("wte/scales", "h9/ln_1/g", "h9/mlp/c_fc/w/scales", None):
        assert absent not in matrices
        assert matrices.get(absent) is None
        with pytest.raises(KeyError):
            matrices[absent]
    for name, wide in arrays_of(Weights(small8)).items():
        matrix = matrices[name]
        assert matrix is matrices[name]
        assert matrix.shape == wide.shape
        if name == "wte":
            assert isinstance(matrix, QuantizedRows)
            np.testing.assert_allclose(matrix[np.arange(len(wide))], wide, rtol=1e-6)
        elif name.endswith("/w"):
            assert isinstance(matrix, Quantized)
            np.testing.assert_allclose(linear(np.eye(len(wide), dtype=np.float32), matrix), wide, rtol=1e-6)
        else:
            np.testing.assert_array_equal(matrix, wide)


def test_arrays_that_are_not_int8_are_matrices_as_they_are(tiny):
    weights = Weights(tiny)
    matrices = prepare(weights)
    assert list(matrices) == list(weights)
    assert all(matrices[name] is weights[name] for name in weights)


def test_matrices_are_made_when_they_are_first_asked_for(tmp_path):
    arrays = random_arrays() | {"ln_f/g": np.full(SMALL.n_embd, np.nan, np.float32)}
    writer.write(tmp_path / "m.npz", SMALL, arrays.items(), None, "int8")
    matrices = prepare(Weights(tmp_path / "m.npz"))
    assert len(matrices) == len(arrays)
    assert matrices["wte"].shape == (11, 8)
    with pytest.raises(ValueError, match="variable ln_f/g holds values that are not finite"):
        matrices["ln_f/g"]


def changed(change):
    """The arrays of a model file in int8, changed, as NumPy writes them."""
    arrays = {}
    for name, array in random_arrays().items():
        if name == "wte" or name.endswith("/w"):
            values, scales = quantize(array if name == "wte" else array.T)
            arrays |= {name: values if name == "wte" else values.T, f"{name}/scales": scales}
        else:
            arrays[name] = array
    change(arrays)
    return arrays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("wte/scales"), "wte/scales.npy is missing"),
        (lambda arrays: arrays.update({"wte/scales": arrays["wte/scales"][:-1]}), "wte/scales has shape"),
        (lambda arrays: arrays.update({"wte/scales": arrays["wte/scales"] * np.float32("nan")}), "not finite"),
        (lambda arrays: arrays.update({"wte/scales": arrays["wte/scales"].astype(np.int8)}), "has type int8"),
        (lambda arrays: arrays.update({"wpe": arrays["wpe"].astype(np.int8)}), "wpe has type int8"),
        (lambda arrays: arrays.update({"wte": arrays["wte"].astype(np.uint8)}), "wte has type uint8"),
    ],
)
def test_files_that_hold_something_else_are_refused(change, message, tmp_path):
    np.savez(tmp_path / "m.npz", **changed(change))
    with zipfile.ZipFile(tmp_path / "m.npz", "a") as archive:
        archive.writestr("hparams.json", json.dumps(SMALL._asdict()))
    with pytest.raises(ValueError, match=message):
        arrays_of(Weights(tmp_path / "m.npz"))


def test_files_that_numpy_wrote_are_read_too(small8, tmp_path):
    for savez in (np.savez, np.savez_compressed):
        savez(tmp_path / "m.npz", **changed(lambda arrays: None))
        with zipfile.ZipFile(tmp_path / "m.npz", "a") as archive:
            archive.writestr("hparams.json", json.dumps(SMALL._asdict()))
        for ours, theirs in zip(
            arrays_of(Weights(tmp_path / "m.npz")).values(),
            arrays_of(Weights(small8)).values(),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)
