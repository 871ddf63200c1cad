"""Ctrl-C at any moment of a program's life: from its first own line on, it ends with status 130 and says nothing.

The moments are told by what is being imported, or by the end of the program, and not by a clock.
"""

import os
import signal
import subprocess
import sys

import pytest

import npgpt2
from npgpt2.__main__ import main

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")

# Python runs this before the program: it interrupts the process when something is imported for the first time.
INTERRUPTING = """
import os, sys
from contextlib import suppress

class Interrupting:
    def find_spec(name, path=None, target=None):
        if name == os.environ["MOMENT"]:
            sys.meta_path.remove(Interrupting)
            {interrupt}

sys.meta_path.insert(0, Interrupting)
"""
RAISING = "os.kill(os.getpid(), 2)"
CAUGHT = "with suppress(BaseException): os.kill(os.getpid(), 2)"
LAST = "import atexit, os\natexit.register(os.kill, os.getpid(), 2)"

PROGRAMS = {
    "-m npgpt2": ["-m", "npgpt2"],
    "npgpt2": ["-c", "import sys; from npgpt2.__main__ import main; sys.exit(main())"],  # as the installed script does
}
# In the order in which they are imported; from the third on by the library, and the last when the model is opened.
MOMENTS = ["signal", "npgpt2.cli", "numpy", "numpy.linalg", "npgpt2.model", "regex", "tqdm", "zipfile"]


def interrupted(tmp_path, site, words, moment="", before=()):
    (tmp_path / "sitecustomize.py").write_text(site)
    done = subprocess.run(
        [*before, sys.executable, *words, "generate", "Once", "--length", "2"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "MOMENT": moment},
        stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def story():
    return (npgpt2.load().generate("Once", length=2) + "\n").encode()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_while_the_program_is_imported_ends_it_quietly(program, moment, tmp_path):
    site = INTERRUPTING.format(interrupt=RAISING)
    assert interrupted(tmp_path, site, PROGRAMS[program], moment) == (130, b"", b"")


@pytest.mark.parametrize("moment", ["npgpt2.cli", "numpy", "tqdm"])
def test_ctrl_c_ends_it_in_code_that_catches_every_exception(moment, tmp_path):
    site = INTERRUPTING.format(interrupt=CAUGHT)
    assert interrupted(tmp_path, site, PROGRAMS["npgpt2"], moment) == (130, b"", b"")


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_when_all_is_done_changes_nothing(program, tmp_path, story):
    assert interrupted(tmp_path, LAST, PROGRAMS[program]) == (0, story, b"")


@pytest.mark.parametrize("moment", ["numpy", "zipfile"])
def test_a_program_that_was_started_ignoring_ctrl_c_goes_on(moment, tmp_path, story):
    """As shells start what runs in the background of a script."""
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    site = INTERRUPTING.format(interrupt=RAISING)
    assert interrupted(tmp_path, site, PROGRAMS["npgpt2"], moment, before=ignoring) == (0, story, b"")


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN, print])
def test_while_a_command_runs_ctrl_c_means_what_python_makes_of_it(handler, monkeypatch):
    """So that commands clean up; or what it meant to whoever started the program."""
    found = []
    monkeypatch.setattr("npgpt2.cli.main", lambda: found.append(signal.getsignal(signal.SIGINT)) or 7)
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert main() == 7
        assert (found, signal.getsignal(signal.SIGINT)) == ([handler], signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_library_and_commands_that_are_called_leave_signals_to_the_program(run):
    def handler(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGINT, handler)
    try:
        assert run("generate", "Once", "--length", "1")[0] == 0
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    program = "import signal, npgpt2; npgpt2.load(); assert signal.getsignal(2) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", program], check=True)
