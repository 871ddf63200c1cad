"""What torch.save writes, read without PyTorch: the same numbers, nothing that runs, nothing read that isn't needed."""

import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from builders import SMALL, random_arrays
from writers import (
    CONFIG,
    STORAGES,
    Call,
    Name,
    Persistent,
    View,
    described,
    hf_tensors,
    nanogpt_checkpoint,
    pickled,
    torch_legacy,
    torch_members,
    torch_saved,
    torch_zip,
)

from npgpt2.convert import convert
from npgpt2.convert.conversion import widen
from npgpt2.convert.pickles import STEPS_LIMIT
from npgpt2.convert.pytorch import PICKLE_LIMIT, PyTorchFile
from npgpt2.model import HParams, variable_shapes
from npgpt2.weights import Weights


def opened(path, data):
    path.write_bytes(data)
    return PyTorchFile(path)


def read_tensors(file):
    """All tensors of a state dict, as float32."""
    tensors = file.state_dict()
    return {name: widen(*tensor.read(name)).reshape(tensor.shape) for name, tensor in tensors.items()}


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def assert_holds(path, arrays):
    assert_equal({name: Weights(path)[name] for name in variable_shapes(Weights(path).hparams)}, arrays)


@pytest.fixture(params=[torch_saved, torch_legacy], ids=["zip", "before 1.6"])
def save(request):
    return request.param


NUMBERS = np.arange(24, dtype=np.float32)


# ---- Tensors


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_floats_of_every_width(dtype, save, tmp_path):
    array = np.array([[1.5, -0.0, 65504], [np.inf, 2**-14, 3]], dtype)
    assert_equal(read_tensors(opened(tmp_path / "x.pt", save({"a": array}))), {"a": array.astype(np.float32)})


def test_bfloat16(save, tmp_path):
    upper = np.array([0x3F80, 0xBFC0, 0x0001], np.uint16)
    file = opened(tmp_path / "x.pt", save({"a": ("bfloat16", upper)}))
    assert_equal(read_tensors(file), {"a": (upper.astype(np.uint32) << 16).view(np.float32)})


@pytest.mark.parametrize("dtype", [kind for kind in STORAGES if "float" not in kind])
def test_other_numbers_are_there_but_no_weights(dtype, save, tmp_path):
    tensors = opened(tmp_path / "x.pt", save({"mask": np.ones((2, 3), dtype)})).state_dict()
    assert tensors["mask"].shape == (2, 3)
    with pytest.raises(
        ValueError, match=rf"x\.pt: tensor mask has type {dtype}, not float32, float16, bfloat16, float64"
    ):
        tensors["mask"].read("mask")


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (View(NUMBERS, (4, 6), (6, 1)), NUMBERS.reshape(4, 6)),
        (View(NUMBERS, (6, 4), (1, 6)), NUMBERS.reshape(4, 6).T),
        (View(NUMBERS, (2, 3), (6, 1), 7), NUMBERS.reshape(4, 6)[1:3, 1:4]),
        (View(NUMBERS, (4,), (6,), 5), NUMBERS.reshape(4, 6)[:, 5]),
        (View(NUMBERS, (3, 2, 4), (1, 12, 3)), NUMBERS.reshape(2, 4, 3).transpose(2, 0, 1)),
        (View(NUMBERS, (3, 2), (0, 1), 22), np.float32([[22, 23]] * 3)),
        (View(NUMBERS, (), (), 23), NUMBERS[23]),
        (View(NUMBERS, (1, 1), (2**62, 2**62), 23), NUMBERS[23:].reshape(1, 1)),
        (View(NUMBERS, (0, 5), (5, 1), 24), np.zeros((0, 5), np.float32)),
        (View(NUMBERS[:0], (0,), (1,)), np.zeros(0, np.float32)),
        (View(NUMBERS, (2,) * 3 + (1,) * 29, (1,) * 32), sum(np.ix_(*[range(2)] * 3)).reshape((2,) * 3 + (1,) * 29)),
    ],
)
def test_views_of_a_storage(view, expected, save, tmp_path):
    file = opened(tmp_path / "x.pt", save({"whole": NUMBERS, "view": view}))
    assert_equal(read_tensors(file), {"whole": NUMBERS, "view": expected})


