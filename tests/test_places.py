"""Where the package may be: in a zip file, in files without their sources, in memory, in a program of one file.

Each place is made of the package as it is, and Python is made to load it from there alone.
"""

import compileall
import configparser
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest

import npgpt2
from npgpt2.models import BUNDLED_FILE

PACKAGE = Path(npgpt2.__file__).parent
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A folder with a copy of the package."""
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(PACKAGE, folder / "npgpt2", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def story():
    return npgpt2.load().generate(PROMPT, length=6)


@pytest.fixture(scope="module", params=["stored", "deflated"])
def app(request, copied, tmp_path_factory):
    """The command as a zip file that Python can run."""
    source, app = tmp_path_factory.mktemp("app") / "source", tmp_path_factory.mktemp("built") / "npgpt2.pyz"
    shutil.copytree(copied, source)
    (source / "__main__.py").write_text("import runpy\nrunpy.run_module('npgpt2', run_name='__main__')\n")
    zipapp.create_archive(source, app, compressed=request.param == "deflated")
    shutil.rmtree(source)
    return app


@pytest.fixture(scope="module")
def without_sources(copied, tmp_path_factory):
    """A folder with the package as compiled files alone."""
    folder = tmp_path_factory.mktemp("compiled")
    shutil.copytree(copied, folder, dirs_exist_ok=True)
    assert compileall.compile_dir(folder, quiet=1, legacy=True)
    for path in folder.rglob("*.py"):
        path.unlink()
    return folder


def python(*words, place=None, cwd=None):
    """What a Python prints that finds npgpt2 in a place first."""
    environment, cwd = os.environ | ({"PYTHONPATH": str(place)} if place else {}), cwd or Path(sys.prefix)
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def sources_of(page):
    (text,) = re.findall('id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    return json.loads(text)["sources"]


# ---- A zip file


def test_every_command_runs_from_a_zip_file(app, story, run, tmp_path):
    listed = python(app, "models", "--models-dir", tmp_path)
    assert listed == run("models", "--models-dir", tmp_path)[1]
    assert python(app, "generate", PROMPT, "--length", "6", cwd=tmp_path) == story + "\n"
    assert python(app, "encode", PROMPT) == run("encode", PROMPT)[1]
    python(app, "inspect", PROMPT, "-o", tmp_path / "zip.html")
    assert run("inspect", PROMPT, "-o", tmp_path / "folder.html")[0] == 0
    assert (tmp_path / "zip.html").read_bytes() == (tmp_path / "folder.html").read_bytes()
    about = python(app, "info")
    assert f"model       {app / 'npgpt2' / 'models' / BUNDLED_FILE.name}\n" in about
    assert f"file size   {BUNDLED_FILE.stat().st_size:,} bytes\n" in about


SPREAD = """
import copy, multiprocessing, os, pickle, sys, threading
import npgpt2

def tell(model):
    return model.generate("Once upon a time", length=6)

if __name__ == "__main__":
    assert ".pyz" in npgpt2.__file__
    texts = []
    for dtype in (None, "int8"):
        model = npgpt2.load(dtype=dtype)
        for method in sorted({"fork", "spawn"} & {*multiprocessing.get_all_start_methods()}):
            with multiprocessing.get_context(method).Pool(2) as pool:
                texts += pool.map_async(tell, [model, model]).get(100)
        texts += [tell(model), tell(copy.deepcopy(model)), tell(pickle.loads(pickle.dumps(model)))]
    print(*texts, sep="|")
"""


def test_a_model_from_a_zip_file_goes_to_threads_and_processes(app, story, tmp_path):
    (tmp_path / "spread.py").write_text(SPREAD)
    told = python(tmp_path / "spread.py", place=app, cwd=tmp_path).removesuffix("\n").split("|")
    assert set(told) == {story}
    assert len(told) >= 10
    assert os.listdir(tmp_path) == ["spread.py"]


def test_a_zip_file_leaves_nothing_in_the_folder_for_temporary_files(app, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert python(app, "generate", PROMPT, "--length", "2")
    assert os.listdir(tmp_path) == []


# ---- No sources


def test_compiled_files_are_enough(without_sources, story, tmp_path):
    program = f"import npgpt2; print(npgpt2.__file__); print(npgpt2.load().generate({PROMPT!r}, length=6))"
    file, told = python("-c", program, place=without_sources).split("\n", 1)
    assert file == str(without_sources / "npgpt2" / "__init__.pyc")
    assert told == story + "\n"


def test_a_page_without_sources_shows_the_formulas_all_the_same(without_sources, run, tmp_path):
    python("-m", "npgpt2", "inspect", PROMPT, "-o", tmp_path / "compiled.html", place=without_sources)
    assert run("inspect", PROMPT, "-o", tmp_path / "folder.html")[0] == 0
    compiled, full = sources_of(tmp_path / "compiled.html"), sources_of(tmp_path / "folder.html")
    assert list(compiled) == list(full)
    for name, formula in {
        "linear": "y = x w + b",
        "layer_norm": "y = gain * (x - mean) / sqrt(var + eps) + bias",
        "softmax": "y = exp(x - max(x)) / sum(exp(x - max(x)))",
    }.items():
        assert formula in compiled[name]
        assert compiled[name].startswith(f"{name}(x: Array")
        assert "return " in full[name]


def test_a_page_is_made_without_sources_and_docstrings(copied, tmp_path):
    shutil.copytree(copied, tmp_path / "bare")
    for path in (tmp_path / "bare").rglob("*.py"):
        code = compileall.compile_file(path, quiet=1, legacy=True, optimize=2)
        assert code
        path.unlink()
    python("-OO", "-m", "npgpt2", "inspect", PROMPT, "-o", tmp_path / "bare.html", place=tmp_path / "bare")
    assert sources_of(tmp_path / "bare.html")["gelu"] == "gelu(x: Array) -> Array\n\n(without its docstring)\n"


# ---- Memory

LOADING = """
import io, os, sys, zipfile
from importlib.machinery import ModuleSpec

