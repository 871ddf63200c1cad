"""npgpt2 against Hugging Face's transformers, under PyTorch: random models of many shapes in every form in which
transformers saves them, the logits and tokens that both compute, and the distributions that both sample from.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from builders import random_tokens
from distributions import probabilities
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import npgpt2
from npgpt2.convert import convert
from npgpt2.convert.huggingface import to_checkpoint_name
from npgpt2.engine import Engine, Slots, Span
from npgpt2.formulas import layer_norm
from npgpt2.model import forward
from npgpt2.sampling import Sampling
from npgpt2.study.score import surprises

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

END = "<|endoftext|>"
# Both compute in float32, and differ by up to 1.4e-5; a constant of GELU that is off by 0.2 % already makes 1.4e-4.
TOLERANCE = 5e-5


def assert_close(ours, theirs):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < TOLERANCE


def make_config(n_vocab, n_ctx, n_embd, n_head, n_layer):
    no_ends = {"bos_token_id": None, "eos_token_id": None}  # so that generation goes on, whatever the tokens
    sizes = {"vocab_size": n_vocab, "n_positions": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    return transformers.GPT2Config(**sizes, **no_ends)


def make_model(*sizes):
    """A model whose every parameter is random: as made, biases are zero and gains one, which hides mistakes."""
    model = transformers.GPT2LMHeadModel(make_config(*sizes)).eval()
    rng = np.random.default_rng(sum(sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = ".ln_" in name and name.endswith("weight")
            parameter.copy_(torch.from_numpy(rng.normal(float(gain), 0.2, parameter.shape)))
    return model


def converted(folder):
    path = convert(folder, folder.with_suffix(".npz")).path
    return npgpt2.load(path)


def logits_of(model, tokens):
    """transformers' logits. tokens: (T,) or (B, T) -> (T, V) or (B, T, V)"""
    ids = torch.from_numpy(np.atleast_2d(tokens))
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    return logits.reshape(*np.shape(tokens), -1)


