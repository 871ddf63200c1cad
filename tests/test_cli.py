"""The commands, as a user runs them: what they print, what they read, how they fail, and with which status."""

import copy
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from commands import failed

import npgpt2
from npgpt2 import Engine
from npgpt2.cli.commands import build_parser, parse_arguments
from npgpt2.convert import write_dataset
from npgpt2.models import BUNDLED_FILE
from npgpt2.samplers import FILTERS, PROCESSORS

HEADER = f"{'=' * 40} SAMPLE {{}} {'=' * 40}\n"


def spawn(*arguments, **options):
    """Start the command as a process of its own."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "-m", "npgpt2", *map(str, arguments)], **pipes)


# ---- generate


def test_generate_prints_the_continuation(run):
    assert run("generate", "A language model", "-m", "MODEL", "--length", "4") == (0, " plays one small game\n", "")


@pytest.mark.parametrize("stdin", [b"A language model", b"A language model\n", b"A language model\r\n"])
def test_generate_reads_a_piped_prompt(run, stdin):
    assert run("generate", "-m", "MODEL", "--length", "2", stdin=stdin)[1] == " plays one\n"


def test_generate_reads_a_prompt_file(run, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"A language model\n")
    assert run("generate", "--file", tmp_path / "prompt.txt", "-m", "MODEL", "--length", "2")[1] == " plays one\n"


@pytest.mark.parametrize("arguments", [{"terminal": True}, {"stdin": b""}])
def test_generate_without_a_prompt_begins_a_text(run, arguments):
    assert run("generate", "-m", "MODEL", "--length", "3", **arguments)[1] == "A language model\n"


def test_generate_does_not_read_standard_input_when_it_has_a_prompt(run):
    assert run("generate", "A language", "-m", "MODEL", "--length", "1", stdin=b"\xff")[1] == " model\n"


def test_generate_takes_all_sampling_options(run, model):
    options = [
        "--length",
        "9",
        "--temperature=1.5",
        "--top-k",
        "40",
        "--top_p=0.9",
        "--min-p=0.01",
        "--typical-p=0.95",
        "--repetition-penalty=1.1",
        "--presence-penalty=-0.5",
        "--frequency-penalty",
        "0.3",
        "--no-repeat-ngram-size=4",
        "--min-tokens=5",
        "--logit-bias=70=1.5",
        "--logit_bias",
        "65=-100",
        "--seed",
        "3",
        "--stop",
        "x",
        "--stop=qq",
    ]
    settings = {
        "temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "repetition_penalty": 1.1,
        "presence_penalty": -0.5, "frequency_penalty": 0.3, "no_repeat_ngram_size": 4, "min_tokens": 5,
        "logit_bias": {70: 1.5, 65: -100},
    }  # fmt: skip
    assert settings.keys() == {*PROCESSORS, *FILTERS}
    expected = model.generate("So", length=9, **settings, seed=3, stop=["x", "qq"])
    assert run("generate", "So", "-m", "MODEL", *options) == (0, expected + "\n", "")


def test_generate_goes_on_past_the_end_of_text_if_told_to(run):
    arguments = ["generate", " reach the last.", "-m", "MODEL", "--length", "4"]
    assert run(*arguments)[1] == "\n"
    assert run(*arguments, "--ignore-eot")[1] == "<|endoftext|>A language model\n"


@pytest.mark.parametrize("batch_size", ["1", "2", "3"])
def test_generate_heads_several_samples(run, model, batch_size):
    options = ["--length", "6", "--temperature", "2", "--seed", "8", "--nsamples", "3", "--batch-size", batch_size]
    texts = model.samples("The", nsamples=3, length=6, temperature=2.0, seed=8)
    expected = "".join(HEADER.format(number) + text + "\n" for number, text in enumerate(texts, 1))
    assert run("generate", "The", "-m", "MODEL", *options) == (0, expected, "")


def test_generate_writes_a_file(run, tmp_path):
    (tmp_path / "story.txt").write_text("old")
    result = run("generate", "A language", "-m", "MODEL", "--length", "1", "--output", tmp_path / "story.txt")
    assert result == (0, "", "")
    assert (tmp_path / "story.txt").read_bytes() == b" model\n"
    assert os.listdir(tmp_path) == ["story.txt"]


def test_a_file_is_kept_when_generating_fails(run, tmp_path, monkeypatch):
    (tmp_path / "story.txt").write_text("old")

    step, steps = Engine.step, []

    def fail(engine):
        steps.append(engine)
        if len(steps) > 30:  # when one of two samples is written
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", fail)
    options = [
        "--nsamples",
        "2",
        "--length",
        "20",
        "--temperature",
        "3",
        "--seed",
        "1",
        "--ignore-eot",
        "--output",
        tmp_path / "story.txt",
    ]
    assert run("generate", "A", "-m", "MODEL", *options)[0] == 130
    assert len(steps) == 31
    assert (tmp_path / "story.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["story.txt"]


# ---- unconditional and interactive


def test_unconditional_prints_headed_samples_past_the_end_of_text(run, model):
    result = run("unconditional", "--model_name=MODEL".replace("MODEL", str(model.weights.path)),
                 "--nsamples=2", "--seed=1", "--temperature=0", "--top_k=0", "--length=190")  # fmt: skip
    text = model.generate("", length=190, ignore_eot=True)
    assert "<|endoftext|>" in text
    assert result == (0, HEADER.format(1) + text + "\n" + HEADER.format(2) + text + "\n", "")


def test_unconditional_generates_n_ctx_tokens_by_default(run, model):
    out = run("unconditional", "--model_name", "MODEL", "--nsamples", "1", "--temperature", "0")[1]
    assert out == HEADER.format(1) + model.generate("", length=192, ignore_eot=True) + "\n"


def test_unconditional_prints_as_many_samples_as_asked_for_whatever_the_batch(run):
    arguments = ["unconditional", "-m", "MODEL", "--length", "5", "--seed", "2", "--nsamples", "3"]
    outputs = {run(*arguments, "--batch_size", size)[1] for size in ("1", "2", "4")}
    assert len(outputs) == 1
    assert outputs.pop().count(" SAMPLE ") == 3


def test_interactive_answers_until_the_input_ends(run, model):
    result = run(
        "interactive", "--model-name", "MODEL", "--temperature", "0", "--length", "3", stdin=b"A language\n\nSo\n"
    )
    answers = [
        HEADER.format(1) + model.generate(prompt, length=3) + "\n" + "=" * 80 + "\n" for prompt in ("A language", "So")
    ]
    prompt = "Model prompt >>> "
    assert result == (0, f"{prompt}{answers[0]}{prompt}Prompt should not be empty!\n{prompt}{answers[1]}{prompt}\n", "")


def test_interactive_generates_half_of_n_ctx_by_default(run, model):
    out = run("interactive", "-m", "MODEL", "--temperature", "0", stdin=b"A language\n")[1]
    assert model.generate("A language", length=96) + "\n" + "=" * 80 in out


def test_interactive_numbers_samples_from_1_for_each_prompt_but_draws_new_ones(run):
    arguments = ["interactive", "-m", "MODEL", "--seed", "1", "--nsamples", "2", "--length", "20", "--temperature", "3"]
    out = run(*arguments, stdin=b"The\nThe\n")[1]
    texts = re.findall(r"= SAMPLE (\d) =+\n(.*?)\n=", out, re.DOTALL)
    assert [number for number, _ in texts] == ["1", "2", "1", "2"]
    assert len({text for _, text in texts}) == 4
    assert run(*arguments, "--batch_size", "2", stdin=b"The\nThe\n")[1] == out


def test_interactive_reads_only_what_is_new_in_a_prompt(run, passes, model):
    first = "A language model plays one small game: it reads some words"
    second = f"{first} and guesses the next. Then it reads one more"
    n_second = len(model.tokenizer.encode(second))
    options = ["--length", "1", "--nsamples", "2", "--batch-size"]
    for batch_size in ("1", "2"):
        passes.clear()
        run("interactive", "-m", "MODEL", *options, batch_size, stdin=f"{first}\n{second}\n{first}\n".encode())
        # Of the six samples, two read what is new; the others read the last token, which says what follows.
        assert sum(map(sum, passes)) == n_second + 4


def test_generate_reads_the_prompt_of_several_samples_once(run, passes, model):
    n = len(model.tokenizer.encode("A language model plays"))
    run("generate", "A language model plays", "-m", "MODEL", "--length", "2", "--nsamples", "3")
    assert passes == [[n], *[[1]] * 5]


def test_threads_can_be_limited(run, model):
    text = model.generate("A language model", length=4)
    assert run("generate", "A language model", "-m", "MODEL", "--length", "4", "--threads", "1")[1] == text + "\n"
    assert failed(run("generate", "A", "--threads", "0"), 2, "--threads: '0' is not a whole number of at least 1")


def test_interactive_wants_nsamples_to_be_a_multiple_of_batch_size(run):
    assert failed(run("interactive", "--nsamples", "3", "--batch_size", "2"), 2, "nsamples 3", "batch_size 2")
    assert failed(run("interactive", "--nsamples", "0"), 2, "nsamples 0")


def test_every_option_can_be_spelled_both_ways():
    one = parse_arguments(["unconditional", "--model_name=x", "--batch_size", "2", "--top_k=1", "--models_dir", "a_b"])
    two = parse_arguments(["unconditional", "--model-name", "x", "--batch-size=2", "--top-k", "1", "--models-dir=a_b"])
    del one.parser, two.parser
    assert one == two
    assert one.models_dir == "a_b"
    assert parse_arguments(["generate", "--", "--not_an_option"]).prompt == "--not_an_option"


# ---- encode and decode


def test_encode_and_decode_are_inverse(run, model):
    text = "A language model,\nit has 2 eyes — é"
    ids = run("encode", text, "-m", "MODEL")[1]
    assert [int(token) for token in ids.split()] == model.tokenizer.encode(text)
    assert ids.count("\n") == 1
    assert run("decode", *ids.split(), "-m", "MODEL") == (0, text + "\n", "")
    assert run("decode", "-m", "MODEL", stdin=ids.encode())[1] == text + "\n"


def test_encode_reads_files_and_pipes_and_vocabulary_folders(run, model, fixtures, tmp_path):
    (tmp_path / "text.txt").write_bytes("é\n".encode())
    ids = [" ".join(map(str, model.tokenizer.encode(text))) + "\n" for text in ("é\n", "é")]
    assert run("encode", "--file", tmp_path / "text.txt", "--vocab", fixtures / "tiny")[1] == ids[0]
    assert run("encode", "-m", "MODEL", stdin="é\n".encode())[1] == ids[1]


def test_encode_takes_end_of_text_for_the_token_if_told_to(run):
    assert run("encode", "<|endoftext|>", "--allow-special", "-m", "MODEL")[1] == "519\n"
    assert run("encode", "<|endoftext|>", "-m", "MODEL")[1] != "519\n"


def test_decode_takes_a_list_from_each_line(run):
    result = run("decode", "-m", "MODEL", stdin=b"[64, 65]\n66,67\r\n\n68 69")
    texts = [run("decode", *ids, "-m", "MODEL")[1] for ids in (["64", "65"], ["66", "67"], [], ["68", "69"])]
    assert result[1] == "".join([*texts[:2], "\n", texts[3]])


def test_decode_refuses_what_is_no_token(run):
    assert failed(run("decode", "12", "x", "-m", "MODEL"), 1, "'12 x' is not a list of token ids")
    assert failed(run("decode", "520", "-m", "MODEL"), 1, "token 520 is not in the vocabulary")


def test_encode_writes_a_training_set(run, model, tmp_path):
    end = "<|endoftext|>"
    texts = {"a.txt": "It has no eyes", "b.txt": "and no ears" * 10, "deep/c.txt": "So read slowly"}
    for name, text in texts.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    out = tmp_path / "tokens.npz"
    result = run("encode", tmp_path / "texts", "-o", out, "-m", "MODEL", "--combine", "100")
    assert result[0] == 0
    assert "3 files" in result[1]
    with np.load(out) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        chunks = [archive[name] for name in archive.files]
    assert [chunk.dtype for chunk in chunks] == [np.int32] * 2
    decoded = [model.tokenizer.decode(chunk) for chunk in chunks]
    assert decoded == [texts["a.txt"] + end + texts["b.txt"], texts["deep/c.txt"] + end]
    assert sum((chunk == 519).sum() for chunk in chunks) == 2

    again = tmp_path / "again.npz"
    assert run("encode", out, tmp_path / "texts" / "*.txt", "-o", again, "-m", "MODEL")[0] == 0
    with np.load(again) as archive:
        assert [len(archive[name]) for name in archive.files][:2] == [len(chunk) for chunk in chunks]
        assert model.tokenizer.decode(archive["arr_2"]) == decoded[0] + end


def test_a_training_set_does_not_contain_itself_or_a_file_twice(run, model, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"It has\r\nno eyes")
    for _ in range(2):
        assert run("encode", tmp_path, tmp_path / "*.txt", "-o", tmp_path / "t.npz", "-m", "MODEL")[0] == 0
        with np.load(tmp_path / "t.npz") as archive:
            assert model.tokenizer.decode(archive["arr_0"]) == "It has\nno eyes<|endoftext|>"
            assert archive.files == ["arr_0"]


def write_tokens(path, tokens, method, shape=None, more=b""):
    """A training set of one array, of which the header says this shape."""
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("arr_0.npy", "w") as file:
        header = {"descr": tokens.dtype.str, "fortran_order": False, "shape": shape or tokens.shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(tokens.tobytes() + more)


def damage(path):
    """Change a byte of the first member's."""
    data = bytearray(path.read_bytes())
    data[70] ^= 1
    path.write_bytes(data)


