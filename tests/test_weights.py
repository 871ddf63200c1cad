"""The model file: what is written comes back, mapped and not copied; other `.npz` files load too; damage is refused."""

import errno
import io
import json
import mmap
import os
import pickle
import stat
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping, MutableMapping
from itertools import count

import numpy as np
import pytest
import writers
from writers import SMALL, VOCABULARY, patched, random_arrays

import npgpt2
from npgpt2.model import HParams, variable_shapes
from npgpt2.tokenizer import BYTE_CHARACTERS
from npgpt2.weights import reader as weights
from npgpt2.weights import writer
from npgpt2.weights.reader import CHUNK, Weights


@pytest.fixture
def small(tmp_path):
    """A small model file."""
    writer.write(tmp_path / "small.npz", SMALL, random_arrays().items(), VOCABULARY)
    return tmp_path / "small.npz"


@pytest.fixture
def opened(tmp_path):
    """A function that writes bytes into a file and opens it as a model."""

    numbers = count()

    def write_and_open(data):
        folder = tmp_path / f"model{next(numbers)}"  # not over a file that may be mapped
        folder.mkdir()
        (folder / "model.npz").write_bytes(data)
        return Weights(folder / "model.npz")

    return write_and_open


def by_numpy(arrays, savez=np.savez, hparams=SMALL, drop=(), **more):
    """The bytes of an `.npz` that NumPy writes, with hparams.json put into it by other means."""
    file = io.BytesIO()
    savez(file, **{name: array for name, array in arrays.items() if name not in drop}, **more)
    with zipfile.ZipFile(file, "a") as archive:
        if hparams is not None:
            text = hparams if isinstance(hparams, bytes) else json.dumps(hparams._asdict()).encode()
            archive.writestr("hparams.json", text)
    return file.getvalue()


def assert_equal(loaded, arrays):
    assert set(loaded.shapes) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == np.float32
        assert not loaded[name].flags.writeable
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


