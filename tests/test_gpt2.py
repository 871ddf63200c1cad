"""The library: generating tokens and text, windows that slide, samples, and what is refused."""

import numpy as np
import pytest
from builders import random_model

import npgpt2
from npgpt2.model import variable_shapes
from npgpt2.weights.writer import write


@pytest.fixture(scope="module")
def passage(fixtures):
    """What the small model knows by heart."""
    return (fixtures / "passage.txt").read_text("utf-8").rstrip("\n")


def test_the_text_that_the_model_was_trained_on_comes_back(model, passage):
    assert model.generate("", length=200) == passage
    assert model.generate(passage[:16], length=200) == passage[16:]


def test_generation_ends_at_end_of_text_unless_told_to_go_on(model, passage):
    ended = model.generate(passage[:-20], length=50)
    assert ended == passage[-20:]
    onwards = model.generate(passage[:-20], length=50, ignore_eot=True)
    assert onwards.startswith(passage[-20:] + "<|endoftext|>" + passage[:30])


def test_length_counts_tokens(model):
    for length in (1, 5, 17):
        text = model.generate("A language model", length=length)
        assert (
            len(model.tokenizer.encode("A language model" + text))
            == len(model.tokenizer.encode("A language model")) + length
        )


def test_pieces_join_to_the_text(model):
    settings = {"length": 60, "temperature": 1.5, "seed": 4}
    pieces = list(model.stream("So read", **settings))
    assert len(pieces) > 30
    assert all(pieces)
    assert "".join(pieces) == model.generate("So read", **settings)


def test_text_ends_before_a_stop_string(model, passage):
    assert model.generate("A language model", length=50, stop="small game") == " plays one "
    assert model.generate("A language model", length=50, stop=["guesses", " one"]) == " plays"
    assert model.generate("A language model", length=5, stop="never there") == model.generate(
        "A language model", length=5
    )


def test_generate_tokens_returns_the_new_tokens_alone(model, passage):
    tokens = model.tokenizer.encode(passage)
    generated = model.generate_tokens(tokens[:8], length=24)
    assert generated.dtype == np.int64
    assert generated.tolist() == tokens[8:32]


def test_generate_tokens_of_a_batch_gives_a_row_for_each(model):
    tokens = np.array([[1, 2, 3], [40, 50, 60]], np.int32)
    generated = model.generate_tokens(tokens, length=9)
    assert generated.shape == (2, 9)
    for row, alone in zip(generated, tokens, strict=True):
        np.testing.assert_array_equal(row, model.generate_tokens(alone, length=9))


def test_generate_tokens_goes_on_past_end_of_text(model, passage):
    tokens = model.tokenizer.encode(passage)
    generated = model.generate_tokens(tokens[-5:], length=8)
    assert generated.shape == (8,)
    assert model.tokenizer.end_of_text in model.generate_tokens(tokens[:-5], length=8)


# ---- Windows


def greedy_by_definition(model, tokens, length):
    """Compute every token from scratch, with the window that the documentation describes."""
    n_ctx = model.hparams.n_ctx
    tokens, start = list(tokens), 0
    for _ in range(length):
        if len(tokens) - start > n_ctx:
            start = len(tokens) - n_ctx // 2
        tokens.append(int(model.logits(tokens[start:])[-1].argmax()))
    return tokens[-length:]


def test_sliding_window_continues_past_n_ctx(model):
    n_ctx = model.hparams.n_ctx
    prompt = np.random.default_rng(5).integers(520, size=30)
    generated = model.generate_tokens(prompt, length=2 * n_ctx)
    assert generated.tolist() == greedy_by_definition(model, prompt, 2 * n_ctx)


@pytest.mark.parametrize("extra", [-1, 0, 1, 500])
def test_prompts_about_and_past_n_ctx_are_read_from_their_end(model, extra):
    prompt = np.random.default_rng(6).integers(520, size=model.hparams.n_ctx + extra)
    assert model.generate_tokens(prompt, length=3).tolist() == greedy_by_definition(model, prompt, 3)


def test_sequences_of_a_batch_slide_each_by_themselves(model):
    """Prompts of one length in a batch, and the same prompts alone, past the window's end."""
    prompts = np.random.default_rng(7).integers(520, size=(3, 180))
    together = model.generate_tokens(prompts, length=40)
    for prompt, row in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(row, model.generate_tokens(prompt, length=40))


