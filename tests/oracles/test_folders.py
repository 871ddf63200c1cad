"""Folders as people have them: whatever transformers reads of one, npgpt2 reads too, or refuses it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import npgpt2
from npgpt2.convert import convert

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

END = "<|endoftext|>"
ADDED = [
    "<|pad|>",
    "<|startoftext|>",
    "</s>",
    "<pad>",
    "[SEP]",
    " two words",
    "é",
    "naïve",
    "Ġx",
    "ab",
    "abc",
    "<mask>",
]
WORDS = ["\n\n", " the", "It's", "  ", "\n", " ", "12", "a", "東", END, *ADDED]

added_tokens = st.fixed_dictionaries(
    {"content": st.sampled_from(ADDED)},
    optional={"special": st.booleans(), "lstrip": st.booleans(), "rstrip": st.booleans(), "normalized": st.booleans()},
)
objects = added_tokens.map(lambda token: token | {"__type": "AddedToken"})
folders = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(["saved", "saved", "legacy", "legacy with settings"]),
        "class": st.sampled_from(["GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", None]),
        "end_in_vocabulary": st.sampled_from([True, True, False]),
        "added": st.lists(added_tokens, max_size=4, unique_by=lambda token: token["content"]),
        "named": st.dictionaries(st.sampled_from(["pad_token", "bos_token", "eos_token"]), st.sampled_from(ADDED)),
        "more": st.fixed_dictionaries(
            {},
            optional={
                "additional_special_tokens": st.lists(st.sampled_from(ADDED) | objects, max_size=2),
                "extra_special_tokens": st.lists(st.sampled_from(ADDED), max_size=2)
                | st.dictionaries(st.sampled_from(["image_token", "x"]), st.sampled_from(ADDED), max_size=1),
                "image_token": st.sampled_from(ADDED),
                "mask_token": objects,
            },
        ),
        "more_in": st.sampled_from(["config", "map"]),
        "gap": st.sampled_from([0, 0, 0, 0, 3]),
        "prefix_space": st.sampled_from([None, None, False, True]),
        "bos": st.booleans(),
        "padding": st.sampled_from([0, 0, 1, 40]),
        "short": st.sampled_from([0, 0, 0, 0, 1]),
        "ends": st.sampled_from([None, None, "one", "list"]),
        "ends_in": st.sampled_from(["config", "generation"]),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "shard": st.sampled_from(["1GB", "60KB"]),
        "form": st.sampled_from(["safetensors", "bin", "bin before PyTorch 1.6"]),
        "prefix": st.sampled_from(["", "module.", "_orig_mod.module."]),
        "left_out": st.sampled_from([None, "lm_head.weight", "transformer.wte.weight"]),
    }
)
texts = st.lists(
    st.lists(st.sampled_from(WORDS), max_size=6).map("".join) | st.text(max_size=8), min_size=3, max_size=6
)


def write_tokenizer(folder, case, vocab, merges):
    """The tokenizer's files, written by transformers or by hand as earlier versions left them."""
    config = {} if case["class"] is None else {"tokenizer_class": case["class"]}
    in_config, in_map = (case["more"], {}) if case["more_in"] == "config" else ({}, case["more"])
    config |= in_config
    if case["prefix_space"] is not None:
        config["add_prefix_space"] = case["prefix_space"]
    if case["layout"] == "saved":
        pairs = [tuple(line.split(" ")) for line in merges]
        tokenizer = transformers.GPT2Tokenizer(
            vocab=vocab, merges=pairs, add_prefix_space=bool(case["prefix_space"]), **case["named"]
        )
        tokenizer.add_tokens([transformers.AddedToken(**token) for token in case["added"]])
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    first = len(vocab) + case["gap"]
    added = {token["content"]: first + number for number, token in enumerate(case["added"])}
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "special_tokens_map.json").write_text(json.dumps(case["named"] | in_map))
    if case["layout"] == "legacy with settings":
        if case["bos"]:
            config["add_bos_token"] = True
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(folder, case, n_vocab):
    """A random model whose greedy texts wander."""
    torch.manual_seed(n_vocab)
    ends = {None: None, "one": 7, "list": list(range(0, n_vocab, 5))}[case["ends"]]
    config = transformers.GPT2Config(vocab_size=n_vocab, n_positions=32, n_embd=16, n_head=2, n_layer=1)
    config.bos_token_id, config.eos_token_id = None, ends if case["ends_in"] == "config" else None
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=0)
    model = model.to(case["dtype"])
    if case.get("form", "safetensors") == "safetensors":
        model.save_pretrained(folder, max_shard_size=case["shard"])
    else:  # as others save it: under other names, and of two that are one tensor any or both
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        state = {
            case["prefix"] + name: tensor for name, tensor in model.state_dict().items() if name != case["left_out"]
        }
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=case["form"] == "bin")
    return model.to(torch.float32)


