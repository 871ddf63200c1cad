"""A model's sizes, as files state them: checked before anything is made of them."""

from __future__ import annotations

from reprlib import repr as shortened

from npgpt2.checks import is_whole
from npgpt2.files import parse_json_object
from npgpt2.model import HParams

# OpenAI's take 90 bytes. There is room for what others put beside the five numbers.
HPARAMS_LIMIT = 2**16


def checked(hparams: HParams) -> HParams:
    """The same sizes; ValueError where they are none that a GPT-2 can have.

    >>> checked(HParams(n_vocab=5, n_ctx=4, n_embd=3, n_head=2, n_layer=1))
    Traceback (most recent call last):
    ...
    ValueError: n_embd 3 can't be divided among n_head 2 heads
    """
    for name, value in hparams._asdict().items():
        if not is_whole(value) or not 1 <= value < 2**31:
            raise ValueError(f"{name} is {shortened(value)}, where a whole number of at least 1 is expected")
    if hparams.n_embd % hparams.n_head:
        raise ValueError(f"n_embd {hparams.n_embd} can't be divided among n_head {hparams.n_head} heads")
    return HParams(*map(int, hparams))


def parse_hparams(data: bytes, source: str) -> HParams:
    """Read an `hparams.json`; entries that are no hyperparameter of GPT-2 are passed over. Errors name `source`."""
    if len(data) > HPARAMS_LIMIT:
        raise ValueError(f"{source}: larger than the {HPARAMS_LIMIT:,} bytes that such a file can have")
    values = parse_json_object(data, source)
    for name in HParams._fields:
        if name not in values:
            raise ValueError(f"{source}: {name} is missing")
    try:
        return checked(HParams(**{name: values[name] for name in HParams._fields}))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