def test_a_training_set_of_what_is_none_is_refused_and_nothing_written(run, tiny, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK")
    np.savez(tmp_path / "floats.npz", np.zeros(3))
    np.savez(tmp_path / "large.npz", np.array([520]))
    np.savez(tmp_path / "objects.npz", np.array([{}], object))
    np.save(tmp_path / "bare.npy", np.arange(3))
    (tmp_path / "bare.npy").rename(tmp_path / "bare.npz")
    for method, name in ((zipfile.ZIP_LZMA, "lzma.npz"), (zipfile.ZIP_BZIP2, "bzip2.npz")):
        write_tokens(tmp_path / name, np.arange(3), method)
        damage(tmp_path / name)
    write_tokens(tmp_path / "checksum.npz", np.arange(3), zipfile.ZIP_STORED)
    damage(tmp_path / "checksum.npz")
    write_tokens(tmp_path / "longer.npz", np.arange(3), zipfile.ZIP_STORED, more=b"x")
    write_tokens(tmp_path / "claims.npz", np.arange(3), zipfile.ZIP_STORED, shape=(10**15,))
    write_tokens(tmp_path / "negative.npz", np.arange(3), zipfile.ZIP_STORED, shape=(-(10**15),))
    (tmp_path / "model.npz").write_bytes(tiny.read_bytes())
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    before = sorted(os.listdir(tmp_path))
    for name, message in (
        ("bad.npz", "not a training set"),
        ("floats.npz", "arr_0 is not a list of tokens"),
        ("large.npz", "tokens that are not in the vocabulary of 520"),
        ("objects.npz", "not a training set"),
        ("bare.npz", "not a training set (File is not a zip file)"),
        ("lzma.npz", "arr_0.npy is compressed in a way that NumPy doesn't use"),
        ("bzip2.npz", "arr_0.npy is compressed in a way that NumPy doesn't use"),
        ("checksum.npz", "not a training set (Bad CRC-32"),
        ("longer.npz", "arr_0 holds more than its header says"),
        ("claims.npz", "arr_0 is cut short"),
        ("negative.npz", "arr_0 is cut short"),
        ("model.npz", "hparams.json is not a list of tokens"),
        ("latin.txt", "latin.txt: not UTF-8 at byte 3 (0xe9)"),
        ("missing*", "no such file"),
    ):
        assert failed(run("encode", tmp_path / name, "-o", tmp_path / "out.npz", "-m", "MODEL"), 1, message)
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_a_training_set_is_read_in_pieces_whatever_it_expands_to(dtype, model, tmp_path, allocated_peak):
    """Files of some kilobytes that hold 12 to 48 MB."""
    tokens = np.resize(np.arange(8, dtype=dtype), 6 * 2**20)
    np.savez_compressed(tmp_path / "in.npz", tokens)
    assert (tmp_path / "in.npz").stat().st_size < tokens.nbytes / 200
    assert (
        allocated_peak(lambda: write_dataset(tmp_path / "out.npz", [str(tmp_path / "in.npz")], model.tokenizer)) < 2**23
    )
    with np.load(tmp_path / "out.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"], tokens.astype(np.int32), strict=True)


