"""TensorFlow's checkpoints: what TensorFlow wrote is read exactly, and what nobody should have written is refused.

The fixtures come from TensorFlow; tables that it would not write, though they are valid, and hostile ones come from
the writer in writers.py.
"""

import json
import os
import struct
from time import perf_counter

import numpy as np
import pytest
import writers
from writers import assemble, block, entry, field, header, sealed, table, varint

from npgpt2.convert.checkpoint import (
    INDEX_LIMIT,
    KEY_LIMIT,
    KEYS_LIMIT,
    RANK_LIMIT,
    Checkpoint,
    find_prefix,
    read_table,
)
from npgpt2.convert.conversion import widen


def write_index(folder, contents):
    (folder / "m.index").write_bytes(contents)
    return folder / "m"


def pairs_of(contents):
    return list(read_table(contents))


def read_all(prefix):
    checkpoint = Checkpoint(prefix)
    return {name: widen(*checkpoint.read(name)).reshape(e.shape) for name, e in checkpoint.entries.items()}


@pytest.fixture
def small(tmp_path):
    """A checkpoint of one variable of six numbers, whose index the tests write anew."""
    numbers = np.arange(6, dtype=np.float32)
    writers.write_checkpoint(tmp_path / "m", {"v": numbers.reshape(2, 3)})
    whole = {"shape": (2, 3), "size": 24, "crc": writers.crc32c(numbers.tobytes())}

    def with_entry(shards=1, **changes):
        write_index(tmp_path, table([(b"", header(shards)), (b"v", entry(**(whole | changes)))]))
        return Checkpoint(tmp_path / "m")

    return with_entry


# ---- What TensorFlow wrote


@pytest.mark.parametrize("fixture", ["dtypes", "sliced"])
def test_values_equal_those_that_tensorflow_reads(fixture, fixtures):
    checkpoint = Checkpoint(find_prefix(fixtures / fixture))
    with np.load(fixtures / fixture / "values.npz") as values:
        compared = 0
        for name in values.files:
            if not checkpoint.entries[name].sliced:
                array = widen(*checkpoint.read(name)).reshape(checkpoint.entries[name].shape)
                np.testing.assert_array_equal(array, values[name])
                compared += 1
    assert compared >= 1


def test_the_types_of_the_dtypes_fixture(fixtures):
    checkpoint = Checkpoint(fixtures / "dtypes" / "model.ckpt")
    types = {checkpoint.read(name)[1] for name in checkpoint.entries if name.startswith("model/")}
    assert types == {"float32", "float64", "float16", "bfloat16"}
    for name in ("counts", "notes"):
        with pytest.raises(ValueError, match=f"model.ckpt.index: variable {name} has TensorFlow's type number"):
            checkpoint.read(name)


def test_a_variable_in_slices_is_marked_so(fixtures):
    entries = Checkpoint(fixtures / "sliced" / "model.ckpt").entries
    assert [name for name, e in entries.items() if e.sliced] == ["model/wte"]
    assert not entries["model/wpe"].sliced
    assert len([name for name in entries if "model/wte" in name]) == 4  # the whole, and its three slices


def test_all_entries_of_a_checkpoint_with_an_optimizer(fixtures):
    entries = Checkpoint(fixtures / "finetuned" / "model-40").entries
    assert {e.shard for e in entries.values()} == {0, 1}
    assert "model/h0/attn/c_attn/w/Adam_1" in entries


# ---- Tables that TensorFlow could have written


@pytest.mark.parametrize("per_block", [1, 2, 7, 1000])
@pytest.mark.parametrize("interval", [1, 2, 16, 1000])
def test_many_blocks_and_shared_prefixes(per_block, interval):
    pairs = [(f"h{a}/attn/{b:03}".encode(), bytes([a, b])) for a in range(5) for b in range(30)]
    pairs = sorted([(b"", b"header"), (b"h", b""), *pairs])
    assert pairs_of(table(pairs, per_block, interval)) == pairs


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_variables_in_several_shards_and_blocks(shards, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"v{n}": rng.standard_normal((n, 3)).astype(np.float32) for n in range(1, 12)}
    arrays |= {"scalar": np.array(4.5), "half": np.float16([1, -2]), "empty": np.zeros((0, 4), np.float32)}
    arrays["brain"] = ("bfloat16", np.array([0x3F80, 0xC000, 0x7F80], np.uint16))
    writers.write_checkpoint(tmp_path / "m", arrays, shards, per_block=3)
    read = read_all(tmp_path / "m")
    assert set(read) == set(arrays)
    np.testing.assert_array_equal(read.pop("brain"), [1, -2, np.inf])
    for name, array in read.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, arrays[name])


