"""Damage at random: it is reported in one line, or it changes nothing; no other exceptions, and no other numbers.

The seeds are fixed, so that a failure comes back. What has no checksum, such as a safetensors file's numbers, can't
promise the latter and is held to the former alone.
"""

import io
import json
import os
import pickletools
import shutil
import struct
import zipfile
from time import perf_counter

import numpy as np
import pytest
import writers
from builders import SMALL, VOCABULARY, arrays_of, random_arrays, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from npgpt2 import Tokenizer
from npgpt2.convert import convert
from npgpt2.convert.checkpoint import Entry, find_prefix, read_table
from npgpt2.convert.huggingface import HuggingFaceModel
from npgpt2.convert.pickles import Machine
from npgpt2.convert.pytorch import PyTorchFile
from npgpt2.convert.vocabulary import find_vocabulary, read_roles
from npgpt2.vocabulary import SpecialTokens
from npgpt2.weights import Weights
from npgpt2.weights import reader as weights
from npgpt2.weights.hparams import parse_hparams

CASES = 300  # of each kind
SECONDS = 5
FIXED = settings(derandomize=True, database=None, deadline=None, max_examples=150)


# ---- Ways to damage a file. positions: where it may happen, an array of offsets


def flip(data, rng, positions):
    """Change one to four bytes."""
    damaged = bytearray(data)
    for position in rng.choice(positions, size=rng.integers(1, 5)):
        damaged[position] ^= rng.integers(1, 256)
    return bytes(damaged)


def flip_bit(data, rng, positions):
    damaged = bytearray(data)
    damaged[rng.choice(positions)] ^= 1 << rng.integers(8)
    return bytes(damaged)


def overwrite(data, rng, positions):
    """Change a number of two, four or eight bytes to one that is small, large, or on the verge of something."""
    size = int(rng.choice([2, 4, 8]))
    bits = 8 * size
    value = int(rng.choice([0, 1, 2, 63, 64, 255])) if rng.integers(2) else 2 ** (bits - int(rng.integers(1, 9))) - 1
    position = int(rng.choice(positions))
    return data[:position] + (value % 2**bits).to_bytes(size, "little") + data[position + size :]


def cut(data, rng, positions):
    return data[: rng.integers(len(data))]


def splice(data, rng, positions):
    """Take out, double, or empty a piece of up to 100 bytes, or put one in."""
    start = int(rng.choice(positions))
    piece = data[start : start + int(rng.integers(1, 101))]
    other = [b"", piece * 2, bytes(len(piece)), piece + rng.bytes(len(piece))][rng.integers(4)]
    return data[:start] + other + data[start + len(piece) :]


DAMAGE = [flip, flip_bit, overwrite, cut, splice]


def survey(data, positions, outcome, expected, seed, ways=DAMAGE, cases=CASES):
    """Damage `data` in every way, and see what comes of it: how many cases were refused, and how many changed nothing.

    outcome: takes the damaged bytes, gives what was read from them · expected: what is there undamaged; None where
    anything may come of it that is no exception of an unexpected kind.
    """
    messages, same = [], 0
    for case in range(cases):
        rng = np.random.default_rng((seed, case))
        damaged = ways[case % len(ways)](data, rng, positions)
        start = perf_counter()
        try:
            found = outcome(damaged)
        except (ValueError, OSError) as error:
            messages.append(str(error))
        else:
            same += 1
            assert expected is None or found == expected, f"case {case}: other numbers"
        assert perf_counter() - start < SECONDS, case
    assert all(in_one_line(message) for message in messages)
    return len(messages), same


def in_one_line(message):
    return message.isprintable() and 0 < len(message) < 2000