def underneath(array):
    """What an array is a view of."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


# ---- What is written


def test_the_file_opens_with_plain_numpy(small):
    arrays = random_arrays()
    with np.load(small, allow_pickle=False) as loaded:
        assert {*loaded.files} == {*arrays, "hparams.json", *weights.VOCABULARY_FILES}
        for name, array in arrays.items():
            assert loaded[name].dtype == np.float32
            np.testing.assert_array_equal(loaded[name], array)
        assert json.loads(loaded["hparams.json"]) == SMALL._asdict()


def test_the_trained_model_opens_with_plain_numpy(tiny):
    with np.load(tiny, allow_pickle=False) as loaded:
        assert_equal(Weights(tiny), {name: loaded[name] for name in Weights(tiny).shapes})


def test_matrices_lie_in_the_order_in_which_decoding_reads_them(small):
    with np.load(small) as loaded:
        for name in variable_shapes(SMALL):
            assert loaded[name].flags.f_contiguous == (name.endswith("/w") or loaded[name].ndim == 1), name


def test_numbers_lie_at_multiples_of_64(small):
    data = small.read_bytes()
    with zipfile.ZipFile(small) as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            if info.filename.endswith(".npy"):
                array = random_arrays()[info.filename.removesuffix(".npy")]
                raw = (array.T if info.filename.endswith("/w.npy") else array).tobytes()
                assert data.index(raw) % 64 == 0, info.filename


def test_variables_are_read_only_views_of_the_mapped_file(small):
    loaded = Weights(small)
    arrays = [loaded[name] for name in loaded.shapes]
    assert isinstance(underneath(arrays[0]), mmap.mmap)
    assert all(underneath(array) is underneath(arrays[0]) for array in arrays)
    for array in arrays:
        assert not array.flags.owndata
        assert array.ctypes.data % 64 == 0
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


def test_reading_a_mapped_model_allocates_no_room_for_it(tmp_path, allocated_peak):
    hparams = HParams(n_vocab=40_000, n_ctx=8, n_embd=64, n_head=2, n_layer=1)
    writer.write(tmp_path / "m.npz", hparams, random_arrays(hparams).items(), None)

    def read():
        loaded = Weights(tmp_path / "m.npz")
        assert sum(loaded[name].nbytes for name in loaded.shapes) > 10_000_000

    assert allocated_peak(read) < 2 * CHUNK


def test_the_same_model_gives_the_same_bytes(small, tmp_path):
    writer.write(tmp_path / "again.npz", SMALL, random_arrays().items(), VOCABULARY)
    assert (tmp_path / "again.npz").read_bytes() == small.read_bytes()


def test_nothing_in_the_file_tells_where_or_when_it_was_written(small):
    with zipfile.ZipFile(small) as archive:
        for info in archive.infolist():
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert info.create_system == 3


def test_arrays_larger_than_a_chunk(tmp_path):
    hparams = HParams(n_vocab=3001, n_ctx=3, n_embd=520, n_head=2, n_layer=1)
    arrays = random_arrays(hparams)
    assert arrays["wte"].size > CHUNK
    assert arrays["h0/mlp/c_fc/w"].size > CHUNK
    writer.write(tmp_path / "m.npz", hparams, arrays.items(), None)
    assert_equal(Weights(tmp_path / "m.npz"), arrays)


@pytest.mark.parametrize(
    "change", [np.asfortranarray, lambda a: np.repeat(a, 2, axis=-1)[..., ::2], lambda a: a.astype(">f4")]
)
def test_arrays_in_any_layout_are_written(change, small, tmp_path):
    writer.write(tmp_path / "m.npz", SMALL, ((name, change(a)) for name, a in random_arrays().items()), VOCABULARY)
    assert (tmp_path / "m.npz").read_bytes() == small.read_bytes()


def test_writing_keeps_no_array_longer_than_it_must(tmp_path, allocated_peak, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: None)  # only memory is of interest here
    size = 16 * 2**20
    names = ["wte", "h0/mlp/c_fc/w", "h0/mlp/c_proj/w", "wpe"]

    def write():
        arrays = ((name, np.zeros((size // 4096, 1024), np.float32)) for name in names)
        writer.write(tmp_path / "m.npz", SMALL, arrays, None)

    assert allocated_peak(write) < size + 3 * 4 * CHUNK
    (tmp_path / "m.npz").unlink()


def test_what_the_file_says_of_itself(small, tmp_path):
    loaded = Weights(small)
    assert loaded.hparams == SMALL
    assert loaded.vocabulary() == VOCABULARY
    assert loaded.dtype == "float32"
    assert loaded.parameters == sum(array.size for array in random_arrays().values())
    writer.write(tmp_path / "mute.npz", SMALL, random_arrays().items(), None)
    assert Weights(tmp_path / "mute.npz").vocabulary() is None


def test_a_variable_is_looked_up_once(small):
    loaded = Weights(small)
    assert loaded["wte"] is loaded["wte"]
    with pytest.raises(KeyError, match="h9/ln_1/g"):
        loaded["h9/ln_1/g"]


@pytest.mark.parametrize("rounded", [None, "int8"])
@pytest.mark.parametrize("stored", ["float32", "float16", "int8"])
def test_it_is_a_mapping_of_what_it_holds_before_anything_is_read(stored, rounded, tmp_path):
    writer.write(tmp_path / "m.npz", SMALL, random_arrays().items(), VOCABULARY, stored)
    names = set(random_arrays())
    if "int8" in (stored, rounded):
        names |= {f"{name}/scales" for name in names if name == "wte" or name.endswith("/w")}

    def fresh():
        return Weights(tmp_path / "m.npz", rounded)

    assert isinstance(fresh(), Mapping)
    assert not isinstance(fresh(), MutableMapping)
    assert len(fresh()) == len(names) == len({*fresh()})
    assert {*fresh()} == {*fresh().keys()} == {*{**fresh()}} == names
    assert all(name in fresh() for name in names)
    arrays = {name: fresh()[name] for name in names}  # each as the first that is read of its file
    for found in ({**fresh()}, dict(fresh().items()), dict(zip(fresh(), fresh().values(), strict=True))):
        for name in names:
            np.testing.assert_array_equal(found[name], arrays[name], strict=True)
    for absent in ("h9/ln_1/g", "wpe/scales", "hparams.json", "hparams", "wte.npy", "", None, 3):
        assert absent not in fresh()
        assert fresh().get(absent, "none") == "none"
        with pytest.raises(KeyError):
            fresh()[absent]
    assert ("wte/scales" in fresh()) == ("int8" in (stored, rounded))


def test_to_say_what_there_is_nothing_is_read(tmp_path):
    """Of a file in which every array is damaged."""
    arrays = {name: np.full_like(array, np.nan) for name, array in random_arrays().items()}
    writer.write(tmp_path / "m.npz", SMALL, arrays.items(), None)
    loaded = Weights(tmp_path / "m.npz")
    assert (len(loaded), list(loaded), "wte" in loaded) == (len(arrays), list(arrays), True)
    with pytest.raises(ValueError, match="not finite"):
        loaded.get("wte")


def test_opening_looks_at_no_array(tmp_path, monkeypatch):
    hparams = HParams(n_vocab=3000, n_ctx=512, n_embd=64, n_head=2, n_layer=1)
    writer.write(tmp_path / "m.npz", hparams, random_arrays(hparams).items(), None)
    checked = []
    crc32 = zlib.crc32

    def counting(data, value=0):
        checked.append(len(data))
        return crc32(data, value)

    monkeypatch.setattr(zlib, "crc32", counting)
    loaded = Weights(tmp_path / "m.npz")
    text = len(json.dumps(hparams._asdict()))
    assert sum(checked) == text
    assert loaded["wpe"].nbytes < sum(checked) - text < loaded["wpe"].nbytes + 1000


def test_replacing_the_file_leaves_an_open_model_alone(small):
    if os.name == "nt":
        pytest.skip("Windows refuses to replace an open file")
    loaded = Weights(small)
    writer.write(small, SMALL, random_arrays(seed=1).items(), None)
    assert_equal(loaded, random_arrays())
    assert_equal(Weights(small), random_arrays(seed=1))


# ---- What others write


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_files_that_numpy_writes_load_equal(savez, opened):
    arrays = random_arrays()
    loaded = opened(by_numpy(arrays, savez, extra=np.arange(3)))
    assert_equal(loaded, arrays)
    assert loaded.dtype == "float32"
    assert loaded.vocabulary() is None


def test_a_file_can_be_written_in_float16(tmp_path):
    arrays = random_arrays()
    writer.write(tmp_path / "half.npz", SMALL, arrays.items(), None, dtype="float16")
    loaded = Weights(tmp_path / "half.npz")
    assert loaded.dtype == "float16"
    assert_equal(loaded, {name: array.astype(np.float16).astype(np.float32) for name, array in arrays.items()})
    with np.load(tmp_path / "half.npz") as archive:
        assert archive["wte"].dtype == np.float16


def test_what_is_too_large_for_float16_is_named(tmp_path):
    arrays = random_arrays() | {"ln_f/b": np.full(SMALL.n_embd, 1e5, np.float32)}
    with pytest.raises(ValueError, match="variable ln_f/b has values that are too large for float16"):
        writer.write(tmp_path / "half.npz", SMALL, arrays.items(), None, dtype="float16")
    assert os.listdir(tmp_path) == []


def test_float16_is_widened(opened):
    arrays = {name: array.astype(np.float16) for name, array in random_arrays().items()}
    loaded = opened(by_numpy(arrays))
    assert loaded.dtype == "float16"
    assert_equal(loaded, arrays)
    arrays["wte"] = arrays["wte"].astype(np.float32)
    loaded = opened(by_numpy(arrays, np.savez_compressed))
    assert loaded.dtype == "float16 and float32"
    assert_equal(loaded, arrays)


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_fortran_order_is_followed(savez, opened):
    arrays = random_arrays()
    assert_equal(opened(by_numpy({name: np.asfortranarray(a) for name, a in arrays.items()}, savez)), arrays)


def test_a_file_behind_other_bytes_loads(small, opened):
    """As zipfile allows; by a multiple of 64 bytes, so that it is mapped, and by another number."""
    for size in (64, 1):
        assert_equal(opened(b"x" * size + small.read_bytes()), random_arrays())


def test_unaligned_arrays_larger_than_a_chunk_are_copied(opened, allocated_peak):
    hparams = HParams(n_vocab=20_000, n_ctx=8, n_embd=64, n_head=2, n_layer=1)
    arrays = random_arrays(hparams)
    for savez in (np.savez, np.savez_compressed):
        loaded = opened(by_numpy(arrays, savez, hparams))
        assert_equal(loaded, arrays)

        def read(path=loaded.path):
            Weights(path)["wte"]

        assert arrays["wte"].nbytes > 4 * CHUNK
        assert allocated_peak(read) < arrays["wte"].nbytes + 5 * CHUNK


def test_arrays_that_expand_to_many_chunks_of_what_is_compressed(opened):
    """A piece of what is compressed gives more than is taken of it at once."""
    hparams = HParams(n_vocab=40_000, n_ctx=8, n_embd=64, n_head=2, n_layer=1)
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 4, array.shape).astype(np.float32) for name, array in random_arrays(hparams).items()
    }
    data = by_numpy(arrays, np.savez_compressed, hparams)
    assert len(data) < arrays["wte"].nbytes / 8
    assert_equal(opened(data), arrays)


# ---- What is missing or doesn't fit


def test_missing_variables_are_named(opened):
    with pytest.raises(ValueError, match=r"model\.npz: h1/mlp/c_fc/w\.npy is missing from it; convert or download"):
        opened(by_numpy(random_arrays(), drop=["h1/mlp/c_fc/w"]))


def changed(name, array):
    return random_arrays() | {name: array}


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 7), np.float32), r"variable wpe has shape \(5, 7\), where hparams.json asks for \(5, 8\)"),
        (np.zeros((8, 5), np.float32), r"has shape \(8, 5\)"),
        (np.zeros(40, np.float32), r"has shape \(40,\)"),
        (np.float32(1), r"has shape \(\)"),
        (np.zeros((1, 5, 8), np.float32), r"has shape \(1, 5, 8\)"),
        (np.zeros((5, 8)), "variable wpe has type float64, where float32 or float16 is expected"),
        (np.zeros((5, 8), np.int32), "has type int32"),
        (np.zeros((5, 8), ">f4"), "has type >f4"),
        (np.zeros((5, 8), ">f2"), "has type >f2"),
        (np.zeros((5, 8), bool), "has type bool"),
        (np.zeros((5, 8), np.complex64), "has type complex64"),
        (np.zeros((5, 8), "S4"), r"has type \|S4"),
        (np.zeros((5, 8), [("a", "<f4")]), "has type"),
    ],
)
def test_misshapen_variables_are_named(array, message, opened):
    for savez in (np.savez, np.savez_compressed):
        with pytest.raises(ValueError, match=message):
            opened(by_numpy(changed("wpe", array), savez))


class Exploding:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.filterwarnings("ignore")
def test_pickles_are_refused_unopened(opened):
    array = np.empty((5, 8), object)
    array[...] = Exploding()
    with pytest.raises(ValueError, match="variable wpe has type object"):
        opened(by_numpy(changed("wpe", array)))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hparams.json", json.dumps(SMALL._asdict()))
        for name in variable_shapes(SMALL):
            archive.writestr(f"{name}.npy", pickle.dumps(Exploding()))
    with pytest.raises(ValueError, match="variable wte can't be read"):
        opened(file.getvalue())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed, None])
def test_values_that_are_no_numbers_are_named_when_they_are_read(value, savez, opened, tmp_path):
    arrays = random_arrays()
    arrays["h1/attn/c_attn/w"][-1, -1] = value
    if savez is None:
        writer.write(tmp_path / "m.npz", SMALL, arrays.items(), None)
        loaded = Weights(tmp_path / "m.npz")
    else:
        loaded = opened(by_numpy(arrays, savez))
    np.testing.assert_array_equal(loaded["wte"], arrays["wte"])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"variable h1/attn/c_attn/w holds values that are not finite numbers"):
            loaded["h1/attn/c_attn/w"]


def test_all_finite_looks_at_every_chunk():
    array = np.zeros((3, CHUNK), np.float32)
    assert weights.all_finite(array)
    assert weights.all_finite(array.T)
    for position in (0, CHUNK - 1, CHUNK, 3 * CHUNK - 1):
        array.flat[position] = np.nan
        assert not weights.all_finite(array)
        assert not weights.all_finite(array.T)
        array.flat[position] = 0


def test_only_half_a_vocabulary_is_refused(small, opened):
    with zipfile.ZipFile(small) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != "vocab.bpe"}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=r"vocab\.bpe is missing from it"):
        opened(file.getvalue()).vocabulary()


# ---- hparams


def test_missing_hparams_are_named(opened):
    with pytest.raises(ValueError, match=r"model\.npz: hparams\.json is missing from it; npgpt2 convert writes it"):
        opened(by_numpy(random_arrays(), hparams=None))


@pytest.mark.parametrize("name", list(SMALL._asdict()))
@pytest.mark.parametrize(
    "value", [1.0, True, "8", 0, -1, 10**30, 2**31, None, [8], {}, float("nan"), float("inf"), "x" * 10**4]
)
def test_hparams_with_silly_values_are_refused(name, value, opened):
    text = json.dumps(SMALL._asdict() | {name: value}).encode()
    with pytest.raises(ValueError, match=f"hparams.json: {name} is .*, where a whole number of at least 1") as caught:
        opened(by_numpy(random_arrays(), hparams=text))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", list(SMALL._asdict()))
def test_hparams_that_are_missing_are_named(name, opened):
    text = json.dumps({key: value for key, value in SMALL._asdict().items() if key != name}).encode()
    with pytest.raises(ValueError, match=f"hparams.json: {name} is missing"):
        opened(by_numpy(random_arrays(), hparams=text))


@pytest.mark.parametrize("depth", [100, 300, 500, 700, 900, 950, 10_000, 100_000])
def test_deeply_nested_hparams_are_refused(depth, opened):
    text = json.dumps(SMALL._asdict()).replace("11", "[" * depth + "]" * depth).encode()
    with pytest.raises(ValueError, match=r"n_vocab is|not valid JSON|larger than"):
        opened(by_numpy(random_arrays(), hparams=text))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"1", b"null", b"\xff", b"\xef\xbb\xbf", b"{} {}", b"9" * 5000])
def test_hparams_that_are_no_json_object_are_refused(text, opened):
    with pytest.raises(ValueError, match=r"hparams\.json: (not valid JSON|holds a JSON)"):
        opened(by_numpy(random_arrays(), hparams=text))


def test_heads_that_do_not_divide_the_width_are_refused(opened):
    text = json.dumps(SMALL._asdict() | {"n_head": 3}).encode()
    with pytest.raises(ValueError, match=r"hparams\.json: n_embd 8 can't be divided among n_head 3 heads"):
        opened(by_numpy(random_arrays(), hparams=text))


@pytest.mark.parametrize("n_layer", [3, 1000, 2**31 - 1])
def test_more_layers_than_the_file_holds_are_refused(n_layer, opened):
    text = json.dumps(SMALL._asdict() | {"n_layer": n_layer}).encode()
    with pytest.raises(ValueError, match=r"h2/ln_1/g\.npy is missing|n_layer is \d+, but it holds 29 members"):
        opened(by_numpy(random_arrays(), hparams=text))


def test_further_entries_of_hparams_are_passed_over(opened):
    text = json.dumps(SMALL._asdict() | {"n_inner": None, "author": "x"}).encode()
    assert opened(by_numpy(random_arrays(), hparams=text)).hparams == SMALL


# ---- Damage


@pytest.mark.parametrize("data", [b"", b"x", b"<!DOCTYPE html>", b"PK\3\4" * 100, b"PK\5\6" + bytes(17), bytes(1000)])
def test_what_is_no_zip_file_is_refused(data, opened):
    with pytest.raises(ValueError, match=r"model\.npz: not a model file, or cut short \(.*\); convert or download"):
        opened(data)


def test_an_empty_zip_file_is_refused(opened):
    with pytest.raises(ValueError, match=r"hparams\.json is missing"):
        opened(b"PK\5\6" + bytes(18))


def test_what_the_system_refuses_has_its_own_message(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        Weights(tmp_path / "none.npz")
    with pytest.raises(OSError, match=tmp_path.name):
        Weights(tmp_path)


def test_damage_is_named_when_the_variable_is_read(small, opened):
    data = bytearray(small.read_bytes())
    data[data.index(random_arrays()["wte"].tobytes())] ^= 1
    loaded = opened(bytes(data))
    np.testing.assert_array_equal(loaded["wpe"], random_arrays()["wpe"])
    with pytest.raises(ValueError, match=r"variable wte is damaged \(its checksum is wrong\); convert or download"):
        loaded["wte"]


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed, None])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_damage_in_a_large_variable_leaves_the_others_usable(savez, part, opened, tmp_path):
    hparams = HParams(n_vocab=3000, n_ctx=8, n_embd=64, n_head=2, n_layer=1)
    arrays = random_arrays(hparams)
    if savez:
        data = bytearray(by_numpy(arrays, savez, hparams))
    else:
        writer.write(tmp_path / "m.npz", hparams, arrays.items(), None)
        data = bytearray((tmp_path / "m.npz").read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = archive.getinfo("wte.npy")
    data[info.header_offset + 10_000 + int(part * (info.compress_size - 10_000))] ^= 0x55
    loaded = opened(bytes(data))
    with pytest.raises(ValueError, match="variable wte is damaged"):
        loaded["wte"]
    np.testing.assert_array_equal(loaded["wpe"], arrays["wpe"])


def test_two_members_of_one_name_are_refused(small, opened):
    data = bytearray(small.read_bytes())
    at = writers.zip_header(bytes(data), "wpe.npy") + 46
    data[at : at + 7] = b"wte.npy"
    with pytest.raises(ValueError, match="two members have the same name"):
        opened(bytes(data))


@pytest.mark.parametrize("member", ["hparams.json", "wte.npy", "encoder.json"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flags": 1}, "encrypted"),
        ({"flags": 0x20}, "can't be read|damaged"),
        ({"flags": 0x40}, "can't be read|damaged"),
        ({"method": 8}, "can't be read|damaged"),
        ({"method": 12}, "is compressed by method 12, which NumPy doesn't use"),
        ({"method": 14}, "is compressed by method 14, which NumPy doesn't use"),
        ({"method": 99}, "is compressed by method 99, which NumPy doesn't use"),
        ({"crc": 7}, "can't be read|damaged"),
        ({"size": 0}, "can't be read|damaged|which don't hold shape"),
        ({"size": 1}, "can't be read|damaged|which don't hold shape"),
        ({"size": 2**32 - 2}, "larger than|which don't hold shape"),
        ({"compressed": 3}, "can't be read|damaged|cut short"),
        ({"offset": 1}, "can't be read|no zip header|damaged"),
        ({"offset": 2**32 - 2}, "can't be read|no zip header|damaged"),
        ({"version": 99}, "not a model file"),
    ],
)
def test_headers_that_lie_are_refused(member, changes, message, small, opened):
    data = patched(small.read_bytes(), member, **changes)

    def read(loaded):
        return loaded.vocabulary(), loaded["wte"]

    with pytest.raises(ValueError, match=message):
        read(opened(data))


def test_a_text_that_claims_to_be_longer_is_read_as_far_as_it_goes(small, opened):
    loaded = opened(patched(patched(small.read_bytes(), "hparams.json", size=10**4), "vocab.bpe", size=10**6))
    assert (loaded.hparams, loaded.vocabulary()) == (SMALL, VOCABULARY)


@pytest.mark.parametrize("member", ["hparams.json", "wte.npy"])
@pytest.mark.parametrize(
    "changes", [{"name_length": 1}, {"extra_length": 1}, {"extra_length": 2**16 - 1}, {"name_length": 999}]
)
def test_local_headers_that_lie_are_refused(member, changes, small, opened):
    with pytest.raises(ValueError, match=r"can't be read|no zip header|damaged|cut short"):
        opened(patched(small.read_bytes(), member, central=False, **changes))


@pytest.mark.parametrize("member", ["hparams.json", "encoder.json", "wte.npy"])
@pytest.mark.parametrize("offset", [2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
def test_members_that_claim_to_be_far_away_are_refused(member, offset, small, opened):
    data = writers.with_zip64_offset(small.read_bytes(), member, offset)
    with pytest.raises(ValueError, match=r"can't be read|no zip header|not a model file"):
        opened(data).vocabulary()


@pytest.mark.parametrize("member", ["hparams.json", "encoder.json", "wte.npy"])
def test_members_that_claim_to_go_beyond_the_file_are_refused(member, small, opened):
    """Of the right size once they are read, so that nothing but that is wrong with them."""
    for size in (small.stat().st_size, 2**32 - 2):
        with pytest.raises(ValueError, match=rf"{member.removesuffix('.npy')} is cut short"):
            opened(patched(small.read_bytes(), member, compressed=size)).vocabulary()


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**62, 2**63, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 1, 2**31, 2**62, 2**63, 2**64 - 1])
def test_central_directories_that_claim_to_be_far_away_are_refused(size, offset, small, opened):
    with pytest.raises(ValueError, match=r"not a model file|hparams\.json is missing"):
        opened(writers.with_zip64_end(small.read_bytes(), size, offset))


def test_a_variable_that_claims_to_go_beyond_the_file_is_refused(tmp_path, opened):
    """Stored without a checksum to stop at: sizes that agree with each other, but not with the file."""
    hparams = HParams(n_vocab=3000, n_ctx=8, n_embd=64, n_head=2, n_layer=1)
    writer.write(tmp_path / "m.npz", hparams, random_arrays(hparams).items(), None)
    data = (tmp_path / "m.npz").read_bytes()
    with pytest.raises(ValueError, match=r"variable wte (is cut short|can't be read \(Overlapped)"):
        opened(patched(data, "wte.npy", compressed=2**20))["wte"]  # newer versions of zipfile see it first


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_variable_that_holds_less_than_it_claims_is_refused(method, opened):
    """Whose checksum is that of what there is."""
    file = io.BytesIO(by_numpy(random_arrays(), drop=["wte"]))
    buffer = io.BytesIO()
    np.save(buffer, random_arrays()["wte"])
    with zipfile.ZipFile(file, "a", method) as archive:
        archive.writestr("wte.npy", buffer.getvalue()[:-4])
    with pytest.raises(ValueError, match=r"variable wte is (cut short|damaged \(it is cut short\)); convert"):
        opened(patched(file.getvalue(), "wte.npy", size=len(buffer.getvalue())))["wte"]


def bomb(name, size, deflated, claim):
    """A zip file whose member `name` holds `size` spaces, of which it claims to be `claim`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        if name != "hparams.json":
            archive.writestr("hparams.json", json.dumps(SMALL._asdict()))
        archive.writestr(name, b" " * size)
    return patched(file.getvalue(), name, size=claim)