def test_a_training_set_whose_members_lie_over_each_other_is_refused(model, tmp_path):
    """A small file could list one member a million times."""
    path = tmp_path / "in.npz"
    write_tokens(path, np.zeros(10**6, np.int32), zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.infolist()[0]
        for number in range(1, 100):
            twin = copy.copy(first)
            twin.filename = f"arr_{number}.npy"
            archive.filelist.append(twin)
        archive._didModify = True
    with pytest.raises(ValueError, match=r"in\.npz: not a training set \([\d,]+ bytes that claim to hold 400,[\d,]+\)"):
        write_dataset(tmp_path / "out.npz", [str(path)], model.tokenizer)


# ---- inspect


def test_inspect_writes_a_page(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("inspect", "A language model", "-m", "MODEL")
    page = (tmp_path / "report.html").read_bytes()
    assert (status, out, err) == (0, f"report.html: {len(page):,} bytes, tokens: 3\n", "")
    assert page.startswith(b"<!doctype html>")
    assert os.listdir(tmp_path) == ["report.html"]


def test_inspect_reads_prompts_like_the_others(run, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"A language model\n")
    pages = []
    for arguments in (["A language model"], ["--file", tmp_path / "prompt.txt"], []):
        output = tmp_path / f"{len(pages)}.html"
        stdin = b"A language model\n" if not arguments else b""
        assert run("inspect", *arguments, "-m", "MODEL", "--output", output, stdin=stdin)[0] == 0
        pages.append(output.read_bytes())
    assert len(set(pages)) == 1


def test_inspect_without_a_prompt_shows_how_a_text_begins(run, tmp_path):
    result = run("inspect", "-m", "MODEL", "-o", tmp_path / "x.html", terminal=True)
    assert result[1].endswith("bytes, tokens: 1\n")
    assert '"519": "\\u003c|endoftext|>"' in (tmp_path / "x.html").read_text()


def test_inspect_opens_the_page_if_told_to(run, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: (opened.append(address), len(opened) == 1)[1])
    arguments = ["inspect", "A", "-m", "MODEL", "-o", tmp_path / "my page.html"]
    assert run(*arguments)[0] == 0
    assert opened == []
    assert run(*arguments, "--open")[0] == 0
    assert opened == [(tmp_path / "my page.html").as_uri()]
    status, _, err = run(*arguments, "--open")
    assert (status, err.count("\n")) == (1, 1)
    assert "no browser" in err


def test_inspect_refuses_what_it_cannot_show_and_keeps_the_old_page(run, fixtures, tmp_path):
    assert run("convert", fixtures / "finetuned", "-o", tmp_path / "mute.npz")[0] == 0
    page = tmp_path / "x.html"
    page.write_text("old")
    for prompt, model, message in (
        ("A " * 300, "MODEL", "more than the model's n_ctx of 192"),
        ("A", tmp_path / "mute.npz", "has no vocabulary"),
        ("A", tmp_path / "none.npz", "no such file"),
    ):
        assert failed(run("inspect", prompt, "-m", model, "-o", page), 1, message)
    assert failed(run("inspect", "A", "-m", "MODEL", "-o", tmp_path / "no" / "x.html"), 1, "no such folder")
    assert page.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["mute.npz", "x.html"]


# ---- info, convert, download


def test_info_shows_what_a_model_is(run, tiny):
    status, out, err = run("info", "MODEL")
    assert (status, err) == (0, "")
    shown = dict(re.split(" +", line, maxsplit=1) for line in out.replace("file size", "file-size").splitlines())
    assert shown == {
        "model": str(tiny),
        "n_vocab": "520", "n_ctx": "192", "n_embd": "48", "n_head": "4", "n_layer": "2",
        "parameters": "90,816", "file-size": f"{tiny.stat().st_size:,} bytes", "type": "float32",
        "vocabulary": "520 tokens",
    }  # fmt: skip


def test_info_of_a_model_without_a_vocabulary(run, fixtures, tmp_path):
    assert run("convert", fixtures / "finetuned", "-o", tmp_path / "model.npz")[0] == 0
    assert "none" in run("info", tmp_path / "model.npz")[1]


def test_models_lists_what_is_bundled_installed_and_downloadable(run, tiny, tmp_path):
    for name in ("124M.npz", "my model.npz", "notes.txt"):
        (tmp_path / name).write_bytes(tiny.read_bytes())
    (tmp_path / "folder.npz").mkdir()
    status, out, err = run("models", "--models-dir", tmp_path)
    assert (status, err) == (0, "")
    bundled = round(BUNDLED_FILE.stat().st_size / 1e6)
    assert out.splitlines() == [
        f"storyteller {bundled:>7} MB  comes with npgpt2",
        f"124M              0 MB  {tmp_path / '124M.npz'}",
        f"my model          0 MB  {tmp_path / 'my model.npz'}",
        f"355M          1,419 MB  npgpt2 download 355M --models-dir {tmp_path}",
        f"774M          3,096 MB  npgpt2 download 774M --models-dir {tmp_path}",
        f"1558M         6,230 MB  npgpt2 download 1558M --models-dir {tmp_path}",
    ]


def test_models_without_a_models_folder_are_the_bundled_one_and_what_can_be_downloaded(run, tmp_path):
    out = run("models", "--models-dir", tmp_path / "none")[1]
    assert [line.split()[0] for line in out.splitlines()] == ["storyteller", "124M", "355M", "774M", "1558M"]


@pytest.mark.usefixtures("homeless")
def test_models_of_a_user_without_a_home_are_the_bundled_one_and_what_can_be_downloaded(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("models")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["storyteller", "124M", "355M", "774M", "1558M"]


@pytest.mark.parametrize("command", [["generate", "Once"], ["encode", "Once"], ["decode", "1"], ["info"]])
def test_without_a_model_the_bundled_one_is_used(run, command):
    assert run(*command) == run(*command, *(["storyteller"] if command == ["info"] else ["-m", "storyteller"]))
    assert run(*command)[0] == 0


@pytest.mark.parametrize("command", [["unconditional", "--nsamples", "1"], ["interactive"]])
def test_the_scripts_use_the_bundled_model_too(run, command):
    options = ["--length", "3", "--seed", "1"]
    assert run(*command, *options, stdin=b"Once") == run(*command, *options, "-m", "storyteller", stdin=b"Once")
    assert run(*command, *options, stdin=b"Once")[0] == 0


def test_version(run):
    assert run("--version") == (0, f"npgpt2 {npgpt2.__version__}\n", "")


def test_convert_warns_of_a_missing_vocabulary(run, fixtures, tmp_path):
    status, out, err = run("convert", fixtures / "finetuned", "-o", tmp_path / "model.npz")
    assert status == 0
    assert out.startswith(f"{tmp_path / 'model.npz'}: ")
    assert "warning" in err
    assert "--vocab DIR" in err
    assert failed(run("generate", "A", "-m", tmp_path / "model.npz"), 1, "has no vocabulary", "--vocab DIR")


def test_convert_writes_half_the_size_if_told_to(run, fixtures, tiny, tmp_path):
    assert run("convert", fixtures / "tiny", "-o", tmp_path / "half.npz", "--dtype", "float16")[0] == 0
    assert (tmp_path / "half.npz").stat().st_size < 0.6 * tiny.stat().st_size
    assert re.search("type +float16", run("info", tmp_path / "half.npz")[1])
    prompt = ["A language model", "--length", "20"]
    assert run("generate", *prompt, "-m", tmp_path / "half.npz") == run("generate", *prompt, "-m", "MODEL")
    assert failed(run("convert", fixtures / "tiny", "--dtype", "int4"), 2, "'int4'")


def test_convert_takes_a_vocabulary_from_elsewhere(run, fixtures, tmp_path):
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).write_bytes((fixtures / "hf" / name).read_bytes())
    assert run("convert", tmp_path / "hf", "--vocab", fixtures / "tiny")[::2] == (0, "")
    assert run("generate", "A", "-m", tmp_path / "hf.npz", "--length", "2")[0] == 0


@pytest.mark.parametrize("tool", ["convert_checkpoint.py", "download_model.py"])
def test_the_tools_run_without_installing(tool, fixtures, tmp_path):
    script = fixtures.parent.parent / "tools" / tool
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"npgpt2 {tool.split('_')[0]}" in done.stdout


@pytest.fixture
def served(fixtures, monkeypatch):
    """Pretend that OpenAI's server holds the small model under every name."""

    def fetch_checkpoint(name, folder, base_url):
        folder.mkdir(parents=True)
        for file in (fixtures / "tiny").iterdir():
            if file.name != "expected.npz":
                (folder / file.name).write_bytes(file.read_bytes())
        fetched.append((name, base_url))

    fetched = []
    monkeypatch.setattr("npgpt2.convert.fetch_checkpoint", fetch_checkpoint)
    return fetched


def test_download_converts_and_removes_the_checkpoint(run, served, tmp_path):
    status, out, err = run("download", "117M", "--models-dir", tmp_path)
    assert (status, err) == (0, "")
    assert f"{tmp_path / '124M.npz'}: ready" in out
    assert os.listdir(tmp_path) == ["124M.npz"]
    assert served[0][0] == "124M"
    assert run("generate", "A language", "-m", "124M", "--models-dir", tmp_path, "--length", "1")[1] == " model\n"
    assert run("download", "124M", "--models-dir", tmp_path)[1] == f"{tmp_path / '124M.npz'} is already there\n"
    assert len(served) == 1


def test_download_leaves_a_checkpoint_alone_that_it_did_not_fetch(run, served, fixtures, tmp_path):
    (tmp_path / "124M").mkdir()
    (tmp_path / "124M" / "model.ckpt.index").write_bytes(b"precious")
    result = run("download", "124M", "--models-dir", tmp_path)
    assert failed(result, 1, f"npgpt2 convert {tmp_path / '124M'}")
    assert (tmp_path / "124M" / "model.ckpt.index").read_bytes() == b"precious"
    assert served == []


def test_download_keeps_the_checkpoint_if_told_to(run, served, tmp_path):
    arguments = ["--models-dir", tmp_path, "--keep-checkpoint", "--base-url", "http://localhost:1/models"]
    assert run("download", "355M", *arguments)[0] == 0
    assert served == [("355M", "http://localhost:1/models")]
    assert (tmp_path / "355M" / "model.ckpt.index").is_file()
    assert (tmp_path / "355M.npz").is_file()


# ---- Wrong arguments: one line, status 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "--temperature", "nan"], "temperature is nan"),
        (["generate", "--temperature", "warm"], "'warm'"),
        (["generate", "--top-p", "0"], "top_p is 0.0"),
        (["generate", "--top-p", "1.5"], "top_p is 1.5"),
        (["generate", "--min-p", "2"], "min_p is 2.0, where a number from 0 to 1 is expected (0 keeps all)"),
        (["unconditional", "--typical-p", "0"], "typical_p is 0.0"),
        (["next", "A", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["interactive", "--presence-penalty", "3"], "presence_penalty is 3.0"),
        (["generate", "--frequency-penalty", "-3"], "frequency_penalty is -3.0"),
        (["generate", "--no-repeat-ngram-size", "-1"], "'-1' is not a whole number of at least 0"),
        (["generate", "--min-tokens", "x"], "'x' is not a whole number of at least 0"),
        (["generate", "--logit-bias", "five"], "'five' is not ID=BIAS, as in 50256=-100"),
        (["generate", "--logit-bias", "5=x"], "'5=x' is not ID=BIAS"),
        (["generate", "--logit-bias", "5=200"], "logit_bias has 200.0 for token 5"),
        (["generate", "--top-k", "-1"], "'-1' is not a whole number of at least 0"),
        (["generate", "--length", "0"], "'0' is not a whole number of at least 1"),
        (["generate", "--length", "many"], "'many' is not a whole number"),
        (["generate", "--seed", "-5"], "'-5' is not"),
        (["generate", "--batch-size", "0"], "'0' is not"),
        (["generate", "--stop", ""], "--stop"),
        (["generate", "A", "--file", "x"], "a prompt or --file, not both"),
        (["inspect", "A", "--file", "x"], "a prompt or --file, not both"),
        (["generate", "A", "B"], "B"),
        (["generate", "A", "--nsamples", "0", "--output", "x"], "--output would never be complete"),
        (["generate", "--unknown"], "--unknown"),
        (["generate", "--temp", "1"], "--temp"),
        (["encode", "a", "b"], "one TEXT"),
        (["encode", "a", "--file", "b"], "one TEXT"),
        (["encode", "-o", "x.npz"], "the files"),
        (["convert"], "SRC"),
        (["convert", "a", "-o", "b.zip"], "b.zip doesn't end in .npz"),
        (["download", "125M"], "'125M'"),
        (["download", "124M", "--base-url", "ftp://x"], "'ftp://x'"),
        (["dance"], "'dance'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(run, arguments, message):
    assert failed(run(*arguments), 2, message, "--help")


# ---- What goes wrong otherwise: one line, status 1


def test_an_unknown_model_says_where_it_was_looked_for_and_how_to_get_it(run, tmp_path):
    result = run("generate", "A", "-m", "124M", "--models-dir", tmp_path)
    assert failed(result, 1, str(tmp_path / "124M.npz"), "npgpt2 download 124M")


def test_text_that_is_not_utf8_is_refused_with_the_byte(run, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    assert failed(run("generate", "--file", tmp_path / "prompt.txt", "-m", "MODEL"), 1, "not UTF-8 at byte 3 (0xe9)")
    assert failed(run("generate", "-m", "MODEL", stdin=b"\xff"), 1, "standard input: not UTF-8 at byte 0 (0xff)")
    assert failed(run("generate", "caf\udce9", "-m", "MODEL"), 1, "argument", "UTF-8")


def test_interactive_input_that_is_not_utf8_is_refused(run):
    status, _, err = run("interactive", "-m", "MODEL", stdin=b"caf\xe9\n")
    assert status == 1
    assert "standard input: not UTF-8 at byte 3" in err


@pytest.mark.skipif(os.name == "nt", reason="names of files are Unicode on Windows")
def test_names_of_files_that_are_not_utf8_are_shown_all_the_same(tiny, tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.npz"
    process = spawn("info", os.fsdecode(name))
    err = process.communicate(timeout=60)[1]
    assert (process.returncode, err.count(b"\n")) == (1, 1)
    assert b"udcff.npz: no such file" in err


def test_a_missing_prompt_file_is_named(run, tmp_path):
    assert failed(run("generate", "--file", tmp_path / "no.txt", "-m", "MODEL"), 1, "no.txt: No such file")


def test_a_damaged_model_is_named_before_anything_is_printed(run, tiny, tmp_path):
    data = bytearray(tiny.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model.npz").write_bytes(data)
    assert failed(run("generate", "A", "-m", tmp_path / "model.npz"), 1, "model.npz", "damaged")
    (tmp_path / "model.npz").write_bytes(data[:1000])
    assert failed(run("generate", "A", "-m", tmp_path / "model.npz"), 1, "model.npz", "cut short")


def test_an_output_folder_that_is_missing_is_named(run, tmp_path):
    assert failed(run("generate", "A", "-m", "MODEL", "--output", tmp_path / "no" / "x.txt"), 1, "no such folder")
    assert failed(run("generate", "A", "-m", "MODEL", "--output", tmp_path), 1, "is a folder")


@pytest.mark.skipif(
    os.name == "nt" or os.getuid() == 0, reason="needs a system, and a user, that permissions hold back"
)
def test_a_folder_without_write_permission_is_named(run, fixtures, tmp_path):
    tmp_path.chmod(0o500)
    assert failed(run("convert", fixtures / "tiny", "-o", tmp_path / "x.npz"), 1, "x.npz: Permission denied")


def test_running_out_of_memory_is_reported_in_one_line(run, monkeypatch):
    def exhausted(*args):
        raise MemoryError

    monkeypatch.setattr(Engine, "step", exhausted)
    assert failed(run("generate", "A", "-m", "MODEL"), 1, "not enough memory")


# ---- Processes: pipes, signals, encodings


def test_python_m_npgpt2_is_the_command(tiny):
    process = spawn("generate", "A language", "-m", tiny, "--length", "1")
    assert process.communicate(timeout=60) == (f" model{os.linesep}".encode(), b"")
    assert process.returncode == 0


def test_pipes_are_utf8_whatever_the_locale(tiny):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
    ids = spawn("encode", "-m", tiny, stdin=subprocess.PIPE, env=environment).communicate("東京 é".encode())[0]
    text, errors = spawn("decode", "-m", tiny, stdin=subprocess.PIPE, env=environment).communicate(ids)
    assert text.decode("utf-8").rstrip("\r\n") == "東京 é"
    assert errors == b""


def test_a_closed_pipe_ends_the_command_quietly(tiny):
    process = spawn("unconditional", "-m", tiny, "--length", "5")
    assert process.stdout.readline().endswith(b"SAMPLE 1 " + b"=" * 40 + os.linesep.encode())
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=20) == 0
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/oom_score_adj"), reason="needs a file that refuses what is written")
def test_only_a_closed_pipe_ends_quietly(tiny):
    with open("/proc/self/oom_score_adj", "wb") as refusing:
        process = spawn("info", tiny, stdout=refusing)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert b"Invalid argument" in err


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("command", ["generate", "interactive"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_streams_that_are_closed_are_empty(tiny, command, closed):
    script = f'exec "$@" {closed}'
    words = [sys.executable, "-m", "npgpt2", command, "-m", str(tiny), "--length", "1"]
    done = subprocess.run(
        ["sh", "-c", script, "sh", *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_ends_at_once_with_status_130_and_keeps_what_was_printed(tiny):
    process = spawn("unconditional", "-m", tiny, "--seed", "1")
    first = process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert first.startswith(b"=====")
    assert len(out) > 20
    assert err == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_reported(tiny):
    with open("/dev/full", "wb") as full:
        process = spawn("generate", "A language", "-m", tiny, stdout=full)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert err.count(b"\n") == 1
    assert b"No space left on device" in err


@pytest.mark.skipif(os.name == "nt", reason="needs pseudo-terminals")
def test_a_progress_bar_shows_on_a_terminal_where_nothing_streams(tiny):
    import fcntl
    import pty
    import select
    import struct
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # tqdm shows nothing at width 0
    process = spawn("generate", "A", "-m", tiny, "--nsamples", "4", "--batch-size", "4", stderr=terminal)
    out = process.communicate(timeout=20)[0]
    shown = os.read(controller, 100_000) if select.select([controller], [], [], 5)[0] else b""
    os.close(terminal)
    os.close(controller)
    assert b"generate" in shown
    assert b"tokens/s" in shown
    assert out.count(b" SAMPLE ") == 4


def test_text_appears_as_it_is_generated(run, monkeypatch):
    written = []
    monkeypatch.setattr("npgpt2.cli.common.write_stdout", written.append)
    run("generate", "A language", "-m", "MODEL", "--length", "6")
    assert len(written) > 5


def test_every_command_has_a_help_text():
    commands = next(action for action in build_parser()._actions if action.dest == "command")
    for name, parser in commands.choices.items():
        assert callable(parser.get_default("run"))
        help = parser.format_help()
        assert f"npgpt2 {name}" in help
        assert all(action.help for action in parser._actions)
