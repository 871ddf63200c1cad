"""npgpt2's models in the command `llm` as it is on PyPI: prompts, options, conversations, and what is refused."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import npgpt2
from npgpt2.engine import Limits, Settings
from npgpt2.sampling import Sampling

# llm loads no plugins in tests but those named here, which it reads when it is imported.
os.environ["LLM_LOAD_PLUGINS"] = "npgpt2"
llm = pytest.importorskip("llm", reason="needs llm, which these models are for")
from click.testing import CliRunner  # noqa: E402
from llm.cli import cli  # noqa: E402

PROMPT, SPECIAL = "Once upon a time", "<|endoftext|>"
END = "He came home, and they lived happily ever after."


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """The folder of a user, in which llm sets up a database, which takes it seconds."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(autouse=True)
def _places(tiny, user, tmp_path, monkeypatch):
    """A user whose models folder has `tiny`, and what only looks like a model."""
    (tmp_path / "models").mkdir()
    shutil.copy(tiny, tmp_path / "models" / "tiny.npz")
    (tmp_path / "models" / "broken.npz").write_bytes(b"PK\3\4 and nothing behind it")
    monkeypatch.setenv("LLM_USER_PATH", str(user))
    monkeypatch.setenv("NPGPT2_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def bundled():
    return npgpt2.load()


def run(*arguments, stdin=""):
    """A command's status, standard output and standard error."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def said(*arguments):
    """What a command that works prints, but for the line feed that llm adds."""
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    return out.removesuffix("\n")


# ---- What is there


def test_llm_finds_the_plugin_by_itself(tmp_path):
    """Where nothing names it, as on every machine that has both."""
    environment = {name: value for name, value in os.environ.items() if name != "LLM_LOAD_PLUGINS"}
    command = [sys.executable, "-m", "llm", "plugins"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    (plugin,) = (plugin for plugin in json.loads(done.stdout) if plugin["name"] == "npgpt2")
    assert plugin == {"name": "npgpt2", "hooks": ["register_models"], "version": npgpt2.__version__}


def test_each_installed_model_has_a_name():
    lines = said("models", "list").splitlines()
    assert [line for line in lines if "npgpt2" in line] == ["GPT2: npgpt2", "GPT2: npgpt2/broken", "GPT2: npgpt2/tiny"]


def test_a_models_folder_that_cannot_be_read_keeps_nobody_from_the_bundled_one(monkeypatch):
    def refuse():
        raise PermissionError(13, "Permission denied", "models")

    monkeypatch.setattr("npgpt2._plugins.llm.installed_models", refuse)
    assert [line for line in said("models", "list").splitlines() if "npgpt2" in line] == ["GPT2: npgpt2"]


def test_listing_models_imports_no_numpy_and_reads_no_weights():
    """llm itself imports NumPy where it can, so that it is kept from that."""
    program = (
        "import sys; sys.modules['numpy'] = None; import llm;"
        "print([model.model_id for model in llm.get_models() if 'npgpt2' in model.model_id]);"
        "print(sorted(name for name in sys.modules if name.startswith('npgpt2')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == [
        "['npgpt2', 'npgpt2/broken', 'npgpt2/tiny']",
        "['npgpt2', 'npgpt2._plugins', 'npgpt2._plugins.llm', 'npgpt2.files', 'npgpt2.models']",
    ]


# ---- Prompts


@pytest.mark.parametrize("more", [(), ("--no-stream",)])
def test_a_prompt_is_continued_as_the_library_continues_it(more, bundled):
    assert said("-m", "npgpt2", PROMPT, *more) == bundled.generate(PROMPT)


def test_a_name_is_that_of_an_installed_model(model):
    assert said("-m", "npgpt2/tiny", "A language model", "-o", "length", 4) == " plays one small game"


def test_a_prompt_can_be_longer_than_the_window(model):
    prompt = "A language model plays one small game. " * 30
    assert len(model.tokenizer.encode(prompt)) > model.hparams.n_ctx
    expected = model.generate(prompt, length=20)
    assert said("-m", "npgpt2/tiny", prompt, "-o", "length", 20) == expected


def test_without_a_prompt_a_text_of_its_own_begins(bundled):
    response = llm.get_model("npgpt2").prompt("", length=20)
    assert response.text() == bundled.generate("", length=20)
    assert response.usage().input == 1, "the token after which texts begin"


def test_pieces_come_before_the_text_is_complete(passes):
    pieces = iter(llm.get_model("npgpt2").prompt(PROMPT, length=60))
    first = next(pieces)
    before = len(passes)
    rest = [*pieces]
    assert first == ","
    assert before <= 2 < 10 < len(rest)
    assert len(passes) > before + 5


def test_llm_prints_pieces_as_they_come():
    """The text would take minutes to the end."""
    command = [sys.executable, "-m", "llm", "-m", "npgpt2", PROMPT, "-o", "length", "200000", "-n"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        try:
            assert process.stdout.read(9) == b", when he"
            assert process.poll() is None
        finally:
            process.kill()


def test_tokens_are_counted(bundled):
    response = llm.get_model("npgpt2").prompt(PROMPT, length=7)
    assert response.text() == bundled.generate(PROMPT, length=7)
    assert (response.usage().input, response.usage().output) == (len(bundled.tokenizer.encode(PROMPT)), 7)
    assert response.response_json == {"finish_reason": "length"}
    _, _, err = run("-m", "npgpt2", PROMPT, "-o", "length", 7, "--usage")
    assert err == "Token usage: 5 input, 7 output\n"


# ---- Conversations


def test_going_on_continues_all_that_was_said(bundled):
    first = said("-m", "npgpt2", PROMPT, "-o", "length", 12)
    second = said("-c", ' He said, "', "-o", "length", 8)
    text = f'{PROMPT}{first} He said, "{second}'
    assert second == bundled.generate(f'{PROMPT}{first} He said, "', length=8)
    third = said("-c", "", "-o", "length", 5)
    assert third == bundled.generate(text, length=5)
    logged = json.loads(said("logs", "list", "--json", "-n", 3))
    assert sorted((row["prompt"], row["response"]) for row in logged) == sorted(
        [(PROMPT, first), (' He said, "', second), ("", third)]
    )
    assert len({row["conversation_id"] for row in logged}) == 1


def test_the_readme_shows_what_llm_prints():
    readme = Path(__file__).parents[2].joinpath("README.md").read_text("utf-8")
    shown = re.findall(r"^\$ llm (.*)\n((?:(?!\$ |```).*\n)*)", readme, re.MULTILINE)
    assert len(shown) >= 2
    for arguments, output in shown:
        assert said(*shlex.split(arguments)) + "\n" == output


def test_a_conversation_in_python_is_one_text(bundled):
    conversation = llm.get_model("npgpt2").conversation()
    first = conversation.prompt(PROMPT, length=6).text()
    second = conversation.prompt(", and", length=6)
    assert second.text() == bundled.generate(f"{PROMPT}{first}, and", length=6)
    assert second.usage().input == len(bundled.tokenizer.encode(f"{PROMPT}{first}, and"))


def test_a_chat_loads_its_model_once(bundled, monkeypatch):
    loaded, load = [], npgpt2.load
    monkeypatch.setattr(npgpt2, "load", lambda name: loaded.append(name) or load(name))
    status, out, _ = run("chat", "-m", "npgpt2", "-o", "length", 6, stdin=f"{PROMPT}\n, and\nexit\n")
    first = bundled.generate(PROMPT, length=6)
    assert status == 0
    assert f"> {PROMPT}\n{first}\n> , and\n{bundled.generate(f'{PROMPT}{first}, and', length=6)}\n> exit" in out
    assert loaded == ["storyteller"]


# ---- Options

VALUES = {
    "length": ("9", 9),
    "stop": (",", ","),
    "stop_tokens": ("[11]", [11]),
    "ignore_eot": ("true", True),
    "allow_special": ("1", True),
    "skip_special": ("false", False),
    "temperature": ("0.5", 0.5),
    "top_k": ("2", 2),
    "top_p": ("0.4", 0.4),
    "min_p": ("0.2", 0.2),
    "typical_p": ("0.3", 0.3),
    "logit_bias": ('{"265": 100, "12": -100}', {265: 100, 12: -100}),
    "repetition_penalty": ("1.5", 1.5),
    "presence_penalty": ("1.5", 1.5),
    "frequency_penalty": ("1.9", 1.9),
    "no_repeat_ngram_size": ("1", 1),
    "min_tokens": ("40", 40),
    "seed": ("3", 3),
    "sample": ("4", 4),
}
BASE = {"temperature": 1.0, "seed": 1, "length": 40}
# A text that the model ends, with seed 134 after 11 tokens.
ENDING = {"ignore_eot", "skip_special", "min_tokens"}


def test_every_setting_is_an_option_with_what_the_library_says_of_it():
    options = llm.get_model("npgpt2").Options.model_fields
    assert set(options) == set(VALUES) == set(Settings.__annotations__) - {"guess", "logprobs", "prompt_logprobs"}
    for settings in (Limits, Sampling):
        for setting in fields(settings):
            if setting.name in options:
                description, _, default = options[setting.name].description.partition(" (default: ")
                assert len(description) > 10
                assert description in " ".join(settings.__doc__.split())
                assert default in ("", f"{setting.default})")
                assert setting.default is not MISSING
    shown = said("models", "--options", "-m", "npgpt2")
    for name, kind in (("temperature", "float"), ("seed", "int"), ("logit_bias", "dict"), ("ignore_eot", "boolean")):
        assert f"    {name}: {kind}\n" in shown


@pytest.mark.parametrize("name", VALUES)
def test_an_option_does_what_the_setting_does(name, bundled):
    text, value = VALUES[name]
    prompt, base = (
        (END, BASE | {"seed": 134}) if name in ENDING else (PROMPT + SPECIAL * (name == "allow_special"), BASE)
    )
    expected = bundled.generate(prompt, **base | {name: value})
    assert expected != bundled.generate(prompt, **base), "a value that changes the text"
    given = {option: str(setting) for option, setting in base.items()} | {name: text}
    assert said("-m", "npgpt2", prompt, *(word for pair in given.items() for word in ("-o", *pair))) == expected


def test_several_stop_strings_are_a_list_in_json(bundled):
    expected = bundled.generate(PROMPT, stop=["xyz", " boy"])
    assert expected.endswith("a little")
    assert said("-m", "npgpt2", PROMPT, "-o", "stop", '["xyz", " boy"]') == expected
    assert llm.get_model("npgpt2").prompt(PROMPT, stop=["xyz", " boy"]).text() == expected
    assert said("-m", "npgpt2", PROMPT, "-o", "stop", "[", "-o", "length", 3) == bundled.generate(PROMPT, length=3)


def test_options_can_be_kept_by_llm(bundled, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    assert run("models", "options", "set", "npgpt2", "length", 3)[0] == 0
    assert said("-m", "npgpt2", PROMPT) == bundled.generate(PROMPT, length=3)


# ---- What is refused


def refused(*arguments, stdin=""):
    """What llm says where it refuses something: after `Error: `."""
    status, _, err = run(*arguments, stdin=stdin)
    assert status == 1
    assert "Traceback" not in err
    assert err.startswith("Error: ")
    return err.removeprefix("Error: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("length", "0", "length is 0, where a whole number of at least 1 is expected"),
        ("length", "2.5", "Input should be a valid integer"),
        ("temperature", "nan", "temperature is nan, where a number of at least 0 is expected"),
        ("top_p", "2", "top_p is 2.0, where a number above 0 and up to 1 is expected (1 keeps all)"),
        ("top_p", "[1]", "top_p is [1], where a number is expected"),
        ("seed", "-1", "seed is -1, where a whole number of at least 0 is expected"),
        ("stop", "[1]", "stop is (1,), where a string or several are expected"),
        ("stop", "", "a stop string is empty, which would end every text at once"),
        ("logit_bias", "5", "Input should be a valid dictionary"),
        ("logit_bias", '{"a": 1}', "Input should be a valid integer"),
        ("logit_bias", '{"5": 101}', "logit_bias has 101.0 for token 5, where numbers from -100 to 100"),
        ("loudness", "3", "Extra inputs are not permitted"),
        ("guess", "true", "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_wrong(name, text, message):
    option, _, reason = refused("-m", "npgpt2", PROMPT, "-o", name, text).partition("\n")
    assert option.split(",")[0] == name
    assert message in reason
    assert "\n" not in reason


def test_what_only_the_model_can_refuse_is_said_in_a_line():
    message = "logit_bias has token 5000, which is not in the vocabulary, from 0 to 4095"
    assert refused("-m", "npgpt2", PROMPT, "-o", "logit_bias", '{"5000": 1}') == message


NO_SYSTEM = "npgpt2 only continues text and has no system prompt: begin the prompt with it"


def test_a_system_prompt_is_refused_with_what_to_do():
    assert refused("-m", "npgpt2", PROMPT, "-s", "You are a poet") == NO_SYSTEM
    assert refused("chat", "-m", "npgpt2", "-s", "You are a poet", stdin=f"{PROMPT}\n") == NO_SYSTEM
    with pytest.raises(llm.ModelError, match="no system prompt"):
        llm.get_model("npgpt2").prompt(PROMPT, system="You are a poet").text()
    conversation = llm.get_model("npgpt2").conversation()
    conversation.prompt(PROMPT, length=2).text()
    with pytest.raises(llm.ModelError, match="no system prompt"):
        conversation.prompt("and", system="You are a poet").text()


def test_a_damaged_model_and_one_that_is_gone_are_named(tmp_path):
    path = tmp_path / "models" / "broken.npz"
    message = refused("-m", "npgpt2/broken", PROMPT)
    assert str(path) in message
    assert "\n" not in message
    model = llm.get_model("npgpt2/broken")
    path.unlink()
    with pytest.raises(llm.ModelError, match=r"model 'broken' not found: there is no .*broken\.npz; give a path"):
        model.prompt(PROMPT).text()
