"""A model's file that changes while it is open: noticed before the next run, unless another file took its name."""

import os
import shutil
import subprocess
import sys
import time

import pytest

import npgpt2
from npgpt2 import Engine
from npgpt2.convert import convert
from npgpt2.weights import Weights

PROMPT = "A language model"
# All that runs a model, or has one run.
RUNS = {
    "generate": lambda model: model.generate(PROMPT, length=3),
    "generate of several": lambda model: model.generate([PROMPT, [1, 2]], length=3),
    "stream": lambda model: list(model.stream(PROMPT, length=3)),
    "samples": lambda model: list(model.samples(PROMPT, length=3)),
    "generate_tokens": lambda model: model.generate_tokens([1, 2], length=3),
    "score": lambda model: model.score(PROMPT),
    "logits": lambda model: model.logits([1, 2]),
    "next_logits": lambda model: model.next_logits(PROMPT),
    "next_logits of tokens": lambda model: model.next_logits([1, 2]),
    "trace": lambda model: model.trace([1, 2]),
    "submit": lambda model: Engine(model, slots=1).submit(PROMPT),
    "submit of tokens": lambda model: Engine(model, slots=1).submit([1, 2]),
}


@pytest.fixture
def path(tiny, tmp_path):
    shutil.copy(tiny, tmp_path / "model.npz")
    os.utime(tmp_path / "model.npz", (time.time() - 60,) * 2)  # so that what is written next has another time
    return tmp_path / "model.npz"


def overwrite(path):
    """As `cp` does: the same file, and as long as before, with other numbers."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    with open(path, "r+b") as file:
        file.write(data)


@pytest.mark.parametrize("run", RUNS)
def test_a_file_that_is_overwritten_is_noticed_before_the_next_run(run, path):
    model = npgpt2.load(path)
    RUNS[run](model)
    overwrite(path)
    with pytest.raises(ValueError, match=r"model\.npz: was changed while it was open; load it again$"):
        RUNS[run](model)


def test_a_file_that_is_overwritten_before_it_was_read_is_not_called_damaged(path):
    weights = Weights(path)
    with open(path, "r+b") as file:
        file.write(b"x" * path.stat().st_size)
    with pytest.raises(ValueError, match="was changed while it was open; load it again"):
        list(weights.values())


def test_it_is_noticed_wherever_the_program_is(path, tmp_path, monkeypatch):
    monkeypatch.chdir(path.parent)
    model = npgpt2.load("model.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert model.generate(PROMPT, length=3)
    overwrite(path)
    with pytest.raises(ValueError, match="was changed while it was open"):
        model.generate(PROMPT, length=3)


PROGRAM = """
import os, sys, npgpt2
model = npgpt2.load(sys.argv[1])
print(model.generate("A language model", length=3), flush=True)
os.truncate(sys.argv[1], 100_000)
try:
    model.generate("A language model", length=3)
except ValueError as error:
    print(error)
"""


def test_a_file_that_is_cut_short_ends_no_process_by_a_run_that_begins_then(path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f" plays one small\n{path}: was changed while it was open; load it again\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows doesn't let go of a file that is open")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path, new: os.replace(new, path), id="renamed over it"),
        pytest.param(lambda path, new: path.unlink(), id="removed"),
        pytest.param(lambda path, new: path.rename(path.with_name("elsewhere.npz")), id="renamed"),
        pytest.param(lambda path, new: path.chmod(0o400), id="made read-only"),
        pytest.param(lambda path, new: os.link(path, path.with_name("twin.npz")), id="linked"),
        pytest.param(lambda path, new: shutil.rmtree(path.parent), id="removed with its folder"),
    ],
)
def test_what_leaves_the_open_file_as_it_is_is_no_change(change, path, fixtures, tmp_path):
    model = npgpt2.load(path)
    expected = model.generate(PROMPT, length=3)
    change(path, convert(fixtures / "hf", tmp_path / "new.npz").path)
    assert model.generate(PROMPT, length=3) == expected


@pytest.mark.skipif(os.name == "nt", reason="Windows doesn't let go of a file that is open")
def test_what_convert_writes_over_an_open_model_doesn_t_change_it(path, fixtures):
    model = npgpt2.load(path)
    expected = model.generate(PROMPT, length=3)
    convert(fixtures / "hf", path)
    assert model.generate(PROMPT, length=3) == expected
    assert npgpt2.load(path).hparams != model.hparams