def test_a_table_without_variables_is_read(tmp_path):
    assert Checkpoint(write_index(tmp_path, table([(b"", header())]))).entries == {}


def test_fields_that_are_not_known_are_passed_over(tmp_path):
    unknown = field(9, 1) + field(10, b"text") + field(11, (7,)) + varint(12 << 3 | 1) + bytes(8)
    contents = table([(b"", header() + unknown), (b"v", entry(shape=(2,), size=8) + unknown)])
    parsed = Checkpoint(write_index(tmp_path, contents)).entries["v"]
    assert (parsed.dtype, parsed.shape, parsed.size) == (1, (2,), 8)


# ---- Tables that are damaged or hostile


def test_a_block_listed_a_thousand_times_is_refused():
    contents = block([(b"a" * 100, b"b" * 1000)])
    with pytest.raises(ValueError, match="blocks that overlap"):
        pairs_of(assemble([contents], handles=[(0, len(contents))] * 1000))


def test_overlapping_blocks_are_refused():
    inner = sealed(block([(b"b", b"")]))
    outer = block([(b"a", inner)])
    at = outer.index(inner)
    assert pairs_of(assemble([outer], handles=[(at, len(inner) - 5)])) == [(b"b", b"")]
    with pytest.raises(ValueError, match="blocks that overlap"):
        pairs_of(assemble([outer], handles=[(0, len(outer)), (at, len(inner) - 5)]))


def test_blocks_in_another_order_are_refused():
    first, second = block([(b"b", b"")]), block([(b"a", b"")])
    handles = [(len(first) + 5, len(second)), (0, len(first))]
    with pytest.raises(ValueError, match="blocks that overlap"):
        pairs_of(assemble([first, second], handles))


@pytest.mark.parametrize("keys", ["ba", "aa", "acb"])
@pytest.mark.parametrize("per_block", [1, 10])
def test_keys_out_of_order_are_refused(keys, per_block):
    with pytest.raises(ValueError, match="keys are out of order"):
        pairs_of(table([(key.encode(), b"") for key in keys], per_block))


def key_bomb(value):
    """A block of keys of the greatest length, of which each takes a few bytes: gigabytes, if they were all kept."""
    stem = b"k" * (KEY_LIMIT - 4)
    first = varint(0) + varint(KEY_LIMIT) + varint(len(value)) + stem + bytes(4) + value
    others = [
        varint(len(stem)) + varint(4) + varint(len(value)) + struct.pack(">I", n) + value for n in range(1, 100_000)
    ]
    return first + b"".join(others) + struct.pack("<II", 0, 1)


def test_a_key_bomb_is_refused(allocated_peak):
    contents = assemble([key_bomb(b"")])
    assert len(contents) < INDEX_LIMIT

    def read():
        with pytest.raises(ValueError, match=f"keys take more than {KEYS_LIMIT:,} bytes"):
            pairs_of(contents)

    assert allocated_peak(read) < 4 * KEYS_LIMIT


def test_the_longest_keys_in_the_index_s_own_index_take_no_time():
    stem, empty = b"k" * (KEY_LIMIT - 4), sealed(bytes(4))
    index, count = bytearray(), 50_000
    for n in range(count):
        shared, handle = len(stem) if n else 0, varint(n * len(empty)) + varint(4)
        unshared = (stem + struct.pack(">I", n))[shared:]
        index += varint(shared) + varint(len(unshared)) + varint(len(handle)) + unshared + handle
    index += struct.pack("<II", 0, 1)
    contents = empty * count + sealed(bytes(index))
    start = perf_counter()
    assert pairs_of(contents + writers.footer((0, 4), (count * len(empty), len(index)))) == []
    assert perf_counter() - start < 5


def test_keys_at_the_limit_are_read_and_beyond_it_refused():
    assert pairs_of(table([(b"k" * KEY_LIMIT, b"v")])) == [(b"k" * KEY_LIMIT, b"v")]
    with pytest.raises(ValueError, match="key that can't be right"):
        pairs_of(table([(b"k" * (KEY_LIMIT + 1), b"v")]))