@pytest.mark.parametrize("claim", [10, 10**8])
def test_text_that_expands_without_end_is_not_expanded(claim, tmp_path, allocated_peak):
    path = tmp_path / "bomb.npz"
    path.write_bytes(bomb("hparams.json", 10**8, True, claim))

    def read():
        with pytest.raises(ValueError, match=r"hparams\.json (can't be read|is larger than)"):
            Weights(path)

    assert allocated_peak(read) < 2**20


def with_texts(path, method, **texts):
    """A small model file with these bytes as its texts."""
    with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(io.BytesIO(by_numpy(random_arrays()))) as arrays:
        for name in arrays.namelist():
            text = texts.pop(name.removesuffix(".json"), None)
            archive.writestr(name, arrays.read(name) if text is None else text, method if text else None)
        for name, text in texts.items():
            archive.writestr({"encoder": "encoder.json", "bpe": "vocab.bpe"}[name], text, method)
    return path


MANY_LISTS = b'{"a": [' + b"[]," * 10**7 + b"[]]}"
BYTES = json.dumps({sign: token for token, sign in enumerate(BYTE_CHARACTERS)}).encode()
SIZES = json.dumps(SMALL._asdict()).encode()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"hparams": MANY_LISTS}, r"hparams\.json is larger than 65,536 bytes"),
        ({"hparams": SIZES + b" " * 10**4}, r"hparams\.json has \d+ bytes that expand to 10,\d+"),
        ({"encoder": MANY_LISTS, "bpe": b""}, r"encoder\.json has [\d,]+ bytes that expand to 30,[\d,]+"),
        ({"encoder": b"{}", "bpe": b"a b\n" * 10**6}, r"vocab\.bpe has [\d,]+ bytes that expand to 4,[\d,]+"),
    ],
)
def test_small_files_take_little_memory_for_their_texts(texts, message, tmp_path, allocated_peak):
    path = with_texts(tmp_path / "m.npz", zipfile.ZIP_DEFLATED, **texts)
    assert path.stat().st_size < 100_000

    def read():
        with pytest.raises(ValueError, match=f"m\\.npz: {message}; convert or download the model again"):
            Weights(path).vocabulary()

    assert allocated_peak(read) < 2**20


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"encoder": MANY_LISTS, "bpe": b""}, r"encoder\.json: has more values than the 2,097,152"),
        ({"encoder": BYTES, "bpe": b"a b\n" * 4 * 10**6}, r"vocab\.bpe has more than 2,097,152 lines"),
    ],
)
def test_large_files_take_no_more_memory_for_their_texts_than_they_have_bytes(texts, message, tmp_path, allocated_peak):
    path = with_texts(tmp_path / "m.npz", zipfile.ZIP_STORED, **texts)
    model = npgpt2.load(path)

    def read():
        with pytest.raises(ValueError, match=message):
            print(model.tokenizer)

    assert allocated_peak(read) < 2.2 * path.stat().st_size


