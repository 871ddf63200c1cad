"""The model that comes with npgpt2: found without a name, small enough for the wheel, and in the wheel."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

import npgpt2
from npgpt2.model import HParams, variable_shapes
from npgpt2.models import BUNDLED_FILE, MODELS, installed_models
from npgpt2.serving.server import pages

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def storyteller():
    return npgpt2.load()


def test_it_is_a_gpt2_of_the_sizes_on_its_card(storyteller):
    assert storyteller.hparams == HParams(n_vocab=4096, n_ctx=512, n_embd=256, n_head=4, n_layer=6)
    assert storyteller.weights.parameters == 5_918_720
    assert storyteller.weights.dtype == "float16"
    assert len(storyteller.tokenizer) == 4096
    assert storyteller.tokenizer.end_of_text == 4095


def test_it_is_at_most_12_500_000_bytes():
    assert BUNDLED_FILE.stat().st_size <= 12_500_000


def test_its_name_means_it_whatever_the_folder_holds(storyteller, tiny, tmp_path, monkeypatch):
    """A program's default model can't be replaced by a file that lies about in the folder where it is run."""
    (tmp_path / "models").mkdir()
    shutil.copy(tiny, tmp_path / "models" / "storyteller.npz")
    monkeypatch.chdir(tmp_path)
    assert npgpt2.load().hparams == npgpt2.load("storyteller", models_dir="models").hparams == storyteller.hparams
    assert installed_models() == {"storyteller": BUNDLED_FILE}


@pytest.mark.usefixtures("homeless")
def test_it_needs_no_home_folder(storyteller):
    assert npgpt2.load().hparams == storyteller.hparams


def test_it_has_read_stories(storyteller):
    """Weights that went wrong anywhere, in type, order or layer, take plain English for noise: 12 bits a token."""
    tokens = storyteller.tokenizer.encode(
        'Then the king was very glad, and said to the old woman, "I will give you my daughter."'
    )
    logits = storyteller.logits(tokens)[:-1].astype(np.float64)
    chosen = logits[np.arange(len(logits)), tokens[1:]]
    bits = (np.log(np.exp(logits).sum(-1)) - chosen).mean() / np.log(2)
    assert bits < 5


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
def test_a_hundred_tokens_take_less_than_100_mb():
    program = """if True:
        import sys
        from npgpt2.cli import main
        main(["generate", "Once upon a time", "--length", "100"])
        print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(done.stdout) > 200
    name, kilobytes, unit = done.stderr.split()
    assert (name, unit) == ("VmHWM:", "kB")
    assert int(kilobytes) * 1024 < 100e6


def test_the_sizes_of_models_to_download_are_those_of_their_shapes():
    """From OpenAI's hparams.json of each: n_embd and n_layer."""
    for name, (n_embd, n_layer) in {
        "124M": (768, 12),
        "355M": (1024, 24),
        "774M": (1280, 36),
        "1558M": (1600, 48),
    }.items():
        shapes = variable_shapes(HParams(50257, 1024, n_embd, n_embd // 64, n_layer))
        assert MODELS[name] == sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())


# ---- The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from a copy of what git keeps, with the tools that are installed already."""
    if not (ROOT / "setup.cfg").is_file():
        pytest.skip("needs the project's sources")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("npgpt2", "tools", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", built, source], check=True)
    return next(built.glob("*.whl"))


def test_the_wheel_is_less_than_13_mb(wheel):
    assert wheel.stat().st_size < 13_000_000


def test_the_wheel_holds_the_package_and_the_model_with_its_vocabulary_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        with archive.open("npgpt2/models/storyteller.npz") as file, zipfile.ZipFile(file) as model:
            assert {"hparams.json", "encoder.json", "vocab.bpe"} <= set(model.namelist())
    about = f"npgpt2-{npgpt2.__version__}.dist-info/"
    package = {f"npgpt2/{path.relative_to(ROOT / 'npgpt2').as_posix()}" for path in (ROOT / "npgpt2").rglob("*.py")}
    package |= {f"{folder.replace('.', '/')}/{name}" for name, folder in pages.FILES.items()}
    package |= {
        "npgpt2/py.typed",
        "npgpt2/README.md",
        "npgpt2/study/report.html",
        "npgpt2/models/README.md",
        "npgpt2/models/storyteller.npz",
    }
    assert {name for name in names if not name.startswith(about)} == package


def test_every_module_can_be_imported_from_the_wheel(wheel, tmp_path):
    """Without `site`, which would let an editable install fill in what the wheel lacks."""
    program = """if True:
        import importlib, pkgutil, sys
        sys.path[:0] = sys.argv[1:]
        import npgpt2
        assert npgpt2.__file__.startswith(sys.argv[1]), npgpt2.__file__
        for _, name, _ in pkgutil.walk_packages(npgpt2.__path__, "npgpt2."):
            # Which would run the command, and which needs llm.
            if name not in ("npgpt2.__main__", "npgpt2._plugins.llm"):
                importlib.import_module(name)
            print(name)
    """
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    libraries = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    command = [sys.executable, "-I", "-S", "-c", program, tmp_path, *libraries]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    modules = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "npgpt2").rglob("*.py")}
    names = {".".join(path.parts).removesuffix(".__init__") for path in modules}
    assert {"npgpt2", *imported} == names


def test_a_repetition_penalty_leads_out_of_the_loop():
    model, prompt = npgpt2.load(), "The wolf looked at the"
    assert model.generate(prompt, length=60).count("I have been so long") >= 5
    assert model.generate(prompt, length=200, repetition_penalty=1.2).count("I have been so long") == 0
    begun = 'The wolf looked at the wolf, and said, "I have been so long, and I have been so long, and'
    assert model.generate(begun, length=30).startswith(" I have been so long, and I have been so long")
    assert model.generate(begun, length=200, repetition_penalty=1.2).count("been so long") == 0