def test_a_window_of_a_single_position_works():
    hparams = npgpt2.HParams(n_vocab=7, n_ctx=1, n_embd=4, n_head=2, n_layer=1)
    assert random_model(hparams).generate_tokens([3], length=5).shape == (5,)


def test_prompts_are_read_once_and_then_one_token_at_a_time(model, passes):
    model.generate_tokens([[1, 2, 3], [4, 5, 6]], length=4)
    assert passes == [[3, 3], [1, 1], [1, 1], [1, 1]]


# ---- Samples


def test_a_seed_repeats_and_other_seeds_differ(model):
    texts = [model.generate("The", length=30, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_seed_texts_differ(model):
    assert len({model.generate("The", length=30, temperature=3.0) for _ in range(4)}) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 20])
def test_batch_size_does_not_change_what_is_drawn(model, batch_size):
    settings = {"length": 25, "temperature": 4.0, "top_k": 50, "top_p": 0.98, "seed": 11}
    alone = ["".join(model.stream("It has", sample=i, **settings)) for i in range(7)]
    assert list(model.samples("It has", nsamples=7, batch_size=batch_size, **settings)) == alone
    assert len(set(alone)) > 3


# ---- What is read


def test_several_samples_read_their_prompt_once(model, passes):
    prompt = "A language model plays one small game: it reads some words"
    n = len(model.tokenizer.encode(prompt))
    settings = {"length": 3, "temperature": 1.0, "seed": 1, "ignore_eot": True}
    for batch_size in (1, 2, 4):
        passes.clear()
        assert len(list(model.samples(prompt, 4, batch_size, **settings))) == 4
        assert passes[0] == [n]
        assert max(map(max, passes[1:])) == 1


