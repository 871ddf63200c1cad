"""What the documentation says is true: examples in docstrings, and commands and output in README.md."""

import doctest
import importlib
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from commands import Stdin

import npgpt2
from npgpt2.cli import main
from npgpt2.cli.commands import build_parser

# One runs the command, and the other needs llm; tests/oracles/test_llm.py has that.
UNIMPORTED = {"npgpt2.__main__", "npgpt2._plugins.llm"}
MODULES = [name for _, name, _ in pkgutil.walk_packages(npgpt2.__path__, "npgpt2.") if name not in UNIMPORTED]


@pytest.mark.parametrize("name", ["npgpt2", *MODULES])
def test_examples_in_docstrings_run(name, model, fixtures, tmp_path, monkeypatch):
    monkeypatch.chdir(fixtures.parent.parent)
    module = importlib.import_module(name)
    given = {"model": model, "weights": model.weights, "hparams": model.hparams, "tokenizer": model.tokenizer}
    result = doctest.testmod(module, extraglobs=given | {"load": npgpt2.load})
    assert result.failed == 0


def public(module):
    """The functions and classes that a module defines for others, and the methods of the latter, but not of protocols,
    which only say what others' methods have to be like.
    """
    for name, thing in vars(module).items():
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__ and callable(thing):
            yield name, thing
            if isinstance(thing, type) and not getattr(thing, "_is_protocol", False):
                for method, function in vars(thing).items():
                    if not method.startswith("_") and callable(function):
                        yield f"{name}.{method}", function


# What people read or call: all that generates, and what looks at a model. What is only for commands and conversion may
# leave the obvious unsaid.
OFFERED = re.compile(r"npgpt2\.(model|formulas|tokenizer|sampling|samplers|gpt2|(engine|kernels|study)\..*)")


@pytest.mark.parametrize("name", [*filter(OFFERED.fullmatch, MODULES)])
def test_what_the_library_offers_is_documented(name):
    undocumented = [thing for thing, value in public(importlib.import_module(name)) if not value.__doc__]
    assert undocumented == []


# ---- README.md, and the card of the bundled model


@pytest.fixture(scope="module")
def root(fixtures):
    return fixtures.parent.parent


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text("utf-8")


def sessions(readme):
    """Every command in a `console` block with the output shown below it."""
    for block in re.findall(r"```console\n(.*?)```", readme, re.DOTALL):
        for session in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = session.partition("\n")
            yield command, output


@pytest.fixture
def newcomer(fixtures, readme, tmp_path, monkeypatch):
    """A folder like a fresh clone's, with the files that the README speaks of; downloads bring the small model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NPGPT2_MODELS", str(tmp_path / "models"))
    shutil.copytree(fixtures, tmp_path / "tests" / "fixtures")
    shutil.copytree(fixtures / "finetuned", tmp_path / "run1")
    shutil.copytree(fixtures / "hf", tmp_path / "my-gpt2")
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "one.txt").write_text("A language model plays one small game.\n")
    shutil.copy(tmp_path / "stories" / "one.txt", tmp_path / "prompt.txt")
    (tmp_path / "prompts.txt").write_text("The wolf looked at the\nThe old woman\n")
    (requests,) = re.findall(r"^\$ cat requests.jsonl\n((?:\{.*\n)+)", readme, re.MULTILINE)
    (tmp_path / "requests.jsonl").write_text(requests)
    os.utime(tmp_path / "requests.jsonl", (1790000000, 1790000000))

    def fetch_checkpoint(name, folder, base_url):
        shutil.copytree(fixtures / "tiny", folder)

    monkeypatch.setattr("npgpt2.convert.fetch_checkpoint", fetch_checkpoint)


@pytest.mark.parametrize(("document", "least"), [("README.md", 25), ("npgpt2/models/README.md", 9)])
def test_every_command_works_and_prints_what_is_shown(document, least, root, newcomer, capsys, monkeypatch):
    text = (root / document).read_text("utf-8")
    ours = re.compile(r"(.* \| )?npgpt2 |cat ")  # tests/oracles/test_llm.py runs those of llm
    commands = [(command, output) for command, output in sessions(text) if ours.match(command)]
    assert len(commands) >= least
    for command, shown in commands:
        printed = None
        for part in command.split(" | "):
            program, *words = shlex.split(part)
            if program == "echo":
                printed = words[0] + "\n"
                continue
            if program == "cat":
                printed = Path(words[0]).read_text("utf-8")
                continue
            data = (printed or "").encode()
            monkeypatch.setattr(sys, "stdin", Stdin(data, terminal=printed is None))
            assert (program, main(words)) == ("npgpt2", 0), command
            printed = capsys.readouterr().out
        if shown.strip():
            pattern = re.escape(shown.rstrip("\n")).replace(r"\.\.\.\n", "(.|\n)*")
            assert re.fullmatch(pattern, printed.rstrip("\n")), f"{command} printed\n{printed}"


def test_the_readme_lists_every_command_with_its_help(readme):
    commands = next(action for action in build_parser()._actions if action.dest == "command")
    for choice in commands._choices_actions:
        assert re.search(
            rf"^\| `npgpt2 {choice.dest}\b.*\| {re.escape(choice.help)}", readme, re.MULTILINE | re.IGNORECASE
        )


def test_the_python_in_the_readme_runs(readme, newcomer):
    assert main(["download", "124M"]) == 0
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_links_in_the_readme_lead_to_files(root, readme):
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert len(links) > 5
    assert [link for link in links if not (root / link).is_file()] == []


def test_the_drawing_of_the_code_has_every_room(root, readme):
    """All that is in the folder but what has no part in the way of a text through the model."""
    drawing = readme.split("## Reading the code")[1].split("```")[1]
    drawn = set(re.findall(r"^ *(\w+/?)|(?:─►|══) (\w+/?)", drawing, re.MULTILINE))
    modules = {
        path.name + "/" * path.is_dir() for path in (root / "npgpt2").glob("[!_]*") if path.suffix in ("", ".py")
    }
    rooms = {name.removesuffix(".py") for name in modules} - {"bars", "checks", "files", "forks", "models/"}
    assert {first or second for first, second in drawn} == rooms


def test_the_demo_prints_what_the_readme_shows(root, readme, capsys, monkeypatch):
    """All but the speed; and where the virtual environment is depends on who runs the tests."""
    (shown,) = (output for command, output in sessions(readme) if command == "make demo")
    shown = shown.removeprefix("Setting npgpt2 up in .venv …\n")
    monkeypatch.setattr(sys, "prefix", os.path.join(os.getcwd(), ".venv"))
    runpy.run_path(str(root / "tools" / "demo.py"), run_name="__main__")
    speed = r"\(\d+ tokens in [\d.]+ s, \d+ tokens/s"
    assert re.sub(speed, "(", capsys.readouterr().out) == re.sub(speed, "(", shown)


def test_the_card_of_the_bundled_model_has_its_sizes(root):
    card = (root / "npgpt2" / "models" / "README.md").read_text("utf-8")
    bundled = npgpt2.load()
    for name, value in (*bundled.hparams._asdict().items(), ("parameters", bundled.weights.parameters)):
        assert re.search(rf"^\| `?{name}`? \| {value:,} \|", card, re.MULTILINE)


def test_what_the_readme_makes_are_targets_of_the_makefile(readme, root):
    makefile = (root / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    made = set(re.findall(r"(?:^\$ |`)make (\w+)", readme, re.MULTILINE))
    assert {"demo", "test", "lint", "oracles", "bench"} <= made <= targets