def raw_block(contents):
    return assemble([contents + struct.pack("<II", 0, 1)])


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"\x05\x01\x00a", "key that can't be right"),  # shares five bytes with no key
        (b"\x00\x01\x7fa", "ends too early"),  # a value longer than the block
        (b"\x00\x7f\x00a", "ends too early"),  # a key longer than the block
        (b"\x00\x01", "ends too early"),
        (b"\xff" * 9, "ends too early"),
        (b"\xff" * 11, "integer of more than 64 bits"),
        (varint(0) + varint(1) + varint(-1) + b"a", "ends too early"),
        (varint(-1) + varint(1) + varint(0) + b"a", "key that can't be right"),
        (varint(0) + varint(-1) + varint(0) + b"a", "key that can't be right"),
    ],
)
def test_broken_entries_are_refused(contents, message):
    with pytest.raises(ValueError, match=message):
        pairs_of(raw_block(contents))


@pytest.mark.parametrize("contents", [b"", b"abc", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00", bytes(4) + b"\2\0\0\0"])
def test_a_block_without_room_for_its_restart_points_is_refused(contents):
    with pytest.raises(ValueError, match="without restart points"):
        pairs_of(assemble([contents]))


@pytest.mark.parametrize("handle", [(10**9, 10), (0, 10**9), (2**64 - 1, 2**64 - 1), (0, -1), (-1, 5)])
def test_block_handles_outside_of_the_file_are_refused(handle):
    contents = assemble([block([(b"a", b"")])], handles=[handle])
    with pytest.raises(ValueError, match=r"block at byte \d+ lies outside of the file"):
        pairs_of(contents)
    footer = writers.footer((0, 0), handle)
    with pytest.raises(ValueError, match=r"block at byte \d+ lies outside of the file"):
        pairs_of(contents[:-48] + footer)


def test_a_compressed_block_is_named():
    with pytest.raises(ValueError, match=r"block at byte 0 is compressed \(snappy\); save the checkpoint again"):
        pairs_of(assemble([block([(b"a", b"")])], compression=1))
    with pytest.raises(ValueError, match=r"compressed \(method 7\)"):
        pairs_of(assemble([block([(b"a", b"")])], compression=7))


def test_a_wrong_checksum_of_a_block_is_named():
    contents = bytearray(table([(b"a", b"1"), (b"b", b"2")], per_block=1))
    contents[contents.index(b"2")] ^= 1
    with pytest.raises(ValueError, match=r"block at byte \d+ is damaged \(its checksum is wrong\)"):
        pairs_of(bytes(contents))


@pytest.mark.parametrize("contents", [b"", b"x", b"<!DOCTYPE html>" * 10, bytes(48), bytes(1000)])
def test_what_is_no_table_is_refused(contents, tmp_path):
    with pytest.raises(ValueError, match=r"m\.index: it is not a TensorFlow checkpoint's index, or was cut short"):
        Checkpoint(write_index(tmp_path, contents))


def test_an_index_that_is_too_large_is_refused_before_it_is_read(tmp_path, allocated_peak):
    with open(tmp_path / "m.index", "wb") as file:
        file.truncate(INDEX_LIMIT * 100)

    def read():
        with pytest.raises(ValueError, match=f"larger than the {INDEX_LIMIT:,} bytes"):
            Checkpoint(tmp_path / "m")

    assert allocated_peak(read) < 2 * INDEX_LIMIT


def test_a_missing_index_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"m\.index"):
        Checkpoint(tmp_path / "m")


# ---- Entries that are damaged or hostile


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(b"v", entry())], "it has no header"),
        ([(b"", b"")], "it has no header"),
        ([(b"", header(shards=0))], "it has no header"),
        ([(b"", header(endianness=1))], "written on a big-endian machine, which is not supported"),
        ([(b"", field(1, b"1"))], "text where a number is expected"),
        ([(b"", header()), (b"v", field(1, b"x"))], "text where a number is expected"),
        ([(b"", header()), (b"v", field(2, 1))], "number where a message is expected"),
        ([(b"", header()), (b"v", field(2, field(2, 1)))], "number where a message is expected"),
        ([(b"", header()), (b"v", field(2, field(2, field(1, b"x"))))], "text where a number is expected"),
        ([(b"", header()), (b"v", field(6, b"crcs"))], "text where a number is expected"),
        ([(b"", header()), (b"v", b"\x0b")], "field of unknown wire type 3"),
        ([(b"", header()), (b"v", b"\x0d\x01")], "ends too early"),
        ([(b"", header()), (b"v", b"\x12\x7f")], "ends too early"),
        ([(b"", header()), (b"v", b"\x08" + b"\xff" * 10)], "integer of more than 64 bits"),
        ([(b"", header()), (b"v", entry(shape=(1,) * 300))], "variable of 300 dimensions"),
    ],
)
def test_broken_descriptions_are_refused(pairs, message, tmp_path):
    with pytest.raises(ValueError, match=rf"m\.index: .*{message}"):
        Checkpoint(write_index(tmp_path, table(pairs)))