def test_parameters_and_tensors_with_attributes(save, tmp_path):
    rebuild, hooks = Name("torch._utils _rebuild_parameter"), Call(Name("collections OrderedDict"))
    inner = described(NUMBERS, storages := {})
    with_attribute = Call(
        Name("torch._tensor _rebuild_from_type_v2"), inner.name, Name("torch Tensor"), inner.arguments, {"x": "y"}
    )
    saved = {"parameter": Call(rebuild, NUMBERS, True, hooks)}
    assert_equal(read_tensors(opened(tmp_path / "x.pt", save(saved))), {"parameter": NUMBERS})
    data = torch_zip(
        torch_members(pickled({"tensor": with_attribute})) | {"archive/data/0": storages["0"][1].tobytes()}
    )
    assert_equal(read_tensors(opened(tmp_path / "x.pt", data)), {"tensor": NUMBERS})


def test_what_a_state_dict_s_modules_note_about_themselves_is_passed_over(tmp_path):
    storages = {}
    metadata = pickled({"_metadata": {"": {"version": 1}}}, stop=False)
    text = pickled(described({"a": NUMBERS}, storages), stop=False) + metadata + b"b."
    file = opened(tmp_path / "x.pt", torch_zip(torch_members(text) | {"archive/data/0": NUMBERS.tobytes()}))
    assert_equal(read_tensors(file), {"a": NUMBERS})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_those_that_pickle_reads(protocol, tmp_path):
    shared = [1, 2]
    values = {
        "numbers": (0, -1, 255, 65535, 2**31 - 1, -(2**31), 2**40, -(2**70), 1.5, float("-inf")),
        "words": ["", "a", "é" * 300, "\ud800"],
        "others": {"x": None, 3: True, -4: False},
        "nested": [[], (), {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), shared, shared],
        "long": list(range(3000)),
    }
    members = torch_members(b"") | {"archive/data.pkl": pickle.dumps(values, protocol)}
    assert opened(tmp_path / "x.pt", torch_zip(members)).saved == values


def test_pickles_without_an_end_or_with_something_left_over_are_refused(tmp_path):
    for text in (b"\x80\x02}", b"\x80\x02}}.", b"\x80\x02."):
        with pytest.raises(ValueError, match=r"x\.pt: pickle: (has no end|takes what isn't there)"):
            opened(tmp_path / "x.pt", torch_zip(torch_members(b"") | {"archive/data.pkl": text}))


# ---- What is refused

TENSOR = "torch._utils _rebuild_tensor_v2"
STORAGE = Persistent("storage", Name("torch FloatStorage"), "0", "cpu", 24)