def test_what_transformers_reads_is_read_or_refused(fixtures, tmp_path_factory):
    whole = json.loads((fixtures / "tiny" / "encoder.json").read_text(encoding="utf-8"))
    merges = (fixtures / "tiny" / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    outcomes: Counter[str] = Counter()
    generated = 0

    @settings(max_examples=500, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=folders, said=texts)
    def compare(case, said):
        nonlocal generated
        folder = tmp_path_factory.mktemp("folder")
        vocab = dict(whole)
        if not case["end_in_vocabulary"]:
            del vocab[END]
        write_tokenizer(folder, case, vocab, [line for line in merges if line])
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
        except (ValueError, OSError, KeyError):
            theirs = None
        n_vocab = (len(theirs) if theirs else len(vocab)) + case["padding"] - case["short"]
        network = write_model(folder, case, n_vocab)
        try:
            ours = npgpt2.load(convert(folder, folder / "m.npz").path)
        except ValueError as error:
            outcomes["refused: " + str(error).partition(": ")[2][:60]] += 1
            return
        outcomes["read"] += 1
        assert theirs is not None
        for text in said:
            text = text.encode("utf-8", "ignore").decode()
            expected = theirs(text)["input_ids"]
            if any(token >= len(ours.tokenizer) for token in expected):
                continue  # a token that no file names, and transformers makes up
            assert ours.tokenizer.encode(text, allow_special=True) == expected
            assert ours.tokenizer.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
            if not expected or max(expected) >= n_vocab:
                continue
            ends = ours.special.end
            with torch.no_grad():
                used = torch.tensor([expected[-16:]])
                written = network.generate(
                    used, attention_mask=torch.ones_like(used), max_new_tokens=12, do_sample=False
                )
            new = written[0, used.shape[1] :].tolist()
            drawn = set(range(n_vocab)) if ours.drawable is None else set(ours.drawable.tolist())
            if ends is None or not drawn.issuperset(new):
                continue  # where it ends is not said; or it draws what is no token, which we never do
            text = "".join(ours.stream(expected[-16:], length=12, skip_special=False))
            assert text == theirs.decode(new)
            generated += 1

    compare()
    assert outcomes["read"] > 250, outcomes
    assert generated > 200


# What tokenizer_config.json of DialoGPT-small and of distilgpt2 say, and one as transformers 4 wrote it.
SETTINGS = {
    "DialoGPT-small": {"add_bos_token": False, "model_max_length": 1024},
    "distilgpt2": {"model_max_length": 1024},
    "saved by transformers 4": {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", "content": END, "lstrip": False, "normalized": True, "rstrip": False},
        "clean_up_tokenization_spaces": True,
        "eos_token": {"__type": "AddedToken", "content": END, "lstrip": False, "normalized": True, "rstrip": False},
        "errors": "replace",
        "model_max_length": 1024,
        "pad_token": None,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": {"__type": "AddedToken", "content": END, "lstrip": False, "normalized": True, "rstrip": False},
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_turns_of_a_dialogue_are_read_as_transformers_does(settings, shared, tmp_path):
    (tmp_path / "vocab.json").write_bytes((shared / "gpt2-vocab" / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((shared / "gpt2-vocab" / "vocab.bpe").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS[settings]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    network = write_model(tmp_path, {"ends": "one", "ends_in": "config", "dtype": torch.float32, "shard": "1GB"}, 50257)
    converted = convert(tmp_path)
    assert converted.notes == ()
    model = npgpt2.load(converted.path)
    for text in ("hello<|endoftext|>", "Does money buy happiness?<|endoftext|>It buys time.<|endoftext|>", " café\n\n"):
        ids = theirs(text)["input_ids"]
        assert model.prompt_tokens(text, allow_special=True) == ids
        with torch.no_grad():
            written = network.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        assert model.generate(text, length=8, allow_special=True, skip_special=False) == theirs.decode(
            written, clean_up_tokenization_spaces=False
        )