def test_variables_that_expand_without_end_are_refused(opened):
    hparams = HParams(n_vocab=20_000, n_ctx=8, n_embd=64, n_head=2, n_layer=1)
    arrays = {name: np.zeros_like(array) for name, array in random_arrays(hparams).items()}
    with pytest.raises(ValueError, match=r"model\.npz: [\d,]+ bytes that expand to 5,[\d,]+; convert"):
        opened(by_numpy(arrays, np.savez_compressed, hparams))


# ---- .npy headers


def with_npy_header(text, magic=b"\x93NUMPY\x01\x00", length=None):
    """A model file whose wte has this .npy header, by a zip file that is otherwise in order."""
    text = text if isinstance(text, bytes) else text.encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hparams.json", json.dumps(SMALL._asdict()))
        for name, array in random_arrays().items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            data = buffer.getvalue()
            if name == "wte":
                size = len(text) if length is None else length
                data = magic + size.to_bytes(2, "little") + text + array.tobytes()
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (11, 8)}"


@pytest.mark.parametrize(
    "text", [PLAIN, PLAIN + "\n", "{'shape': (11,8), 'descr': 'float32', 'fortran_order': 0}", PLAIN + " " * 9000]
)
def test_headers_that_others_may_write(text, opened):
    assert_equal(opened(with_npy_header(text)), random_arrays())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        "'descr'",
        "{}",
        "{[]: 1}",
        "None",
        PLAIN.replace("'descr'", "'desc'"),
        PLAIN.replace("'shape'", "'form'"),
        PLAIN.replace("'fortran_order'", "'order'"),
        PLAIN.replace("'<f4'", "'nonsense'"),
        PLAIN.replace("'<f4'", "None"),
        PLAIN.replace("'<f4'", "3"),
        PLAIN.replace("'<f4'", "{}"),
        PLAIN.replace("'<f4'", "{'names': 1}"),
        PLAIN.replace("'<f4'", "('<f4', 9999999999999999999999)"),
        PLAIN.replace("'<f4'", "'V99999999999999999999999'"),
        PLAIN.replace("'<f4'", "'" + "f4," * 500 + "f4'"),
        PLAIN.replace("(11, 8)", "[11, 8]"),
        PLAIN.replace("(11, 8)", "88"),
        PLAIN.replace("(11, 8)", "None"),
        PLAIN.replace("(11, 8)", "(11, -8)"),
        PLAIN.replace("(11, 8)", "(11, 1" + "0" * 5000 + ")"),
        PLAIN.replace("False", "().__class__"),
        PLAIN.replace("False", "print('executed')"),
        "(" * 5000 + ")" * 4000,
        "[" * 90 + "]" * 90,
        "-" * 9000 + "1",
        "not " * 2000 + "1",
        "1" + "+1j" * 3000,
        b"\xff\xfe\x00",
        b"\x00" * 100,
        PLAIN + " " * 10_000,
    ],
)
def test_headers_that_are_broken_or_hostile_are_refused(text, opened, capsys):
    with pytest.raises(ValueError, match=r"variable wte (can't be read|has type|has shape)") as caught:
        opened(with_npy_header(text))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "magic", [b"\x93NUMPY\x02\x00", b"\x93NUMPY\x00\x01", b"\x93NUMPX\x01\x00", b"PK\x03\x04\0\0\0\0"]
)
def test_other_versions_of_the_format_are_refused(magic, opened):
    with pytest.raises(ValueError, match="variable wte can't be read"):
        opened(with_npy_header(PLAIN, magic))