def test_as_many_dimensions_as_tensorflow_can_have(tmp_path):
    pairs = [(b"", header()), (b"v", entry(shape=(1,) * RANK_LIMIT))]
    assert Checkpoint(write_index(tmp_path, table(pairs))).entries["v"].shape == (1,) * RANK_LIMIT


def test_an_honest_entry_is_read(small):
    assert small().read("v")[0].view("<f4").tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 20}, r"m\.index: variable v of shape \(2, 3\) has 20 bytes"),
        ({"size": -24}, r"variable v of shape \(2, 3\) has \d+ bytes"),
        ({"shape": (2, 4)}, r"variable v of shape \(2, 4\) has 24 bytes"),
        ({"shape": (-2, -3)}, "variable v of shape"),
        ({"shape": (2**62, 2**62)}, "variable v of shape"),
        ({"shape": (2**64 - 1,) * 254}, "variable v of shape"),
        ({"shape": ()}, r"variable v of shape \(\) has 24 bytes"),
        ({"dtype": 3}, "variable v has TensorFlow's type number 3, not a float"),
        ({"dtype": 0}, "type number 0"),
        ({"dtype": 2}, "has 24 bytes"),
        ({"dtype": -1}, "type number"),
        ({"offset": 1}, r"m\.data-00000-of-00001: 24 bytes, cut short before the end of variable v"),
        ({"offset": -24}, "cut short before the end of variable v"),
        ({"offset": 2**63 - 1}, "cut short before the end of variable v"),
        ({"shape": (2**40,), "size": 2**42}, "cut short before the end of variable v"),
        ({"crc": 1}, r"m\.data-00000-of-00001: variable v is damaged \(its checksum is wrong\)"),
        ({"shard": 1}, "variable v lies in part 1 of 1"),
        ({"shard": -1}, "variable v lies in part 18446744073709551615 of 1"),
    ],
)
def test_entries_that_do_not_fit_the_data_are_refused(small, changes, message):
    checkpoint = small(**changes)
    with pytest.raises(ValueError, match=message):
        checkpoint.read("v")


def test_a_missing_shard_is_named(small):
    with pytest.raises(FileNotFoundError, match=r"m\.data-00000-of-00002"):
        small(shards=2).read("v")


def test_a_shard_cut_off_while_it_is_read_is_named(small, monkeypatch):
    checkpoint = small()
    monkeypatch.setattr(np, "fromfile", lambda file, dtype, count: np.zeros(count - 1, dtype))
    with pytest.raises(ValueError, match="variable v is damaged"):
        checkpoint.read("v")


def test_names_that_are_not_utf_8_do_no_harm(tmp_path):
    contents = table([(b"", header()), (b"a\xff\n", entry())])
    assert list(Checkpoint(write_index(tmp_path, contents)).entries) == ["a\\xff\n"]


# ---- Which checkpoint a path means


@pytest.fixture
def folder(tmp_path):
    """A folder with the indexes of two checkpoints and a function that writes its state file."""

    def write(state, names=("model-20", "model-40")):
        for name in names:
            (tmp_path / f"{name}.index").touch()
        if state is not None:
            (tmp_path / "checkpoint").write_bytes(state if isinstance(state, bytes) else state.encode())
        return tmp_path

    return write


