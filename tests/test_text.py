"""Text as it comes from other programs: with a byte order mark before it, or from a command line in another locale."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import npgpt2
from npgpt2 import Tokenizer
from npgpt2.convert import convert
from npgpt2.files import PIECE, decode_utf8, parse_json_object, read_text_pieces

BOM = b"\xef\xbb\xbf"
TEXT = "A language model plays — one\n".encode()


# ---- A byte order mark is no part of the text that it stands before, and within a text it is text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (BOM, ""),
        (BOM + b"a", "a"),
        (BOM + BOM + b"a", "\ufeffa"),
        (b"a" + BOM + b"b", "a\ufeffb"),
        (b"\n" + BOM, "\n\ufeff"),
    ],
)
def test_only_the_first_mark_of_a_text_is_left_out(data, text):
    assert decode_utf8(data, "here") == text
    assert "".join(read_text_pieces(io.BytesIO(data), "here", id)) == text


class Dripping(io.BytesIO):
    """A pipe that has so many bytes at a time."""

    def __init__(self, data, size):
        super().__init__(data)
        self.size = size

    def read(self, size=-1):
        return super().read(min(size, self.size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, PIECE])
def test_a_mark_that_comes_in_parts_is_left_out(size):
    assert "".join(read_text_pieces(Dripping(BOM + "é\ufeff".encode(), size), "here", id)) == "é\ufeff"


def test_a_mark_at_the_border_of_two_pieces_is_text():
    text = "a" * PIECE + "\ufeffb"
    assert "".join(read_text_pieces(io.BytesIO(text.encode()), "here", id)) == text


@pytest.mark.parametrize("data", [BOM[:1], BOM[:2], BOM + b"a\xff", b"\xff" + BOM])
def test_what_is_no_utf8_is_refused_with_the_byte_of_the_file(data):
    at = data.find(b"\xff") if b"\xff" in data else 0
    for read in (lambda: decode_utf8(data, "here"), lambda: list(read_text_pieces(io.BytesIO(data), "here", id))):
        with pytest.raises(ValueError, match=rf"here: not UTF-8 at byte {at} \(0x"):
            read()


def test_json_may_have_a_mark():
    assert parse_json_object(BOM + b'{"a": "\xef\xbb\xbfb"}', "here") == {"a": "\ufeffb"}


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "-m", "MODEL", "--length", "4"],
        ["next", "-m", "MODEL"],
        ["encode", "-m", "MODEL"],
        ["interactive", "-m", "MODEL", "--length", "4", "--temperature", "0"],
    ],
)
def test_commands_read_standard_input_without_its_mark(run, command):
    plain, marked = run(*command, stdin=TEXT), run(*command, stdin=BOM + TEXT)
    assert plain == marked
    assert plain[0] == 0
    assert run(*command, stdin=b" " + BOM + TEXT) != plain


@pytest.mark.parametrize(
    "command", [["generate", "--length", "4"], ["next"], ["encode"], ["inspect", "-o", "OUTPUT"]], ids=lambda c: c[0]
)
def test_commands_read_a_file_without_its_mark(run, command, tmp_path):
    results = []
    for number, data in enumerate((TEXT, BOM + TEXT)):
        file, output = tmp_path / "text.txt", tmp_path / f"{number}.html"
        file.write_bytes(data)
        words = [output if word == "OUTPUT" else word for word in command]
        status, out, err = run(*words, "-m", "MODEL", "--file", file)
        results.append((status, out.replace(str(output), ""), err, output.exists() and output.read_bytes()))
    assert results[0] == results[1]
    assert results[0][0] == 0


def test_score_reads_files_and_standard_input_without_their_mark(run, fixtures, tmp_path):
    data = (fixtures / "passage.txt").read_bytes()
    results = []
    for text in (data, BOM + data):
        (tmp_path / "text.txt").write_bytes(text)
        results += [run("score", name, "-m", "MODEL", "--json", stdin=text) for name in (tmp_path / "text.txt", "-")]
    scores = [{key: value for key, value in json.loads(out).items() if key != "file"} for _, out, _ in results]
    assert all(score == scores[0] for score in scores)
    assert scores[0]["bytes"] == len(data)


def test_decode_reads_ids_without_their_mark(run, model):
    ids = " ".join(map(str, model.tokenizer.encode("A language model"))).encode()
    assert run("decode", "-m", "MODEL", stdin=BOM + ids) == (0, "A language model\n", "")


def test_a_training_set_has_no_marks(run, model, tmp_path):
    (tmp_path / "one.txt").write_bytes(BOM + b"It has no eyes")
    (tmp_path / "two.txt").write_bytes(BOM + b"and\r\n\xef\xbb\xbf no ears")
    assert run("encode", tmp_path / "one.txt", tmp_path / "two.txt", "-o", tmp_path / "t.npz", "-m", "MODEL")[0] == 0
    with np.load(tmp_path / "t.npz") as archive:
        found = model.tokenizer.decode(archive["arr_0"])
    assert found == "It has no eyes<|endoftext|>and\n\ufeff no ears<|endoftext|>"


def test_a_mark_in_an_argument_is_text(run, model):
    ids = run("encode", "\ufeffA", "-m", "MODEL")[1]
    assert model.tokenizer.decode(map(int, ids.split())) == "\ufeffA"


TEXTS = ("*.json", "*.bpe", "*.txt", "checkpoint")


@pytest.mark.parametrize("fixture", ["tiny", "hf", "hf-sharded"])
def test_models_are_converted_whose_text_files_have_marks(fixture, fixtures, tmp_path):
    shutil.copytree(fixtures / fixture, tmp_path / "model")
    for path in [path for pattern in TEXTS for path in (tmp_path / "model").glob(pattern)]:
        path.write_bytes(BOM + path.read_bytes())
    marked = npgpt2.load(convert(tmp_path / "model", tmp_path / "marked.npz").path)
    plain = npgpt2.load(convert(fixtures / fixture, tmp_path / "plain.npz").path)
    assert marked.hparams == plain.hparams
    np.testing.assert_array_equal(marked.logits([1, 2, 3]), plain.logits([1, 2, 3]))
    if fixture != "hf-sharded":  # which has none
        assert marked.tokenizer.encode("A language model") == plain.tokenizer.encode("A language model")


def test_a_tokenizer_json_may_have_a_mark(fixtures, tmp_path):
    vocab, merges = ((fixtures / "hf" / name).read_text("utf-8") for name in ("vocab.json", "merges.txt"))
    described = {
        "model": {"type": "BPE", "vocab": json.loads(vocab), "merges": merges.splitlines()[1:]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    }
    for name in ("config.json", "model.safetensors"):
        shutil.copy(fixtures / "hf" / name, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(BOM + json.dumps(described).encode())
    tokenizer = npgpt2.load(convert(tmp_path, tmp_path / "m.npz").path).tokenizer
    assert tokenizer.encode("A language") == Tokenizer.load(fixtures / "hf").encode("A language")


# ---- Arguments are UTF-8 whatever the locale


def in_the_c_locale(*arguments, **options):
    """Run a command where Python takes arguments, and names of files, for ASCII."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment.pop("PYTHONIOENCODING", None)
    words = [os.fsencode(word) for word in arguments]
    done = subprocess.run(
        [os.fsencode(sys.executable), b"-m", b"npgpt2", *words],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False, **options,
    )  # fmt: skip
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


