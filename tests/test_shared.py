"""Acceptance on data that is too large for the project and lies beside it, where it does."""

import lzma

import numpy as np
import pytest

import npgpt2
from npgpt2.convert import convert


@pytest.fixture(scope="module")
def recorded(shared, tmp_path_factory):
    output = tmp_path_factory.mktemp("shared") / "recorded-tiny.npz"
    convert(shared / "checkpoints" / "recorded-tiny", output, shared / "gpt2-vocab")
    return npgpt2.load(output)


def test_logits_are_those_of_openai_s_code(recorded, shared):
    expected = np.load(shared / "checkpoints" / "recorded-tiny" / "expected.npz")
    logits = recorded.logits(expected["tokens"])
    np.testing.assert_allclose(logits[:, -8:], expected["logits"], rtol=0, atol=2e-4)
    np.testing.assert_array_equal(logits.argmax(axis=-1), expected["argmax"])
    assert expected["argmax"].size == 122


def test_greedy_decoding_gives_openai_s_tokens(recorded, shared):
    expected = np.load(shared / "checkpoints" / "recorded-tiny" / "greedy.npz")
    length = expected["out"].shape[1] - expected["context"].shape[1]
    np.testing.assert_array_equal(
        recorded.generate_tokens(expected["context"], length=length), expected["out"][:, -length:]
    )


def test_a_book_comes_back_from_its_tokens(recorded, shared):
    text = lzma.decompress((shared / "corpus" / "val.txt.xz").read_bytes()).decode("utf-8")
    tokens = recorded.tokenizer.encode(text)
    assert len(tokens) < len(text) / 3
    assert recorded.tokenizer.decode(tokens) == text