def test_long_prompts_of_several_samples_are_read_once_from_their_end(model, passes):
    n_ctx = model.hparams.n_ctx
    prompt = "A language model plays one small game. " * 60
    whole = model.generate(prompt, length=3, temperature=1.0, seed=1)
    passes.clear()
    texts = list(model.samples(prompt, 3, length=3, temperature=1.0, seed=1, guess=False))
    assert passes[0] == [n_ctx // 2]
    assert max(sum(new) for new in passes[1:]) == 1
    assert texts[0] == whole


def test_a_sample_that_ends_makes_room_for_the_next(model, passes):
    settings = {"length": 60, "temperature": 2.0, "seed": 3, "stop": ["\n", "."]}
    texts = list(model.samples("So", nsamples=12, batch_size=4, **settings))
    taken = len(passes)
    lengths = [len(model.tokenizer.encode(text)) for text in texts]
    assert len(set(lengths)) > 3
    assert texts == ["".join(model.stream("So", sample=i, **settings)) for i in range(12)]
    assert taken < sum(max(lengths[i : i + 4]) for i in (0, 4, 8)), "the slowest of four doesn't hold the others"


# ---- Several prompts


def test_a_list_of_prompts_gives_a_list_of_texts(model):
    prompts = ["A language", "So read", "", "A language model plays one small game:", "It"]
    settings = {"length": 20, "temperature": 1.5, "seed": 3}
    texts = model.generate(prompts, **settings)
    assert texts == ["".join(model.stream(prompt, sample=i, **settings)) for i, prompt in enumerate(prompts)]
    assert model.generate([], **settings) == []
    assert model.generate(prompts[:1], **settings) == texts[:1]
    assert model.generate(prompts * 5, length=3) == model.generate(prompts, length=3) * 5


def test_a_prompt_can_be_token_ids(model):
    tokens = model.tokenizer.encode("A language model")
    for prompt in (tokens, tuple(tokens), np.array(tokens)):
        assert model.generate(prompt, length=4) == " plays one small game"
        assert "".join(model.stream(prompt, length=4)) == " plays one small game"
        assert list(model.samples(prompt, 2, 2, length=4)) == [" plays one small game"] * 2
    assert model.generate([tokens, tokens[:2]], length=4) == model.generate(
        ["A language model", "A language"], length=4
    )
    with pytest.raises(ValueError, match="token 520 is not in the vocabulary"):
        model.generate([1, 520])


def test_a_stream_knows_why_it_ended(model, passage):
    stream = model.stream(passage[:-20], length=50)
    assert stream.request.finish_reason is None
    assert "".join(stream) == passage[-20:]
    assert stream.request.finish_reason == "end"
    assert stream.request.text == passage[-20:]


def test_next_logits_are_those_after_the_prompt(model):
    for prompt in ("", "A language model", "A language model plays one small game. " * 60):
        tokens = model.prompt_tokens(prompt)
        seen = tokens if len(tokens) <= 192 else tokens[-96:]
        np.testing.assert_allclose(model.next_logits(prompt), model.logits(seen)[-1], atol=1e-4)


# ---- Threads


def test_a_model_can_be_given_a_number_of_threads(tiny, model):
    tokens = list(range(60))
    for threads in (1, 2, 5):
        limited = npgpt2.load(tiny, threads=threads)
        np.testing.assert_allclose(limited.logits(tokens), model.logits(tokens), atol=1e-4)
        assert limited.generate("A language model", length=4) == " plays one small game"
    with pytest.raises(ValueError, match="threads is 0, where a whole number of at least 1 is expected"):
        npgpt2.load(tiny, threads=0)


def test_samples_without_end_go_on(model):
    samples = model.samples("The", nsamples=0, batch_size=2, length=3, seed=5)
    first = [next(samples) for _ in range(5)]
    assert first == list(model.samples("The", nsamples=5, length=3, seed=5))


def test_samples_report_their_progress(model):
    steps = []
    list(model.samples("The", nsamples=3, batch_size=2, length=4, ignore_eot=True, progress=steps.append))
    assert sum(steps) == 12
    assert max(steps) == 2


# ---- What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"length": -3}, "length is -3"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.stream("A", **settings)
    with pytest.raises(ValueError, match=message):
        model.generate_tokens([1], **settings)


def test_an_empty_stop_string_is_refused(model):
    with pytest.raises(ValueError, match="stop string is empty"):
        model.stream("A", stop=["", "b"])


@pytest.mark.parametrize(("name", "value"), [("nsamples", -1), ("batch_size", 0)])
def test_sample_counts_out_of_range_are_refused(model, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        model.samples("A", **{name: value})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "shape"),
        ([[]], "shape"),
        ([[[1]]], "shape"),
        ([0, 520], "token 520 is not in the vocabulary, which goes from 0 to 519"),
        ([-1], "token -1 is not"),
    ],
)
def test_tokens_that_are_none_are_refused(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model.logits(tokens)
    with pytest.raises(ValueError, match=message):
        model.generate_tokens(tokens)


def test_more_tokens_than_n_ctx_have_no_logits(model):
    with pytest.raises(ValueError, match="193 tokens are more than the model's n_ctx of 192"):
        model.logits([1] * 193)


def test_logits_of_a_batch_are_those_of_its_rows(model):
    tokens = np.arange(12, dtype=np.uint8).reshape(3, 4)
    logits = model.logits(tokens)
    assert logits.shape == (3, 4, 520)
    assert logits.dtype == np.float32
    for row, expected in zip(tokens, logits, strict=True):
        np.testing.assert_allclose(model.logits(row), expected, atol=1e-4)


def test_a_model_without_a_vocabulary_says_so_where_text_is_needed(tmp_path):
    hparams = npgpt2.HParams(n_vocab=9, n_ctx=8, n_embd=4, n_head=2, n_layer=1)
    write(tmp_path / "random.npz", hparams, random_model(hparams).weights.items(), None)
    model = npgpt2.load(tmp_path / "random.npz")
    assert model.generate_tokens([1], length=3).shape == (3,)
    with pytest.raises(ValueError, match=r"random\.npz: has no vocabulary; convert it again with --vocab DIR"):
        model.generate("A")


def test_a_model_with_another_s_vocabulary_says_so(fixtures, tmp_path):
    hparams = npgpt2.HParams(n_vocab=9, n_ctx=8, n_embd=4, n_head=2, n_layer=1)
    texts = tuple((fixtures / "tiny" / name).read_bytes() for name in ("encoder.json", "vocab.bpe"))
    write(tmp_path / "model.npz", hparams, random_model(hparams).weights.items(), texts)
    with pytest.raises(ValueError, match="the vocabulary has 520 entries, but n_vocab is 9"):
        npgpt2.load(tmp_path / "model.npz").generate("A")


def test_without_end_of_text_a_prompt_is_needed(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "end_of_text", None)
    with pytest.raises(ValueError, match="a prompt is needed"):
        model.generate("")
    assert model.generate("A language", length=1) == " model"


# ---- Finding models


def test_models_are_found_by_name_alias_and_path(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NPGPT2_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for folder in ("home/.cache/npgpt2", "models", "named", "given"):
        (tmp_path / folder).mkdir(parents=True)
    found = []
    for folder, variable, given in (
        ("given", "named", "given"),
        ("named", "named", None),
        ("models", "", None),
        ("home/.cache/npgpt2", "", None),
    ):
        monkeypatch.setenv("NPGPT2_MODELS", variable and str(tmp_path / variable))
        if folder.startswith("home"):
            (tmp_path / "models").rmdir()
        target = tmp_path / folder / "124M.npz"
        target.write_bytes(tiny.read_bytes())
        for name in ("124M", "117M"):
            found.append(npgpt2.load(name, models_dir=given).weights.path.resolve() == target.resolve())
        target.unlink()
    assert found == [True] * 8
    assert npgpt2.load(str(tiny)).hparams == npgpt2.load(tiny).hparams


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("124M", r"there is no nowhere.124M\.npz; get it with: npgpt2 download 124M --models-dir nowhere"),
        ("345M", r"there is no nowhere.345M\.npz; get it with: npgpt2 download 345M --models-dir nowhere"),
        ("story", r"there is no nowhere.story\.npz; give a path to an \.npz file, or download one of 124M"),
        ("folder/", "is a folder; make a model file of it with: npgpt2 convert folder"),
        ("missing.npz", r"missing\.npz: no such file; npgpt2 download fetches 124M"),
        ("folder/model", r"folder.model: no such file"),
    ],
)
def test_models_that_are_not_there_say_where_they_were_looked_for_and_what_to_do(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises((FileNotFoundError, IsADirectoryError), match=message):
        npgpt2.load(name, models_dir="nowhere")


def test_the_models_folder_can_be_given_with_a_tilde_or_a_variable(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "124M.npz").write_bytes(tiny.read_bytes())
    assert npgpt2.load("124M", models_dir="~").hparams.n_vocab == 520
    assert npgpt2.load("124M", models_dir="$HOME").hparams.n_vocab == 520
    monkeypatch.setenv("NPGPT2_MODELS", "~/")
    assert npgpt2.load("124M").hparams.n_vocab == 520


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="--models-dir"):
        npgpt2.load("124M")