def write_anew(path, data):
    """Write a file in the place of another: some file systems take long to write into one that is there."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def everything(loaded):
    """All that a model file holds, in a form that can be compared."""
    tensors = {name: (array.shape, array.tobytes()) for name, array in arrays_of(loaded).items()}
    return loaded.hparams, loaded.vocabulary(), tensors


# ---- TensorFlow's files


@pytest.fixture
def conversion(fixtures, tmp_path, monkeypatch):
    """A function that converts a copy of a fixture, one file of which has other contents, and reads the result."""
    monkeypatch.setattr(os, "fsync", lambda number: None)  # which would take most of the time

    def start(fixture, name):
        folder = tmp_path / fixture
        shutil.copytree(fixtures / fixture, folder)

        def outcome(contents):
            write_anew(folder / name, contents)
            output = tmp_path / "m.npz"
            output.unlink(missing_ok=True)
            try:
                convert(folder, output)
            except BaseException:
                assert {*os.listdir(tmp_path)} == {fixture}
                raise
            return everything(Weights(output))

        return (folder / name).read_bytes(), outcome

    return start


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("dtypes", "model.ckpt.index"),
        ("dtypes", "model.ckpt.data-00000-of-00001"),
        ("finetuned", "model-40.index"),
        ("finetuned", "model-40.data-00001-of-00002"),
    ],
)
def test_damaged_checkpoints(fixture, name, conversion):
    data, outcome = conversion(fixture, name)
    expected = outcome(data)
    refused, same = survey(data, np.arange(len(data)), outcome, expected, seed=1)
    # Of the index, only the last bytes of the last block are unused; of the data, Adam's slots are, in one fixture.
    assert refused > CASES / 2 or "data" in name
    assert refused + same == CASES


def test_damage_behind_correct_checksums_of_the_index(conversion):
    """As a hostile file has: contents at random, sealed anew."""
    data, outcome = conversion("dtypes", "model.ckpt.index")
    pairs = list(read_table(data))
    block = writers.block(pairs)
    assert outcome(writers.assemble([block]))

    def sealed(damaged):
        return outcome(writers.assemble([damaged]))

    refused, same = survey(block, np.arange(len(block)), sealed, None, seed=2, cases=2 * CASES)
    assert refused > same


@pytest.mark.parametrize("name", ["hparams.json", "checkpoint"])
def test_damaged_text_beside_a_checkpoint(name, conversion):
    data, outcome = conversion("dtypes", name)
    refused, _ = survey(data, np.arange(len(data)), outcome, None, seed=3, cases=60)
    assert refused > 10


# ---- Model files


def parts(data):
    """Where in a zip file its own structures lie, and the .npy headers."""
    local, npy = [], []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            start = info.header_offset
            size = 30 + sum(struct.unpack_from("<HH", data, start + 26))
            local += range(start, start + size)
            if info.filename.endswith(".npy") and info.compress_type == zipfile.ZIP_STORED:
                npy += range(start + size, start + size + 128)
    end, central = data.rindex(b"PK\5\6"), writers.central_start(data)
    return {"local": local, "npy": npy, "central": range(central, end), "end": range(end, len(data))}


@pytest.fixture(params=["npgpt2's", "npgpt2's in int8", "numpy's", "numpy's compressed"])
def model_file(request, tmp_path):
    """The bytes of a model file, and a function that reads such bytes."""
    path = tmp_path / "m.npz"
    dtype = "int8" if request.param.endswith("int8") else "float32"
    write_model(path, vocabulary=VOCABULARY, dtype=dtype)
    if request.param.startswith("numpy's"):
        savez = np.savez_compressed if request.param.endswith("compressed") else np.savez
        savez(path, **random_arrays())
        with zipfile.ZipFile(path, "a") as archive:
            for name, text in zip(
                ("hparams.json", *weights.VOCABULARY_FILES), (json.dumps(SMALL._asdict()), *VOCABULARY), strict=True
            ):
                archive.writestr(name, text)

    def outcome(contents):
        write_anew(path, contents)
        return everything(Weights(path))

    return path.read_bytes(), outcome


def test_damaged_model_files(model_file):
    data, outcome = model_file
    refused, _ = survey(data, np.arange(len(data)), outcome, outcome(data), seed=4)
    assert refused > CASES / 2


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("part", ["local", "npy", "central", "end"])
def test_damaged_structures_of_model_files(part, model_file):
    data, outcome = model_file
    positions = np.array(parts(data)[part])
    if len(positions):  # compressed .npy headers have no place of their own
        refused, _ = survey(data, positions, outcome, outcome(data), seed=5)
        assert refused > CASES / 4


def test_damaged_data_of_a_trained_model(tiny, tmp_path):
    """One of a realistic size, mapped, whose arrays are larger than what is read on opening."""
    data = tiny.read_bytes()
    path = tmp_path / "m.npz"

    def outcome(contents):
        write_anew(path, contents)
        return everything(Weights(path))

    refused, same = survey(data, np.arange(len(data)), outcome, outcome(data), seed=6)
    assert refused > 0.9 * CASES > same


# ---- Hugging Face's files


def test_damaged_safetensors_headers(tmp_path):
    folder = writers.write_hugging_face(tmp_path / "hf")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = 8 + struct.unpack_from("<Q", data)[0]

    def outcome(contents):
        write_anew(path, contents)
        model = HuggingFaceModel(folder)
        return {name: model.read(name)[1] for name in model.tensors}

    refused, _ = survey(data, np.arange(header), outcome, None, seed=7, cases=2 * CASES)
    assert refused > CASES


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt"])
def test_damaged_text_of_hugging_face(name, conversion):
    data, outcome = conversion("hf", name)
    refused, _ = survey(data, np.arange(len(data)), outcome, None, seed=8, cases=100)
    assert refused > 5


# ---- PyTorch's files


@pytest.fixture
def torch_file(tmp_path):
    """A state dict with views, and a function that reads all tensors from the bytes of a file that has one."""
    numbers = np.random.default_rng(0).standard_normal(60).astype(np.float32)
    tensors = {"a": numbers.reshape(6, 10), "b": numbers.astype(np.float16), "c": np.arange(5.0), "d": np.ones(3, bool)}
    tensors |= {"e": writers.View(numbers, (3, 4), (1, 3), 7), "f": ("bfloat16", np.arange(9, dtype=np.uint16))}
    path = tmp_path / "x.pt"

    def outcome(contents):
        write_anew(path, contents)
        found = PyTorchFile(path).state_dict()
        return {name: (tensor.shape, tensor.file.read(tensor.view).tobytes()) for name, tensor in found.items()}

    return {"model": tensors, "optimizer": {0: numbers + 1}, "epoch": 1.5}, outcome


def test_damaged_files_of_pytorch(torch_file):
    saved, outcome = torch_file
    data = writers.torch_saved(saved)
    refused, same = survey(data, np.arange(len(data)), outcome, outcome(data), seed=9, cases=2 * CASES)
    assert refused > CASES
    assert same > 0  # the optimizer's numbers, and what a zip file says about times


@pytest.mark.parametrize("part", ["local", "central", "end"])
def test_damaged_structures_of_pytorch_s_files(part, torch_file):
    saved, outcome = torch_file
    data = writers.torch_saved(saved)
    refused, _ = survey(data, np.array(parts(data)[part]), outcome, outcome(data), seed=10)
    assert refused > CASES / 4


def test_damaged_pickles_behind_correct_checksums(torch_file):
    """As a hostile file has: steps at random, sealed anew."""
    saved, outcome = torch_file
    members = writers.torch_members(saved)
    pickle = members["archive/data.pkl"]

    def sealed(damaged):
        return outcome(writers.torch_zip(members | {"archive/data.pkl": damaged}))

    refused, _ = survey(pickle, np.arange(len(pickle)), sealed, None, seed=11, cases=2 * CASES)
    assert refused > CASES


def test_damaged_older_files_of_pytorch(torch_file):
    saved, outcome = torch_file
    data = writers.torch_legacy(saved)
    numbers = len(data) - 60 * 4
    refused, _ = survey(data, np.arange(numbers), outcome, None, seed=12, cases=2 * CASES)
    assert refused > CASES / 2


# ---- Parsers, fed with anything

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


def refuses_or_not(function, *arguments):
    """Call a parser that may raise ValueError, with a message of one line, and nothing else."""
    try:
        return function(*arguments)
    except ValueError as error:
        message = str(error)
    assert in_one_line(message)
    return None


@FIXED
@given(st.binary(max_size=300))
def test_any_bytes_as_a_table(data):
    refuses_or_not(lambda: list(read_table(data)))
    refuses_or_not(lambda: list(read_table(data + writers.footer((0, 0), (0, max(0, len(data) - 5))))))


STEPS = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
NAMES = st.sampled_from(
    ["torch FloatStorage", "torch._utils _rebuild_tensor_v2", "collections OrderedDict", "os system"]
)
WORDS = (
    st.sampled_from(STEPS)
    | st.binary(max_size=3)
    | NAMES.map(lambda name: writers.pickled(writers.Name(name), stop=False))
    | (st.none() | st.booleans() | st.integers(-9, 99) | st.text(max_size=3)).map(
        lambda v: writers.pickled(v, stop=False)
    )
)


@FIXED
@given(st.binary(max_size=100) | st.lists(WORDS, max_size=40).map(b"".join))
def test_any_bytes_as_a_pickle(data):
    refuses_or_not(Machine().run, io.BytesIO(data))
    refuses_or_not(Machine().run, io.BytesIO(data + b"."))


@FIXED
@given(
    st.lists(st.binary(max_size=60), max_size=5),
    st.lists(st.tuples(st.integers(-3, 90), st.integers(-3, 90)), max_size=5),
)
def test_any_blocks_in_a_table(blocks, handles):
    blocks = [block + struct.pack("<II", 0, 1) for block in blocks]
    refuses_or_not(lambda: list(read_table(writers.assemble(blocks))))
    refuses_or_not(lambda: list(read_table(writers.assemble(blocks, handles))))


@FIXED
@given(st.binary(max_size=100))
def test_any_bytes_as_an_entry(data):
    entry = refuses_or_not(Entry.parse, data)
    assert entry is None or all(isinstance(dim, int) for dim in entry.shape)


@FIXED
@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_hparams(data):
    refuses_or_not(parse_hparams, data, "here")


@FIXED
@given(st.fixed_dictionaries({name: JSON | st.integers(1, 5) for name in SMALL._asdict()}))
def test_any_values_as_hparams(values):
    hparams = refuses_or_not(parse_hparams, json.dumps(values).encode(), "here")
    assert hparams is None or hparams._asdict() == values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    (folder / "model-1.index").touch()
    return folder


QUOTED = st.tuples(
    st.sampled_from([b'model_checkpoint_path: "', b'\n  model_checkpoint_path:"', b"model_checkpoint_path"]),
    st.binary(max_size=20) | st.text(alphabet='model-1\\"/0123\n', max_size=20).map(str.encode),
    st.sampled_from([b'"', b'model-1"', b'/model-1"\n', b'\\"', b""]),
).map(b"".join)


@FIXED
@given(state=st.binary(max_size=100) | QUOTED)
def test_any_bytes_as_a_state_file(state, folder):
    write_anew(folder / "checkpoint", state)
    try:
        found, message = find_prefix(folder), "as it should be"
    except (ValueError, FileNotFoundError) as error:
        found, message = folder / "model-1", str(error)
    assert found == folder / "model-1"
    assert in_one_line(message)


@FIXED
@given(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=50), st.binary(max_size=50))
def test_any_bytes_as_a_vocabulary(encoder, merges):
    refuses_or_not(Tokenizer, encoder, merges)


@pytest.fixture(scope="module")
def vocabulary(fixtures):
    texts = [(fixtures / "tiny" / name).read_bytes() for name in ("encoder.json", "vocab.bpe")]
    return json.loads(texts[0]), texts[1].decode().split("\n")


@FIXED
@given(
    changes=st.dictionaries(st.text(max_size=3), JSON | st.integers(0, 530), max_size=2),
    lines=st.lists(
        st.text(max_size=6) | st.lists(st.sampled_from("aehĠ"), min_size=2, max_size=2).map(" ".join), max_size=5
    ),
    at=st.integers(0, 300),
)
def test_a_vocabulary_with_changes_is_refused_or_gives_texts_back(changes, lines, at, vocabulary):
    ids, merges = vocabulary
    encoder = json.dumps(ids | changes).encode()
    bpe = "\n".join(merges[:at] + lines + merges[at:]).encode("utf-8", "surrogatepass")
    tokenizer = refuses_or_not(Tokenizer, encoder, bpe)
    if tokenizer is not None:
        for text in ("A language model, nobody's.", "café 東京 🙂\n\n  heh", "".join(changes)):
            text = text.encode("utf-8", "replace").decode()
            assert tokenizer.decode(tokenizer.encode(text)) == text


@FIXED
@given(
    JSON
    | st.fixed_dictionaries(
        {
            "model": JSON
            | st.fixed_dictionaries({"vocab": JSON | st.dictionaries(st.text(), st.integers()), "merges": JSON}),
            "pre_tokenizer": JSON | st.just({}),
            "added_tokens": JSON
            | st.lists(JSON | st.fixed_dictionaries({"id": st.integers() | JSON, "content": JSON})),
        }
    )
)
def test_any_json_as_a_tokenizer_json(tmp_path_factory, described):
    folder = tmp_path_factory.getbasetemp() / "any-tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    refuses_or_not(find_vocabulary, folder, 600)


ANY_ADDED = JSON | st.fixed_dictionaries({"content": st.text(max_size=4) | JSON}, optional={"special": JSON})
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "pad_token": ANY_ADDED,
        "eos_token": ANY_ADDED,
        "extra_special_tokens": JSON | st.lists(st.text(max_size=3)),
        "added_tokens_decoder": JSON
        | st.dictionaries(st.sampled_from(["520", "521", "5", "x"]), ANY_ADDED, max_size=3),
        "add_prefix_space": JSON,
        "tokenizer_class": st.sampled_from(["GPT2Tokenizer", "PreTrainedTokenizerFast"]) | JSON,
        "eos_token_id": JSON | st.lists(st.integers()),
    },
)


@FIXED
@given(
    st.dictionaries(
        st.sampled_from(
            ["tokenizer_config", "special_tokens_map", "added_tokens", "config", "generation_config", "vocab"]
        ),
        SETTINGS | JSON | st.dictionaries(st.text(max_size=3), st.integers(515, 525)),
        max_size=3,
    )
)
def test_any_json_beside_a_vocabulary(tmp_path_factory, fixtures, files):
    folder = tmp_path_factory.getbasetemp() / "any-settings"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(fixtures / "hf", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    for name, content in files.items():
        write_anew(folder / f"{name}.json", json.dumps(content).encode())
    refuses_or_not(read_roles, folder, 600)
    found = refuses_or_not(find_vocabulary, folder, 600)
    if found is not None:
        special = found.special
        assert SpecialTokens.parse(special.to_json(), 600, "here") == special
        tokenizer = Tokenizer(found.encoder_json, found.vocab_bpe, special=special)
        text = "".join(token.text for token in special.added) + " A language model"
        assert all(token in tokenizer for token in tokenizer.encode(text, allow_special=True))
        assert all(note.isprintable() for note in found.notes)


@FIXED
@given(JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(SpecialTokens.__dataclass_fields__, JSON)))
def test_any_json_as_special_tokens(said):
    special = refuses_or_not(SpecialTokens.parse, json.dumps(said).encode(), 11, "here")
    assert special is None or SpecialTokens.parse(special.to_json(), 11, "here") == special
