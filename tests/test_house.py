"""How the project is built: small functions, small folders, and nothing brought along that isn't needed.

Which folder may import which is in pyproject.toml, and `make lint` holds the project to it.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import npgpt2

PACKAGE = Path(npgpt2.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def named(path):
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_no_function_is_longer_than_60_lines(path):
    """But for the tables of options, which are read line by line."""
    functions = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.name != "add_commands"}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_no_folder_holds_more_than_ten_modules():
    folders = [PACKAGE, *(path.parent for path in MODULES if path.name == "__init__.py")]
    counts = {named(folder): len([*folder.glob("[!_]*.py")]) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > 10} == {}


@pytest.mark.parametrize("folder", sorted({named(path.parent) for path in MODULES} - {"."}))
def test_every_folder_says_at_its_door_what_it_is_for(folder):
    assert ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text("utf-8")))


@pytest.mark.parametrize("name", ["model", "formulas"])
def test_the_forward_pass_needs_numpy_and_its_formulas_alone(name):
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            within = [f"npgpt2.{alias.name}" for alias in node.names] if node.module == "npgpt2" else [node.module]
            imported |= set(within)
    numpy = {"numpy", "numpy.typing"}
    types = {"__future__", "typing", "collections.abc"}
    assert imported <= numpy | types | {"npgpt2.model", "npgpt2.formulas"}


# What takes time to import, and what a program that generates has no use for.
UNNEEDED = ["npgpt2.convert", "npgpt2.study.report", "npgpt2.serving", "npgpt2._plugins"]
UNNEEDED += ["http", "urllib.request", "ssl", "asyncio", "webbrowser", "waitress"]


@pytest.mark.parametrize(
    ("program", "unneeded"),
    [
        ("import npgpt2", [*UNNEEDED, "npgpt2.cli", "npgpt2.model", "numpy", "tqdm"]),
        ("import npgpt2; npgpt2.load().generate('Once', length=2)", [*UNNEEDED, "npgpt2.cli", "tqdm"]),
        ("import npgpt2; repr(npgpt2.load().trace([1, 2], attention=True))", [*UNNEEDED, "npgpt2.cli", "tqdm"]),
        ("from npgpt2.cli import main; main(['generate', 'Once', '--length', '2'])", UNNEEDED),
    ],
)
def test_nothing_is_imported_before_it_is_needed(program, unneeded):
    program += "; import sys; print('imported:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = done.stdout.split("imported:")[1].split()
    assert "npgpt2" in names
    assert [name for name in names if any(f"{name}.".startswith(f"{part}.") for part in unneeded)] == []


def test_the_names_of_the_library_are_there_before_they_are_used():
    program = "import npgpt2; print(dir(npgpt2)); from npgpt2 import *; print(dir()); help(npgpt2)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, starred, *shown = done.stdout.splitlines()
    for name in npgpt2.__all__:
        assert repr(name) in before
        assert repr(name) in starred
    assert any("class GPT2(" in line for line in shown)
    with pytest.raises(AttributeError, match="module 'npgpt2' has no attribute 'nothing'"):
        _ = npgpt2.nothing


def test_type_checkers_and_python_find_the_library_in_the_same_modules():
    (checked,) = (node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in checked.body for alias in node.names}
    assert imported == npgpt2._HOMES
    assert {*imported, "__version__"} == set(npgpt2.__all__)