posix = pytest.mark.skipif(os.name == "nt", reason="Windows gives arguments as Unicode")


@posix
def test_arguments_are_utf8_in_every_locale(tiny, model):
    for text in ("Il était — 東京", "plain"):
        ids = " ".join(map(str, model.tokenizer.encode(text)))
        assert in_the_c_locale("encode", text, "-m", str(tiny)) == (0, ids + "\n", "")
        story = model.generate(text, length=3)
        assert in_the_c_locale("generate", text, "-m", str(tiny), "--length", "3") == (0, story + "\n", "")


@posix
def test_what_ends_a_text_is_utf8_in_every_locale(model, tiny):
    for seed in range(1000):
        text = model.generate("A", length=30, temperature=9, seed=seed, ignore_eot=True)
        if found := re.search("[^\0-\x7f\ufffd]", text):
            break
    options = ["--length", "30", "--temperature", "9", "--seed", str(seed), "--ignore-eot", "--stop", found[0]]
    expected = (0, text[: found.start()] + "\n", "")
    assert in_the_c_locale("generate", "A", "-m", str(tiny), *options) == expected


@posix
def test_names_of_files_are_found_and_shown_in_every_locale(tiny, tmp_path):
    (tmp_path / "été.txt").write_text("A language model", "utf-8")
    shutil.copy(tiny, tmp_path / "modèle.npz")
    status, out, err = in_the_c_locale("score", "été.txt", "-m", "modèle.npz", cwd=tmp_path)
    assert (status, out.splitlines()[1].split()[0], err) == (0, "été.txt", "")
    assert in_the_c_locale("encode", "été.txt", "-o", "é.npz", "-m", "modèle.npz", cwd=tmp_path)[0] == 0
    assert "é.npz" in os.listdir(tmp_path)
    assert in_the_c_locale("info", "ö.npz", cwd=tmp_path)[2].startswith("npgpt2: ö.npz: no such file")


@posix
def test_arguments_that_are_not_utf8_are_refused_by_name(tiny):
    for locale in ({"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONUTF8": "1"}):
        for words in ([b"caf\xe9"], [b"cafe", b"--stop", b"caf\xe9"]):
            done = subprocess.run(
                [sys.executable, "-m", "npgpt2", "generate", *words, "-m", tiny],
                env={**os.environ, **locale}, capture_output=True, timeout=60, check=False,
            )  # fmt: skip
            expected = b"npgpt2: the argument 'caf\\udce9' is not UTF-8\n"
            assert (done.returncode, done.stdout, done.stderr) == (1, b"", expected)
