"""Reading within bounds, and writing whole files or none."""

import errno
import multiprocessing
import os
import stat
import subprocess
import sys
import time

import pytest

from npgpt2 import files
from npgpt2.files import decode_utf8, parse_json_object, read_bounded, replacing


def write(path, data):
    with replacing(path) as file:
        file.write(data)


def test_a_file_appears_with_its_last_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert len(os.listdir(tmp_path)) == 2
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "a.txt") as first, replacing(tmp_path / "a.txt") as second:
        first.write(b"first" * 1000)
        second.write(b"second")
    assert (tmp_path / "a.txt").read_bytes() == b"first" * 1000
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_is_raised_goes_through_and_leaves_nothing(tmp_path):
    def halves():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as file:
        file.writelines(halves())
    assert os.listdir(tmp_path) == []


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a.txt"):
        open(tmp_path / "b.txt").close()
    assert caught.value.filename == str(tmp_path / "b.txt")


@pytest.mark.skipif(os.name == "nt", reason="Windows allows it")
def test_a_file_that_cannot_take_its_name_is_removed(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied", source, None, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError) as caught:
        write(tmp_path / "a.txt", b"x")
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert os.listdir(tmp_path) == []


def test_files_up_to_the_limit_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bounded(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="a: larger than the 4 bytes that such a file can have"):
        read_bounded(tmp_path / "a", 4)


def test_json_objects():
    assert parse_json_object(b'{"a": [1, "\xc3\xa9"]}', "x") == {"a": [1, "é"]}


@pytest.mark.parametrize("data", [b"", b"[1", b"\xff{}", b"{'a': 1}", b"[" * 10**5, b'{"a": ' * 10**5, b"9" * 5000])
def test_what_is_no_json(data):
    with pytest.raises(ValueError, match="here: not valid JSON") as caught:
        parse_json_object(data, "here")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("data", "kind"), [(b"[]", "list"), (b"1", "int"), (b'"a"', "str"), (b"null", "NoneType")])
def test_what_is_no_object(data, kind):
    with pytest.raises(ValueError, match=f"here: holds a JSON {kind}, where an object is expected"):
        parse_json_object(data, "here")


@pytest.mark.parametrize("value", [b"[]", b"{}", b'{"":0}', b"1e9", b'"\xe6\x9d\xb1"', b"999"])
def test_json_takes_no_more_memory_than_its_number_of_values_says(value, allocated_peak):
    """Ten thousand of each, with room for a list that grows, and for the text itself."""
    data = b'{"a": [' + b",".join([value] * 10_000) + b"]}"
    signs = sum(data.count(sign) for sign in b",:[{")

    assert allocated_peak(lambda: parse_json_object(data, "here", signs)) < 90 * signs + 4 * len(data)
    with pytest.raises(ValueError, match=f"^here: has more values than the {signs - 1:,} that such a file can have$"):
        parse_json_object(data, "here", signs - 1)


def test_json_with_too_many_values_is_refused_before_it_takes_memory(allocated_peak):
    data = b'{"a": [' + b"[]," * 10**6 + b"1]}"

    def refused():
        with pytest.raises(ValueError, match=r"^here: has more values than the 262,144"):
            parse_json_object(data, "here")

    assert allocated_peak(refused) < 100_000


def test_utf_8():
    assert decode_utf8("é東".encode(), "here") == "é東"
    with pytest.raises(ValueError, match=r"here: not UTF-8 at byte 2 \(0xff\)"):
        decode_utf8(b"\xc3\xa9\xff", "here")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_or_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="is a device or a pipe"), replacing(tmp_path / "pipe"):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_what_a_link_points_to_is_replaced_and_not_the_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    with replacing(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path / "folder") == ["file"]


# ---- What writers leave behind that are killed

WRITER = """
import sys, time
from npgpt2.files import *
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer():
    """writer(path): a process that is in the middle of writing a file."""
    started = []

    def start(path):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_dead_writers_left_is_cleared_and_what_others_write_is_not(writer, tmp_path):
    path, other = tmp_path / "a[1].npz", tmp_path / "b.npz"
    for process in [writer(path) for _ in range(3)] + [writer(other)]:
        process.kill()
        process.wait()
    alive = writer(path)
    assert len(os.listdir(tmp_path)) == 2  # what the dead left of the other file, and what lives
    write(path, b"new")
    left = sorted(name.split(".")[1] for name in os.listdir(tmp_path) if name.endswith(".tmp"))
    assert left == ["a[1]", "b"]
    alive.kill()
    alive.wait()
    write(path, b"newer")
    write(other, b"other")
    assert sorted(os.listdir(tmp_path)) == ["a[1].npz", "b.npz"]
    assert path.read_bytes() == b"newer"


def test_what_only_looks_like_it_was_left_behind_stays(tmp_path):
    names = [".a.tmp", ".a.0123456.tmp", ".a.0123456g.tmp", "a.01234567.tmp", ".aa.01234567.tmp", ".b.01234567.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".a.01234567.tmp").mkdir()
    write(tmp_path / "a", b"new")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", ".a.01234567.tmp", *names])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_by_such_a_name_holds_nobody_up(tmp_path):
    os.mkfifo(tmp_path / ".a.01234567.tmp")
    write(tmp_path / "a", b"new")
    assert sorted(os.listdir(tmp_path)) == [".a.01234567.tmp", "a"]


def write_often(path, number):
    for i in range(200):
        write(path, b"%d %d" % (number, i))


def test_writers_that_clear_at_once_do_not_take_each_others_files(tmp_path):
    """Each looks for what was left behind while others have just made their files, or are about to rename them."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=write_often, args=(tmp_path / "a", number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert os.listdir(tmp_path) == ["a"]


def test_without_locks_what_was_just_written_stays(tmp_path, monkeypatch):
    """As on Windows, where files that are open can't be removed."""
    monkeypatch.setattr(files, "HAS_LOCKS", False)
    for name, age in ((".a.00000000.tmp", 30), (".a.11111111.tmp", 90)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write(tmp_path / "a", b"new")
    assert sorted(os.listdir(tmp_path)) == [".a.00000000.tmp", "a"]


def test_a_disk_without_locks_is_written_to_and_not_cleared(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / ".a.00000000.tmp").write_bytes(b"x")
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    write(tmp_path / "a", b"new")
    assert sorted(os.listdir(tmp_path)) == [".a.00000000.tmp", "a"]
