"""Lint and tests on every Python that npgpt2 supports and this machine has: `make pythons`, which .ci/run does too.

The Python that runs nox is passed over, as `make lint test` does the same with it; but the oldest passes the tests in
any case, with the oldest NumPy. The others have the newest that there is for them. One passes the tests with OpenBLAS's
kernels for processors of AVX2 alone, whatever this one is, since npgpt2 multiplies in other ways with those.
"""

import os
import subprocess
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# setup.cfg asks for 1.26, and a Python that is newer than that for the oldest that has a build for it.
OLDEST_NUMPY = {"3.13": "2.1.0"}
AVX2_PYTHON = "3.12"

nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"
nox.options.envdir = str(ROOT / ".nox")

# pyenv puts a command of every Python's name on PATH, which only runs where that version was selected.
PYENV = Path(os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv"))
os.environ["PATH"] = os.pathsep.join([*map(str, sorted(PYENV.glob("versions/3.*/bin"))), os.environ["PATH"]])


def runs(version: str) -> bool:
    try:
        return subprocess.run([f"python{version}", "-c", ""], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


OLDEST = next(filter(runs, PYTHONS), None)
RUNNING = "{}.{}".format(*sys.version_info)


@nox.session(python=PYTHONS)
def lint(session: nox.Session) -> None:
    if session.python == RUNNING:
        session.skip("`make lint` does the same")
    session.chdir(ROOT)
    session.install("--editable", ".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "npgpt2")
    session.run("lint-imports", "--no-logo")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    if session.python == RUNNING != OLDEST:
        session.skip("`make test` does the same")
    session.chdir(ROOT)
    numpy = f"numpy=={OLDEST_NUMPY.get(OLDEST, '1.26.0')}" if session.python == OLDEST else "numpy"
    session.install("--editable", ".[test]", numpy)
    env = {"OPENBLAS_CORETYPE": "Haswell"} if session.python == AVX2_PYTHON else {}
    session.run("pytest", *session.posargs, env=env)