@pytest.mark.parametrize("length", [0, 10, 2**16 - 1])
def test_headers_of_another_length_than_they_say_are_refused(length, opened):
    with pytest.raises(ValueError, match=r"variable wte (can't be read|has [0-9]+ bytes)"):
        opened(with_npy_header(PLAIN, length=length))


# ---- Writing that fails


def failing(error):
    for number, item in enumerate(random_arrays().items()):
        if number == 9:
            raise error
        yield item


@pytest.mark.parametrize("error", [ValueError("damaged"), OSError("unreadable"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("before", [None, b"the old one"])
def test_a_source_that_fails_leaves_what_was_there(error, before, tmp_path):
    path = tmp_path / "m.npz"
    if before:
        path.write_bytes(before)
    with pytest.raises(type(error)) as caught:
        writer.write(path, SMALL, failing(error), VOCABULARY)
    assert caught.value is error
    assert os.listdir(tmp_path) == (["m.npz"] if before else [])
    assert not before or path.read_bytes() == before


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_that_is_full_leaves_what_was_there(function, small, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = small.read_bytes()
    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match=r"small\.npz") as caught:
        writer.write(small, SMALL, random_arrays(seed=1).items(), None)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(small))
    assert os.listdir(small.parent) == [small.name]
    assert small.read_bytes() == before


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from npgpt2.weights import writer
from writers import SMALL, random_arrays
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
try:
    writer.write(Path({path!r}), SMALL, random_arrays(seed=1).items(), None)
except OSError as error:
    print(error.filename)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
@pytest.mark.parametrize("size", [0, 100, 5000, 9999])
def test_a_file_that_outgrows_its_limit_leaves_what_was_there(size, small):
    before = small.read_bytes()
    tests = os.path.dirname(os.path.abspath(__file__))
    code = LIMITED.format(tests=tests, size=size, path=str(small))
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=os.path.dirname(tests)
    )
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, str(small), "")
    assert os.listdir(small.parent) == [small.name]
    assert small.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        writer.write(tmp_path / "m.npz", SMALL, random_arrays().items(), None)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.npz").stat().st_mode) == mode


def test_where_no_file_can_be_written(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, where a file is to be written"):
        writer.write(tmp_path, SMALL, random_arrays().items(), None)
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder, to write m\.npz in"):
        writer.write(tmp_path / "nowhere" / "m.npz", SMALL, random_arrays().items(), None)
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_too_long_is_reported_as_it_was_given(tmp_path):
    path = tmp_path / f"{'m' * 250}.npz"
    with pytest.raises(OSError, match=r"m\.npz") as caught:
        writer.write(path, SMALL, random_arrays().items(), None)
    assert caught.value.filename == str(path)