class Runs:
    """What pickle calls a function for, when it reads it."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nothing_runs(protocol, tmp_path):
    text = pickle.dumps({"model": Runs(f"echo > {tmp_path}/ran")}, protocol)
    refused = (
        rf"x\.pt: pickle: asks for '{os.system.__module__}\.system', which is neither .* and is not run; if you trust"
    )
    with pytest.raises(ValueError, match=refused):
        opened(tmp_path / "x.pt", torch_zip(torch_members(b"") | {"archive/data.pkl": text}))
    assert os.listdir(tmp_path) == ["x.pt"]
    pickle.loads(text)  # which it would have done
    assert {*os.listdir(tmp_path)} == {"ran", "x.pt"}


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval", "builtins getattr", "torch load", "torch.storage _load_from_bytes", "numpy ndarray",
        "numpy.core.multiarray scalar", "__main__ GPT", "torch._utils _rebuild_sparse_tensor", "torch",
        "torch ComplexFloatStorage", "a\tb c", "collections OrderedDict.fromkeys", "x" * 10**5 + " y",
    ],
)  # fmt: skip
def test_other_names_are_refused_by_name(name, save, tmp_path):
    with pytest.raises(ValueError, match=r"x\.pt: pickle: (asks for '|ends within a name)") as caught:
        opened(tmp_path / "x.pt", save({"model": Name(name)}))
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "saved",
    [
        Call(Name("torch FloatStorage"), 5),
        Call(Name("torch Tensor"), 5),
        Call(Name("collections OrderedDict"), [("a", 1)]),
        Call(Name("torch._utils _rebuild_parameter"), 5),
        Call(Name("torch._utils _rebuild_parameter")),
        Call(Name("torch._tensor _rebuild_from_type_v2"), Name("torch Size"), Name("torch Tensor"), (1,), {}),
        Call(Name("torch._tensor _rebuild_from_type_v2"), 1, 2, 3, 4),
        Call("torch.Size", 3),
        Call(Name(TENSOR)),
        Call(Name(TENSOR), 1, 0, (2,), (1,), False, {}),
        Call(Name(TENSOR), STORAGE, 0, 2, (1,), False, {}),
        Call(Name(TENSOR), STORAGE, 0, (2,), [1], False, {}),
        Call(Name(TENSOR), STORAGE, 0, (2,), (1, 1), False, {}),
        Call(Name(TENSOR), STORAGE, -1, (2,), (1,), False, {}),
        Call(Name(TENSOR), STORAGE, True, (2,), (1,), False, {}),
        Call(Name(TENSOR), STORAGE, 0, (2.0,), (1,), False, {}),
        Call(Name(TENSOR), STORAGE, 0, (2,), (-1,), False, {}),
        Call(Name(TENSOR), STORAGE, 0, (25,), (1,), False, {}),
        Call(Name(TENSOR), STORAGE, 1, (24,), (1,), False, {}),
        Call(Name(TENSOR), STORAGE, 0, (2, 2), (1, 23), False, {}),
        Call(Name(TENSOR), STORAGE, 0, (2**62, 2**62), (2**62, 2**62), False, {}),
        Call(Name(TENSOR), STORAGE, 2**200, (1,), (1,), False, {}),
        Call(Name(TENSOR), STORAGE, 0, (1,) * 33, (1,) * 33, False, {}),
        Call(Name(TENSOR), STORAGE, 0, (2,), (1,), False, {}, {"neg": True}),
        Call(Name("torch._utils _rebuild_tensor_v3"), STORAGE, 0, (2,), (1,), False, {}, "float32"),
        Call(Name("torch._utils _rebuild_tensor_v3"), STORAGE, 0, (2,), (1,), False, {}),
        Persistent("module", 1, 2),
        Persistent("storage", Name("torch FloatStorage"), "0", "cpu"),
        Persistent("storage", Name("torch FloatStorage"), 0, "cpu", 24),
        Persistent("storage", Name("torch FloatStorage"), "0", "cpu", -24),
        Persistent("storage", Name("torch FloatStorage"), "0", "cpu", 24, ("1", 0, 5)),
        Persistent("storage", Name("torch Size"), "0", "cpu", 24),
        Persistent("storage", "torch FloatStorage", "0", "cpu", 24),
        [STORAGE, Persistent("storage", Name("torch HalfStorage"), "0", "cpu", 24)],
        {(1, 2): 3},
        {1.5: 3},
        {2**40: 3},
        {None: 3},
        {True: 3},
    ],
)  # fmt: skip
def test_what_pytorch_does_not_write_is_refused(saved, save, tmp_path):
    with pytest.raises(ValueError, match=r"x\.pt: pickle: ") as caught:
        opened(tmp_path / "x.pt", save({"saved": saved}))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        b"", b".", b"0.", b"1.", b"(.", b"t.", b"e.", b"u.", b"s.", b"a.", b"R.", b"b.", b"Q.", b"\x85.", b"\x86.",
        b"\x87.", b"h\0.", b"j\0\0\0\0.", b"q\0.", b"\x94.", b"\x93.", b"}\x93.", b"}}\x93.", b"]]]]\x93.", b"N(u.",
        b"}(Nu.", b"](Na.", b"N(e.", b"NNs.", b"}NNs.", b"}}Ns.", b"NR.", b"Nb.", b"NQ.", b")Q.", b"(lp0\n.", b"I1\n.",
        b"V\\u\n.", b"S'\\q'\n.", b"i\n\n.", b"o.", b"\x81.", b"\x82\1.", b"\x8b\xff\xff\xff\x7f1.", b"P1\n.",
        b"X\xff\xff\xff\xff1.", b"X\1\0\0\0\xff.", b"\x8d" + b"\xff" * 8 + b"1.", b"\x96" + b"\xff" * 7 + b"\x7f1.",
        b"\x97.", b"\xff", b"cos\n", b"c\xff\n\xff\n.", b"\x95" + b"\xff" * 8 + b".",
    ],
)  # fmt: skip
def test_pickles_of_nonsense_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"x\.pt: pickle: ") as caught:
        opened(tmp_path / "x.pt", torch_zip(torch_members(b"") | {"archive/data.pkl": text}))
    assert str(caught.value).isprintable()


# ---- Memory and time


def test_what_is_claimed_is_not_allocated(tmp_path, allocated_peak):
    """A tensor of the whole of a small storage, again and again."""
    repeated = View(np.zeros(1, np.float32), (2**40, 2**20), (0, 0))
    data = torch_saved({"a": repeated})

    def work():
        with pytest.raises(ValueError, match=r"x\.pt: its tensors repeat its numbers until they are [\d,]+ bytes"):
            opened(tmp_path / "x.pt", data).state_dict()

    assert allocated_peak(work) < 2**20


@pytest.mark.parametrize("step", [b"}", b"(", b"}\x94", b"X\1\0\0\0a"])
def test_many_steps_take_bounded_memory(step, tmp_path, allocated_peak):
    text = b"\x80\x04" + step * (PICKLE_LIMIT // len(step) - 10)

    def work():
        with pytest.raises(ValueError, match=rf"x\.pt: pickle: takes more than the {STEPS_LIMIT:,} steps"):
            opened(tmp_path / "x.pt", torch_zip(torch_members(b"") | {"archive/data.pkl": text}))

    assert allocated_peak(work) < 100 * 2**20


@pytest.mark.parametrize("step", [b"I", b"L"])
def test_numbers_in_digits_are_refused_unread(step, tmp_path):
    """Python before 3.10.7 takes minutes for a million of them."""
    text = step + b"9" * 10**6 + b"\n."
    with pytest.raises(ValueError, match=rf"x\.pt: pickle: has a step {step!r}, which no file of tensors has"):
        opened(tmp_path / "x.pt", torch_zip(torch_members(b"") | {"archive/data.pkl": text}))


def test_a_pickle_that_is_too_long_is_refused(tmp_path):
    members = torch_members({"a": NUMBERS})
    members["archive/data.pkl"] += bytes(PICKLE_LIMIT)
    with pytest.raises(
        ValueError, match=r"archive/data\.pkl has [\d,]+ bytes, more than the 4,194,304 that it can have"
    ):
        opened(tmp_path / "x.pt", torch_zip(members))


def test_one_tensor_is_in_memory_at_a_time(tmp_path, allocated_peak):
    arrays = {f"a{n}": np.full(2**18, n, np.float32) for n in range(20)}
    file = opened(tmp_path / "x.pt", torch_saved(arrays))
    tensors = file.state_dict()

    def work():
        for name, tensor in tensors.items():
            assert tensor.read(name)[0][0] == arrays[name].view(np.uint8)[0]

    assert allocated_peak(work) < 1.5 * 2**20


# ---- The file


def test_what_is_no_file_of_torch_save_is_named(tmp_path):
    for data in (b"", b"PK", b"\x80\x02", b"<!DOCTYPE html>", pickle.dumps({"model": 1}), os.urandom(100)):
        with pytest.raises(ValueError, match=r"x\.pt: not a file that torch\.save writes, or cut short"):
            opened(tmp_path / "x.pt", data)
    with pytest.raises(
        ValueError, match=r"x\.pt: is Git LFS's note of a file that wasn't fetched; fetch it with: git lfs"
    ):
        opened(tmp_path / "x.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(
        ValueError, match=r"x\.pt: a zip file, but not one that torch\.save writes \(it has no data\.pkl\)"
    ):
        opened(tmp_path / "x.pt", torch_zip({"word/document.xml": b"<>"}))


@pytest.mark.parametrize("saved", [None, 5, [1], (1, 2), NUMBERS])
def test_what_is_no_state_dict_is_named(saved, save, tmp_path):
    with pytest.raises(ValueError, match=r"x\.pt: holds no tensors by name, as a model's state_dict\(\) has them"):
        opened(tmp_path / "x.pt", save(saved)).state_dict()


def test_a_zip_file_that_is_cut_short_is_refused(tmp_path):
    data = torch_saved({"a": NUMBERS})
    for size in range(4, len(data)):
        with pytest.raises(ValueError, match=r"x\.pt: not a (model )?file.*, or cut short"):
            opened(tmp_path / "x.pt", data[:size])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archive/byteorder": b"big"}, "was written on a big-endian machine, which is not supported"),
        ({"archive/byteorder": b"sideways"}, "archive/byteorder has 8 bytes, more than the 6 that it can have"),
        ({"archive/data/0": b"1234"}, "a storage has 4 bytes instead of 96; it is damaged"),
        ({"archive/data/0": None}, "archive/data/0 is missing from it; download it again, or save it again"),
        ({"archive/data.pkl": None}, r"\(it has no data.pkl\)"),
        ({"other/data.pkl": b"N."}, r"\(it has no data.pkl\)"),
    ],
)
def test_members_that_are_wrong_are_named(change, message, tmp_path):
    members = torch_members({"a": NUMBERS}) | change
    with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
        read_tensors(opened(tmp_path / "x.pt", torch_zip({k: v for k, v in members.items() if v is not None})))


def test_older_files_do_not_say_their_byte_order(tmp_path):
    members = torch_members({"a": NUMBERS}, root="some name.é")
    del members["some name.é/byteorder"]
    assert_equal(read_tensors(opened(tmp_path / "x.pt", torch_zip(members))), {"a": NUMBERS})


def test_compressed_members_are_refused(tmp_path):
    data = torch_zip(torch_members({"a": NUMBERS}), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"x\.pt: archive/byteorder is compressed, which torch\.save doesn't do"):
        opened(tmp_path / "x.pt", data)


def test_checksums_are_verified_where_there_are_any(tmp_path):
    data = bytearray(torch_saved({"a": NUMBERS}))
    data[data.index(NUMBERS.tobytes()) + 40] ^= 1
    with pytest.raises(
        ValueError, match=r"x\.pt: archive/data/0 is damaged \(its checksum is wrong\); download it again"
    ):
        read_tensors(opened(tmp_path / "x.pt", bytes(data)))
    whole = bytearray(torch_saved({"a": NUMBERS}))
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        for info in archive.infolist():
            whole = whole.replace(struct.pack("<I", info.CRC), bytes(4))
    assert_equal(read_tensors(opened(tmp_path / "x.pt", bytes(whole))), {"a": NUMBERS})


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    file = opened(tmp_path / "x.pt", torch_legacy({"a": NUMBERS}))
    with open(tmp_path / "x.pt", "r+b") as out:
        out.truncate(200)
    with pytest.raises(ValueError, match=r"x\.pt: cut short while it was read"):
        read_tensors(file)


# ---- The format before PyTorch 1.6

OLDER = torch_legacy({"a": NUMBERS})
KEYS = pickled(["0"], stop=False)


def test_an_older_file_that_is_cut_short_is_refused(tmp_path):
    data = torch_legacy({"a": NUMBERS, "b": NUMBERS + 1})
    for size in range(len(data)):
        with pytest.raises(
            ValueError, match=r"x\.pt: .*(cut short|has no end|damaged|remain|not enough|within a name|isn't there)"
        ):
            opened(tmp_path / "x.pt", data[:size])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch_legacy({}, little_endian=False), "was written on a big-endian machine"),
        (OLDER.replace(struct.pack("<q", 24), struct.pack("<q", 23)), "another number of numbers"),
        (OLDER.replace(b"cpuJ\x18\0\0\0", b"cpu\x8a\x08" + b"\xff" * 7 + b"\x7f"), "cut short before the end of its"),
        (OLDER.replace(KEYS, KEYS.replace(b"0", b"1")), "belong to no tensor"),
        (OLDER.replace(KEYS, b"](e"), "cut short before the end of its numbers"),
        (OLDER.replace(KEYS, b"N"), "not a file that torch.save writes, or damaged"),
        (OLDER.replace(b"J\xe9\3", b"J\xe8\3", 1), "not a file that torch.save writes, or damaged"),
    ],
)  # fmt: skip
def test_an_older_file_that_is_wrong_is_refused(data, message, tmp_path):
    with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
        opened(tmp_path / "x.pt", data)


# ---- Hugging Face's pytorch_model.bin


def write_folder(folder, tensors, save=torch_saved):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "pytorch_model.bin").write_bytes(save(tensors))
    return folder


def test_a_folder_with_a_pytorch_model(save, tmp_path):
    folder = write_folder(tmp_path / "hf", hf_tensors(), save)
    assert convert(folder).path == tmp_path / "hf.npz"
    assert_holds(tmp_path / "hf.npz", random_arrays())
    (tmp_path / "hf.npz").unlink()
    assert convert(folder / "pytorch_model.bin").path == tmp_path / "hf.npz"


def test_masks_of_older_versions_are_passed_over(tmp_path):
    masks = {f"transformer.h.{n}.attn.bias": np.ones((1, 1, 5, 5), np.uint8) for n in range(2)}
    masks |= {f"transformer.h.{n}.attn.masked_bias": np.array(-1e4, np.float32) for n in range(2)}
    assert_holds(convert(write_folder(tmp_path / "hf", hf_tensors() | masks)).path, random_arrays())


def test_a_pytorch_model_in_several_files(tmp_path):
    folder, tensors = write_folder(tmp_path / "hf", {}), hf_tensors()
    (folder / "pytorch_model.bin").unlink()
    places = {name: f"pytorch_model-{number % 3}.bin" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: array for name, array in tensors.items() if places[name] == file}
        (folder / file).write_bytes(torch_saved(part))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_holds(convert(folder).path, random_arrays())
    assert convert(folder / "pytorch_model-1.bin").path == tmp_path / "hf.npz"
    (folder / "pytorch_model-1.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-1\.bin"):
        convert(folder)


def test_transposed_and_shared_weights(tmp_path):
    """As after tying by hand, or with weights that were loaded as the transposes of others."""
    tensors = hf_tensors()
    flat = np.concatenate([array.reshape(-1) for array in tensors.values()])
    at, views = 0, {}
    for name, array in tensors.items():
        views[name] = View(flat, array.shape, tuple(s // 4 for s in np.empty(array.shape, np.float32).strides), at)
        at += array.size
    name = "transformer.h.0.attn.c_attn.weight"
    turned = np.ascontiguousarray(tensors[name].T).reshape(-1)
    views[name] = View(turned, tensors[name].shape, (1, len(tensors[name])))
    views["lm_head.weight"] = views["transformer.wte.weight"]
    assert_holds(convert(write_folder(tmp_path / "hf", views)).path, random_arrays())


# ---- nanoGPT's ckpt.pt


def write_run(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ckpt.pt").write_bytes(torch_saved(nanogpt_checkpoint(**changes)))
    return folder


@pytest.mark.parametrize("prefix", ["transformer.", "_orig_mod.transformer.", "module._orig_mod.transformer."])
def test_a_checkpoint_of_nanogpt(prefix, tmp_path):
    converted = convert(write_run(tmp_path / "out", prefix=prefix))
    assert converted.path == tmp_path / "out.npz"
    assert converted.hparams == SMALL
    assert_holds(converted.path, random_arrays())
    assert convert(tmp_path / "out" / "ckpt.pt").path == tmp_path / "out" / "ckpt.npz"
    assert_holds(tmp_path / "out" / "ckpt.npz", random_arrays())


def test_what_nanogpt_computes_otherwise_is_said(tmp_path, run):
    status, out, err = run("convert", write_run(tmp_path / "out"))
    assert status == 0
    assert "n_embd=8" in out
    assert "npgpt2: note: nanoGPT since May 2023 computes GELU by erf, and npgpt2 as GPT-2 does, by tanh" in err


def test_an_optimizer_s_numbers_are_never_read(tmp_path):
    members = torch_members(nanogpt_checkpoint())
    of_model = {f"archive/data/{number}" for number in range(len(random_arrays()))}
    needed = {name: data for name, data in members.items() if name in of_model or "/data/" not in name}
    assert len(needed) < len(members) - len(random_arrays())
    (tmp_path / "ckpt.pt").write_bytes(torch_zip(needed))
    assert_holds(convert(tmp_path / "ckpt.pt").path, random_arrays())


def nanogpt_without_biases(missing=lambda name: name.endswith("/b"), **model_args):
    checkpoint = nanogpt_checkpoint({name: a for name, a in random_arrays().items() if not missing(name)})
    checkpoint["model_args"] |= model_args
    return checkpoint


def test_a_model_without_biases_has_biases_of_zero(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(torch_saved(nanogpt_without_biases(bias=False)))
    zeros = {name: np.zeros_like(array) for name, array in random_arrays().items() if name.endswith("/b")}
    assert_holds(convert(tmp_path / "ckpt.pt").path, random_arrays() | zeros)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (nanogpt_without_biases(), r"ckpt\.pt: variable h0/ln_1/b is missing"),
        (nanogpt_without_biases(lambda name: name == "h1/ln_2/b"), r"ckpt\.pt: variable h1/ln_2/b is missing"),
        (
            nanogpt_without_biases(lambda name: name == "h1/ln_2/b", bias=False),
            "model_args: bias is False, but h0/ln_1/b",
        ),
        (nanogpt_checkpoint(model_args=None) | {"model": {}}, "has no variables of GPT-2's layers"),
        (nanogpt_checkpoint(model_args=[1]), r"model_args: is \[1\], where a dictionary is expected"),
        (
            nanogpt_without_biases(lambda name: False, n_kv_head=2),
            r"model_args: nanoGPT has no 'n_kv_head'; if this is a GPT-2",
        ),
        (
            nanogpt_without_biases(lambda name: False, n_head=3),
            r"model_args: n_embd 8 can't be divided among n_head 3 heads",
        ),
        (nanogpt_without_biases(lambda name: False, n_head=None), r"model_args: n_head is None, where a whole number"),
        (nanogpt_without_biases(lambda name: False, n_layer=3), r"holds 2 layers, but n_layer is 3"),
        (
            nanogpt_without_biases(lambda name: False, block_size=4),
            r"variable wpe has shape \(5, 8\), where \(4, 8\) is",
        ),
        (nanogpt_checkpoint(model_args={"n_layer": 2}), r"model_args: vocab_size is missing"),
    ],
)
def test_checkpoints_that_contradict_themselves_are_refused(checkpoint, message, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(torch_saved(checkpoint))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("wrapped", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("kind", ["nanoGPT's", "transformers'"])
def test_a_state_dict_alone_needs_to_be_told_its_heads(kind, wrapped, tmp_path):
    """Which way its matrices lie shows in those that aren't square."""
    tensors = nanogpt_checkpoint()["model"] if kind == "nanoGPT's" else hf_tensors()
    (tmp_path / "x.pt").write_bytes(torch_saved({wrapped: tensors, "epoch": 3} if wrapped else tensors))
    with pytest.raises(ValueError, match=r"nothing there says how many heads the model has; say it with --n-head N"):
        convert(tmp_path / "x.pt")
    converted = convert(tmp_path / "x.pt", n_head=4)
    assert converted.hparams == HParams(**{**SMALL._asdict(), "n_head": 4})
    assert bool(converted.notes) == (kind == "nanoGPT's")
    assert_holds(converted.path, random_arrays())


def test_matrices_that_lie_as_transformers_has_them_are_no_checkpoint_of_nanogpt(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(torch_saved(nanogpt_checkpoint(model=hf_tensors())))
    with pytest.raises(ValueError, match=r"variable h0/attn/c_attn/w has shape \(24, 8\), where \(8, 24\) is expected"):
        convert(tmp_path / "ckpt.pt")


def test_an_output_projection_of_its_own_is_refused(tmp_path):
    checkpoint = nanogpt_checkpoint()
    checkpoint["model"]["_orig_mod.lm_head.weight"] = random_arrays()["wte"] + 1
    (tmp_path / "ckpt.pt").write_bytes(torch_saved(checkpoint))
    with pytest.raises(ValueError, match=r"ckpt\.pt: lm_head\.weight differs from wte \(untied head\)"):
        convert(tmp_path / "ckpt.pt")
