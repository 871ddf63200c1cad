"""What several test files need: the fixtures' folder, the small model that TensorFlow trained, and meters."""

import signal
import sys
import tracemalloc
from pathlib import Path

import pytest
from commands import Stdin

import npgpt2
from npgpt2.cli import main
from npgpt2.convert import convert
from npgpt2.engine import Slots

TESTS = Path(__file__).resolve().parent
# What is started in the background ignores Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def fixtures():
    """The folder of small models that other libraries wrote; see its README."""
    return TESTS / "fixtures"


@pytest.fixture(scope="session")
def tiny(fixtures, tmp_path_factory):
    """The model file made of the checkpoint that TensorFlow trained to know a passage by heart. Not to be changed."""
    output = tmp_path_factory.mktemp("models") / "tiny.npz"
    convert(fixtures / "tiny", output)
    return output


@pytest.fixture(scope="session")
def model(tiny):
    """The model in `tiny`, loaded."""
    return npgpt2.load(tiny)


@pytest.fixture
def homeless(monkeypatch):
    """A user without a home folder, who hasn't named a models folder either."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", no_home)
    monkeypatch.delenv("NPGPT2_MODELS", raising=False)


@pytest.fixture(scope="session")
def shared():
    """The folder of real vocabularies and texts, which not every checkout has beside it."""
    folder = TESTS.parent.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data in {folder}, which is not there")
    return folder


@pytest.fixture(scope="session")
def allocated_peak():
    """A function that runs another twice and says how many bytes the second run held at once.

    What a first run leaves behind, such as a map of a file or a compiled pattern, isn't counted.
    """

    def measure(work):
        work()
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return measure


@pytest.fixture
def passes(monkeypatch):
    """The numbers of tokens that each sequence of each forward pass reads."""
    lengths, read = [], Slots.read

    def note(self, matrices, tokens, spans, wanted):
        lengths.append([span.stop - span.start for span in spans])
        return read(self, matrices, tokens, spans, wanted)

    monkeypatch.setattr(Slots, "read", note)
    return lengths


@pytest.fixture
def run(tiny, capsys, monkeypatch):
    """Run a command in this process: status, standard output, standard error. `MODEL` stands for the model's path."""

    def run(*arguments, stdin=b"", terminal=False):
        monkeypatch.setattr(sys, "stdin", Stdin(stdin, terminal))
        try:
            status = main([str(tiny) if argument == "MODEL" else str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err

    return run