archive, flavour = sys.argv[1:3]
FILES = zipfile.ZipFile(io.BytesIO(open(archive, "rb").read()))

class Loader:
    def __init__(self, file):
        self.file = file

    def find_spec(name, path=None, target=None):
        for file in (name.replace(".", "/") + "/__init__.py", name.replace(".", "/") + ".py"):
            if file in FILES.namelist():
                loader = {"data": WithData, "resources": WithResources, "nothing": Loader}[flavour](file)
                spec = ModuleSpec(name, loader, origin="memory:" + file, is_package=file.endswith("__init__.py"))
                spec.has_location = flavour == "data"
                return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(FILES.read(self.file), self.file, "exec"), module.__dict__)

class WithData(Loader):
    def get_data(self, path):
        try:
            return FILES.read(path.removeprefix("memory:"))
        except KeyError:
            raise OSError(path)

class WithResources(Loader):
    def get_resource_reader(self, name):
        return self

    def files(self):
        return zipfile.Path(FILES, self.file.removesuffix("__init__.py"))

sys.meta_path.insert(0, Loader)
import npgpt2
from npgpt2.cli import main

assert type(npgpt2.__loader__).__mro__[-2] is Loader
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def in_memory(copied, tmp_path):
    """A function that runs a command where Python loads the package from memory, by a loader of some flavour."""
    (tmp_path / "loading.py").write_text(LOADING)
    archive = shutil.make_archive(str(tmp_path / "files"), "zip", copied)

    def run(flavour, *words):
        command = [sys.executable, tmp_path / "loading.py", archive, flavour, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("flavour", ["data", "resources"])
def test_a_loader_that_has_no_files_is_enough(flavour, in_memory, story, tmp_path):
    assert in_memory(flavour, "generate", PROMPT, "--length", "6") == (0, story + "\n", "")
    assert in_memory(flavour, "models", "--models-dir", tmp_path)[::2] == (0, "")
    assert in_memory(flavour, "inspect", PROMPT, "-o", tmp_path / "x.html")[::2] == (0, "")
    assert "y = x w + b" in sources_of(tmp_path / "x.html")["linear"]


def test_a_loader_that_gives_out_nothing_is_told_what_to_do(in_memory, tiny):
    status, out, err = in_memory("nothing", "generate", PROMPT)
    expected = "storyteller.npz of npgpt2.models can't be read from where that was loaded; install npgpt2 in a folder"
    assert (status, out, err) == (1, "", f"npgpt2: {expected}\n")
    assert in_memory("nothing", "generate", "A language", "-m", tiny, "--length", "1") == (0, " model\n", "")


# ---- A program of one file; tests/oracles/test_pyinstaller.py builds one


@pytest.fixture(scope="module")
def setup():
    if not (path := PACKAGE.parent / "setup.cfg").is_file():
        pytest.skip("needs the project's sources")
    setup = configparser.ConfigParser()
    setup.read(path)
    return setup


def test_pyinstaller_is_led_to_the_hook(setup):
    group, _, entry = setup["options.entry_points"]["pyinstaller40"].partition("=")
    module, _, function = entry.strip().partition(":")
    assert group.strip() == "hook-dirs"
    (folder,) = getattr(importlib.import_module(module), function)()
    assert Path(folder, "hook-npgpt2.py").is_file()


def test_the_hook_brings_along_all_that_is_no_code(setup):
    hook = runpy.run_path(str(PACKAGE / "_plugins" / "hook-npgpt2.py"))
    brought = {f"{folder}/{Path(path).name}" for path, folder in hook["datas"]}
    data = setup["options.package_data"].items()
    patterns = [f"{name.replace('.', '/')}/{file}" for name, files in data for file in files.split(", ")]
    found = [set(PACKAGE.parent.glob(pattern)) for pattern in patterns]
    assert all(found)
    assert brought == {path.relative_to(PACKAGE.parent).as_posix() for path in set().union(*found)}
    assert all(Path(path).is_file() for path, _ in hook["datas"])