def test_a_checkpoint_in_the_models_folder_that_was_not_converted_is_pointed_out(tmp_path):
    (tmp_path / "355M").mkdir()
    with pytest.raises(FileNotFoundError, match=r"npgpt2 convert .*355M"):
        npgpt2.load("355M", models_dir=tmp_path)


@pytest.mark.parametrize("file", ["hf/model.safetensors", "hf/pytorch_model.bin", "hf/ckpt.pt", "hf/model-40.index"])
def test_a_folder_here_that_can_be_converted_is_pointed_out(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"give a path to an \.npz file"):
        npgpt2.load("hf", models_dir="nowhere")
    (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=r"make a model file of the folder here with: npgpt2 convert hf$"):
        npgpt2.load("hf", models_dir="nowhere")
    (tmp_path / "hf.npz").touch()
    with pytest.raises(FileNotFoundError, match=r"give the path of the one here: hf\.npz$"):
        npgpt2.load("hf", models_dir="nowhere")


def test_weights_that_overflow_are_reported_and_not_sampled_from():
    hparams = npgpt2.HParams(n_vocab=9, n_ctx=8, n_embd=4, n_head=2, n_layer=1)
    arrays = {name: np.full(shape, 1e30, np.float32) for name, shape in variable_shapes(hparams).items()}
    with pytest.raises(ValueError, match="its weights are too large or broken"):
        npgpt2.GPT2(arrays, hparams).generate_tokens([1])