@pytest.mark.parametrize(
    "path",
    [
        '"model-40"',
        '"/home/else/run1/model-40"',
        r'"C:\\Users\\else\\run1\\model-40"',
        '"C:/Users/else/run1/model-40"',
        '"./model-40"',
        r'"/home/\303\251l\303\250ve/model-40"',
        r'"/home/\"quoted\"/\'single\'/model-40"',
        r'"m\157del\05540"',
    ],
)
def test_the_state_file_names_the_latest(path, folder):
    state = f'model_checkpoint_path: {path}\nall_model_checkpoint_paths: "model-20"\n'
    assert find_prefix(folder(state)) == folder(None) / "model-40"
    assert find_prefix(folder(state.replace("\n", "\r\n").replace(": ", ":"))) == folder(None) / "model-40"
    assert find_prefix(folder(f'all_model_checkpoint_paths: "model-20"\n  {state}')) == folder(None) / "model-40"


@pytest.mark.parametrize("name", ["modèle 東京", 'a"b', "a'b", "model.ckpt-1.index.2", "tab\tbed"])
def test_names_that_have_to_be_escaped(name, folder):
    if os.name == "nt" and set(name) & {'"', "\t"}:
        pytest.skip("Windows has no such names")
    escaped = "".join(f"\\{byte:03o}" if byte > 126 or chr(byte) in "\t\"'" else chr(byte) for byte in name.encode())
    source = folder(f'model_checkpoint_path: "{escaped}"', names=[name, "other"])
    assert find_prefix(source) == source / name


@pytest.mark.parametrize(
    "state",
    [
        "",
        "model_checkpoint_path",
        "model_checkpoint_path: model-40",
        'model_checkpoint_path: "model-40',
        'model_checkpoint_path: "model-\n40"',
        'all_model_checkpoint_paths: "model-40"',
        'x model_checkpoint_path: "model-40"',
        b"\xff\xfe\x00",
    ],
)
def test_a_state_file_that_names_none_is_refused(state, folder):
    with pytest.raises(ValueError, match="checkpoint: has no model_checkpoint_path; give the checkpoint's own path"):
        find_prefix(folder(state))


@pytest.mark.parametrize("name", ["model-60", "", "..", "../x", "/", r"\377", r"\000", "model-40.index", "MODEL-40"])
def test_a_state_file_that_names_what_is_not_there_is_refused(name, folder):
    with pytest.raises(FileNotFoundError, match=r"holds no '.*\.index', though .*checkpoint names it") as caught:
        find_prefix(folder(f'model_checkpoint_path: "{name}"'))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "state",
    [b"\n" * 2**20, b" " * 2**20, b"\t\n" * 2**19, b'model_checkpoint_path: "' + b"\\a" * 2**18, b"\0" * (2**20 + 1)],
    ids=["newlines", "spaces", "both", "escapes", "too long"],
)
def test_a_hostile_state_file_takes_no_time(state, folder):
    start = perf_counter()
    with pytest.raises(ValueError, match=r"no model_checkpoint_path|larger than"):
        find_prefix(folder(state))
    assert perf_counter() - start < 5


def test_without_a_state_file_the_only_checkpoint_is_meant(folder):
    source = folder(None, names=["model-7"])
    assert find_prefix(source) == source / "model-7"
    (source / "model-8.index").touch()
    with pytest.raises(ValueError, match="holds model-7, model-8, and no file `checkpoint` to tell which"):
        find_prefix(source)


def test_a_folder_without_a_checkpoint(tmp_path):
    (tmp_path / "model.data-00000-of-00001").touch()
    assert find_prefix(tmp_path) is None


@pytest.mark.parametrize("suffix", ["", ".index", ".meta", ".data-00000-of-00001", ".data-00007-of-00010"])
def test_a_prefix_or_one_of_its_files_given_directly(suffix, folder):
    source = folder('model_checkpoint_path: "model-20"')
    assert find_prefix(source / f"model-40{suffix}") == source / "model-40"


@pytest.mark.parametrize("name", ["model-60", "model-60.index", ".index", "checkpoint", "model-40.data-0-of-1"])
def test_a_path_that_means_no_checkpoint(name, folder):
    assert find_prefix(folder('model_checkpoint_path: "model-20"') / name) is None


def test_hparams_beside_the_fixture_are_what_tensorflow_s_shapes_say(fixtures):
    hparams = json.loads((fixtures / "tiny" / "hparams.json").read_text())
    shape = Checkpoint(fixtures / "tiny" / "model.ckpt").entries["model/wte"].shape
    assert shape == (hparams["n_vocab"], hparams["n_embd"])
