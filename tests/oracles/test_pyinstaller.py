"""Programs of one file, as PyInstaller makes them of a program that uses npgpt2, with no more said than its name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

import npgpt2

pytest.importorskip("PyInstaller", reason="needs PyInstaller, which builds the program")

ROOT = Path(npgpt2.__file__).parents[1]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def example():
    """The first program that the README shows."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)[0]


@pytest.fixture(scope="module")
def program(example, tmp_path_factory):
    """A program that is the README's without arguments, and with arguments the command."""
    folder = tmp_path_factory.mktemp("program")
    begins = "import sys\nif sys.argv[1:]:\n    from npgpt2.__main__ import main\n\n    sys.exit(main())\n\n"
    (folder / "tales.py").write_text(begins + example, "utf-8")
    # An editable install, as the tests have it, is found by code that PyInstaller doesn't run.
    options = ["--onefile", "--paths", ROOT, "--distpath", folder, "--workpath", folder / "work", "--specpath", folder]
    # tqdm has a bar for pandas, and that, where it is installed, as the libraries that npgpt2 is compared with bring it
    # along, leads PyInstaller to SciPy and PyTorch, for ten minutes.
    options += ["--exclude-module", "pandas"]
    command = [sys.executable, "-m", "PyInstaller", *options, folder / "tales.py"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if "PythonLibraryNotFoundError" in built.stderr:
        pytest.skip("needs a Python with a shared library, which PyInstaller puts into the program")
    assert built.returncode == 0, built.stderr
    return folder / ("tales.exe" if os.name == "nt" else "tales")


@pytest.fixture
def run(program, tmp_path):
    """Run the program where it finds nothing of what it was built from, and leaves nothing."""

    def run(*arguments):
        environment = {"TMPDIR": str(tmp_path / "temporary"), "LC_ALL": "C.UTF-8"}
        (tmp_path / "temporary").mkdir(exist_ok=True)
        command = [program, *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert os.listdir(tmp_path / "temporary") == []
        return done.stdout

    return run


def test_the_readmes_program_prints_what_it_prints_in_python(run, example):
    assert run() == subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True).stdout


def test_commands_run_in_it(run, tmp_path):
    assert run("generate", PROMPT, "--length", "6") == npgpt2.load().generate(PROMPT, length=6) + "\n"
    assert "comes with npgpt2" in run("models", "--models-dir", "none")
    assert run("convert", str(ROOT / "tests" / "fixtures" / "hf"), "-o", "m.npz").startswith("m.npz: ")
    run("inspect", PROMPT, "-o", "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "return x @ w + b" in page, "the page shows the code of the formulas"


def test_it_serves(program, tmp_path):
    """The model and the page, and it ends as it does elsewhere, leaving nothing."""
    pytest.importorskip("waitress", reason="needs waitress, which runs the server")
    (tmp_path / "temporary").mkdir()
    command, environment = [program, "serve", "--port", "0"], {"TMPDIR": str(tmp_path / "temporary")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes) as process:
        try:
            address = process.stdout.readline().split()[-1]
            with urlopen(f"{address}/", timeout=60) as page:
                assert b"<title>" in page.read()
            body = json.dumps({"prompt": PROMPT, "max_tokens": 6, "temperature": 0}).encode()
            asked = Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
            with urlopen(asked, timeout=60) as answer:
                assert json.load(answer)["choices"][0]["text"] == npgpt2.load().generate(PROMPT, length=6)
        finally:
            process.terminate()
        assert process.wait(60) == 0
    assert os.listdir(tmp_path / "temporary") == []