SHAPES = {
    "smallest": (2, 2, 1, 1, 1),
    "one head": (97, 8, 4, 1, 1),
    "odd D": (211, 16, 15, 3, 2),
    "as many heads as C": (53, 33, 6, 6, 3),
    "four layers": (101, 64, 28, 4, 4),
    "wide": (31, 20, 128, 2, 1),
    "past a block of queries": (59, 300, 10, 2, 2),
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def pair(request, tmp_path_factory):
    """A random model, in transformers and in npgpt2."""
    folder = tmp_path_factory.mktemp("model") / "saved"
    theirs = make_model(*request.param)
    theirs.save_pretrained(folder)
    return SimpleNamespace(theirs=theirs, ours=converted(folder))


# ---- Scores


def test_bits_are_the_loss_that_transformers_computes_on_the_same_windows(pair):
    model, n_ctx = pair.ours, pair.ours.hparams.n_ctx
    stride = max(1, n_ctx // 2)
    tokens = random_tokens(model, 3 * n_ctx + 2).tolist()
    found = [bits * np.log(2) for _, bits in surprises(model.matrices, model.hparams, tokens)]
    theirs, counted = [], 0
    for start in range(0, len(tokens) - 1, stride):
        window = torch.tensor([tokens[start : start + n_ctx + 1]])
        with torch.no_grad():
            logits = pair.theirs(window[:, :-1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        theirs += loss[counted - start :].tolist()
        counted = start + len(loss)
        if counted == len(tokens) - 1:
            break
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4)


# ---- The bundled model


def test_the_bundled_model_is_a_gpt2_to_transformers_too():
    """Its logits at all positions of a full window, and of the float16 numbers that its file holds."""
    ours = npgpt2.load()
    theirs = make_model(*tuple(ours.hparams))
    tensors = {}
    for name in theirs.state_dict():
        if name != "lm_head.weight":
            tensors[name] = torch.from_numpy(np.array(ours.weights[to_checkpoint_name(name)], order="C"))
    assert len(tensors) == len(ours.weights)
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    tokens = random_tokens(ours, ours.hparams.n_ctx)
    assert_close(ours.logits(tokens), logits_of(theirs, tokens))


# ---- The forward pass


def test_hyperparameters_are_those_of_the_config(pair):
    config = pair.theirs.config
    theirs = (config.vocab_size, config.n_positions, config.n_embd, config.n_head, config.n_layer)
    assert tuple(pair.ours.hparams) == theirs


def test_logits_of_a_sequence_are_those_of_transformers(pair):
    for length in {1, pair.ours.hparams.n_ctx // 2, pair.ours.hparams.n_ctx}:
        tokens = random_tokens(pair.ours, length)
        assert_close(pair.ours.logits(tokens), logits_of(pair.theirs, tokens))


def test_the_formulas_alone_give_the_logits_of_transformers(pair):
    tokens = random_tokens(pair.ours, pair.ours.hparams.n_ctx)
    assert_close(forward(pair.ours.weights, pair.ours.hparams, tokens), logits_of(pair.theirs, tokens))


def test_logits_of_a_batch_are_those_of_transformers(pair):
    tokens = random_tokens(pair.ours, 3, pair.ours.hparams.n_ctx)
    assert_close(pair.ours.logits(tokens), logits_of(pair.theirs, tokens))


def test_logits_from_token_by_token_decoding_are_those_of_transformers(pair):
    model, tokens = pair.ours, random_tokens(pair.ours, pair.ours.hparams.n_ctx)
    slots, past = Slots(model.hparams, 1), None
    whole = logits_of(pair.theirs, tokens)
    for position, token in enumerate(tokens):
        ours = slots.read(model.matrices, [token], [Span(0, position, position + 1)], [0])
        with torch.no_grad():
            said = pair.theirs(torch.tensor([[token]]), past_key_values=past, use_cache=True)
        past = said.past_key_values
        assert_close(ours, said.logits[0])
        assert_close(ours[0], whole[position])


def test_logits_of_ragged_batches_are_those_of_each_sequence_alone(pair):
    """Sequences of different lengths are read together, each in pieces of any size, until all are at n_ctx."""
    model, n_ctx = pair.ours, pair.ours.hparams.n_ctx
    rng = np.random.default_rng(1)
    rows = random_tokens(model, 4, n_ctx)
    whole = logits_of(pair.theirs, rows)
    slots, starts = Slots(model.hparams, 4), [0] * 4
    while unfinished := [i for i in range(4) if starts[i] < n_ctx]:
        spans = [
            Span(i, starts[i], int(rng.integers(starts[i] + 1, min(n_ctx, starts[i] + rng.choice([1, 5, n_ctx])) + 1)))
            for i in unfinished
        ]
        spans.sort(key=lambda span: span.stop - span.start > 1)
        tokens = np.concatenate([rows[i, start:stop] for i, start, stop in spans])
        read = slots.read(model.matrices, tokens, spans, range(len(tokens)))
        assert_close(read, np.concatenate([whole[i, start:stop] for i, start, stop in spans]))
        for i, _, stop in spans:
            starts[i] = stop


# ---- What happens inside


@pytest.fixture
def eager(pair):
    """transformers' model in the one way of computing attention that shows its weights."""
    usual = pair.theirs.config._attn_implementation
    pair.theirs.set_attn_implementation("eager")
    yield pair.theirs
    pair.theirs.set_attn_implementation(usual)


def test_attention_residual_streams_and_lens_are_those_of_transformers(pair, eager):
    """transformers counts the embedding as a first hidden state, and shows the last one behind the final layer norm."""
    weights, last = pair.ours.weights, pair.ours.hparams.n_layer - 1
    for length in {1, pair.ours.hparams.n_ctx}:
        tokens = random_tokens(pair.ours, length)
        trace = pair.ours.trace(tokens, attention=True, residual=True)
        with torch.no_grad():
            said = eager(torch.from_numpy(tokens[None]), output_attentions=True, output_hidden_states=True)
        assert_close(trace.attention, torch.cat(said.attentions))
        for layer, hidden in enumerate(said.hidden_states[1:-1]):
            assert_close(trace.residual[layer], hidden[0])
            with torch.no_grad():
                assert_close(trace.lens(layer), eager.lm_head(eager.transformer.ln_f(hidden[0])))
        final = layer_norm(trace.residual[last], weights["ln_f/g"], weights["ln_f/b"])
        assert_close(final, said.hidden_states[-1][0])


# ---- Generation


def greedy_tokens_of(model, tokens, **settings):
    """transformers' greedy continuation, prompt included. tokens: (B, T) -> (B, length)"""
    config = transformers.GenerationConfig(do_sample=False, pad_token_id=0, **settings)
    ids = torch.from_numpy(tokens)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).numpy()


def test_greedy_tokens_are_those_of_transformers(pair):
    n_ctx = pair.ours.hparams.n_ctx
    tokens = random_tokens(pair.ours, 3, max(1, n_ctx // 4))
    whole = greedy_tokens_of(pair.theirs, tokens, max_length=n_ctx)
    assert whole.shape == (3, n_ctx)
    for row in range(3):
        new = pair.ours.generate_tokens(tokens[row], length=n_ctx - tokens.shape[1])
        assert new.tolist() == whole[row, tokens.shape[1] :].tolist()
    batch = pair.ours.generate_tokens(tokens, length=n_ctx - tokens.shape[1])
    assert batch.tolist() == whole[:, tokens.shape[1] :].tolist()


def test_whatever_the_schedule_greedy_tokens_are_those_of_transformers(pair):
    """Requests of any length come while others run, in slots that are fewer than they are, in chunks of any size."""
    hparams, found = pair.ours.hparams, {}

    def alone(prompt, length):
        if (prompt, length) not in found:
            whole = greedy_tokens_of(pair.theirs, np.array([prompt]), max_length=len(prompt) + length)
            found[prompt, length] = whole[0, len(prompt) :].tolist()
        return found[prompt, length]

    @settings(max_examples=40, derandomize=True, deadline=None)
    @given(data=st.data(), slots=st.integers(1, 3), chunk=st.integers(1, hparams.n_ctx))
    def run(data, slots, chunk):
        engine, requests = Engine(pair.ours, slots, chunk, text=False), []
        for _ in range(data.draw(st.integers(1, 5))):
            size = data.draw(st.integers(1, max(1, hparams.n_ctx - 1)))
            prompt = tuple(random_tokens(pair.ours, hparams.n_ctx)[:size].tolist())
            requests.append(engine.submit(prompt, length=data.draw(st.integers(1, max(1, hparams.n_ctx - size)))))
            for _ in range(data.draw(st.integers(0, 4))):
                engine.step()
        while engine.busy:
            engine.step()
        for request in requests:
            assert request.tokens == alone(tuple(request.prompt), request.limits.length)

    run()


@pytest.fixture(scope="module")
def trained(model):
    """The fixture that TensorFlow trained, which has text to say and an end to it, in transformers."""
    theirs = transformers.GPT2LMHeadModel(make_config(*tuple(model.hparams))).eval()
    with torch.no_grad():
        for name, parameter in theirs.transformer.named_parameters():
            parameter.copy_(torch.tensor(model.weights[to_checkpoint_name(name)]))
    return theirs


@pytest.mark.parametrize("prompt", ["A language model", "Nobody told the model", "There is always", "So", END])
def test_greedy_text_ends_where_it_does_in_transformers(model, trained, prompt):
    n_ctx, end = model.hparams.n_ctx, model.tokenizer.end_of_text
    tokens = np.array(model.tokenizer.encode(prompt, allow_special=True))
    new = greedy_tokens_of(trained, tokens[None], max_length=n_ctx, eos_token_id=end)[0, len(tokens) :].tolist()
    assert new[-1] == end
    assert model.generate_tokens(tokens, length=len(new)).tolist() == new
    assert model.generate("" if prompt == END else prompt, length=n_ctx) == model.tokenizer.decode(new[:-1])


# ---- The forms in which models are saved


def save_plain(model, folder):
    model.save_pretrained(folder)


def save_sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def save_bfloat16(model, folder):
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(torch.float32)  # the values stay rounded


def save_float16(model, folder):
    model.to(torch.float16).save_pretrained(folder)
    model.to(torch.float32)


def save_without_prefix(model, folder):
    model.transformer.save_pretrained(folder)
    assert "h.0.ln_1.weight" in load_file(folder / "model.safetensors")


def save_as_old_versions_did(model, folder):
    """With the masks of attention, and without the prefix: the layout of the first uploads."""
    model.transformer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    n_ctx = model.config.n_positions
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, n_ctx, n_ctx))
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors")


def save_as_less_old_versions_did(model, folder):
    """With the masks of attention as bytes and truth values, and the head beside wte, from which it doesn't differ."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    n_ctx = model.config.n_positions
    for layer, dtype in enumerate([torch.uint8, torch.bool]):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, n_ctx, n_ctx)).to(dtype)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


SAVES = [
    save_plain,
    save_sharded,
    save_bfloat16,
    save_float16,
    save_without_prefix,
    save_as_old_versions_did,
    save_as_less_old_versions_did,
]


@pytest.mark.parametrize("save", SAVES, ids=lambda save: save.__name__.removeprefix("save_"))
def test_every_form_of_a_saved_model_gives_its_logits(tmp_path, save):
    model = make_model(89, 12, 18, 2, 2)
    save(model, tmp_path / "saved")
    ours = converted(tmp_path / "saved")
    tokens = random_tokens(ours, 2, 12)
    assert_close(ours.logits(tokens), logits_of(model, tokens))


@pytest.mark.parametrize("form", ["as saved", "merges as lines", "end of text added"])
def test_a_vocabulary_in_a_tokenizer_json_gives_the_tokens_of_transformers(tmp_path, vocabulary, form):
    """From version 5 on, transformers saves a tokenizer as `tokenizer.json` alone; older ones wrote pairs as lines."""
    ids = json.loads((vocabulary / "encoder.json").read_text(encoding="utf-8"))
    lines = (vocabulary / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    make_model(len(ids), 4, 2, 1, 1).save_pretrained(tmp_path / "saved")
    if form == "end of text added":
        assert ids.pop(END) == len(ids)
    theirs = transformers.GPT2Tokenizer(vocab=ids, merges=[tuple(line.split(" ")) for line in lines])
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "merges.txt").exists()
    if form == "merges as lines":
        path = tmp_path / "saved" / "tokenizer.json"
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved["model"]["merges"] = lines
        path.write_text(json.dumps(saved), encoding="utf-8")
        theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "saved")
    ours = converted(tmp_path / "saved").tokenizer
    assert len(ours) == len(theirs)
    assert ours.end_of_text == theirs.eos_token_id

    @settings(max_examples=300, derandomize=True, deadline=None)
    @given(text=st.text() | st.lists(st.sampled_from([" the", "It's", "  ", "\n", "é", "12", END])).map("".join))
    def compare(text):
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
        assert ours.encode(text, allow_special=True) == theirs.encode(text)

    compare()


# ---- Sampling


def warped(logits, temperature, top_k, top_p):
    """The probabilities that transformers samples from. logits: (V,) float64 -> (V,)"""
    scores = torch.from_numpy(logits)[None]
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 500, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_probabilities_are_those_of_transformers_warpers(temperature, top_k, top_p):
    # Both keep the likeliest tokens until they reach p. They add up from opposite ends, so that they can part where a
    # sum equals p but for rounding; with random logits, none comes near enough.
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(0, 3, 500)
        ours = probabilities(Sampling(temperature, top_k, top_p), logits)
        theirs = warped(logits, temperature, top_k, top_p)
        np.testing.assert_array_equal(ours > 0, theirs > 0)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("top_k", [1, 3, 7, 20, 50])
def test_tokens_as_likely_as_the_kth_are_kept_as_transformers_keeps_them(top_k):
    logits = np.random.default_rng(0).integers(0, 6, 50).astype(float)
    theirs = warped(logits, 0.8, top_k, 1.0)
    assert np.count_nonzero(theirs) >= top_k
    np.testing.assert_allclose(probabilities(Sampling(0.8, top_k), logits), theirs, rtol=1e-12)


@pytest.mark.parametrize("top_p", [0.15, 0.4, 0.77, 0.95])
@pytest.mark.parametrize("top_k", [0, 20])
def test_the_nucleus_among_ties_has_as_many_tokens_as_that_of_transformers(top_k, top_p):
    # Of tokens that are equally likely, either may keep others; how many it keeps is settled.
    logits = np.random.default_rng(1).integers(0, 6, 50).astype(float)
    ours, theirs = probabilities(Sampling(0.8, top_k, top_p), logits), warped(logits, 0.8, top_k, top_p)
    np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-12)


def test_logits_for_a_whole_vocabulary_are_sampled_as_in_transformers():
    logits = np.random.default_rng(2).normal(0, 3, 50257).astype(np.float32)
    ours = probabilities(Sampling(0.9, 40, 0.9), logits)
    np.testing.assert_allclose(ours, warped(logits.astype(float), 0.9, 40, 0.9), rtol=1e-12)
