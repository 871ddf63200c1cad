"""Models for the command `llm`: `npgpt2` is the bundled one, and `npgpt2/124M` that of this name in the models folder.

llm imports this whatever it is asked, so that no weights are read here, and NumPy isn't imported, before there is a
prompt. A base model has no turns: what it continues is all that was said so far, as it stands, with the prompt behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, cast, get_type_hints

import click
import llm
import pydantic

from npgpt2.models import BUNDLED, installed_models

if TYPE_CHECKING:
    import npgpt2
    from npgpt2.engine import Settings

# Settings that change nothing which llm shows.
LEFT_OUT = {"guess", "logprobs", "prompt_logprobs"}


@llm.hookimpl
def register_models(register: Callable[[llm.Model], object]) -> None:
    try:
        names = list(installed_models())
    except OSError:  # a folder that can't be read must not keep llm from other models
        names = [BUNDLED]
    for name in names:
        register(GPT2(name))


class Refused(llm.ModelError, click.ClickException):
    """What llm shows in a line. Its chat does so with click's errors alone."""


class CheckedOptions(llm.Options):
    """Options that are npgpt2's settings, which are checked as everywhere; `options` adds them."""

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: object, info: pydantic.ValidationInfo) -> object:
        """On a command line, all is text: lists and mappings are JSON there."""
        if isinstance(value, str) and value[:1] in ("[", "{"):
            with suppress(ValueError):
                value = json.loads(value)
        # llm can't show an error in an item of a list.
        return cls._check(value, info) if isinstance(value, list) else value

    @pydantic.field_validator("*", mode="after")
    @classmethod
    def _check(cls, value: object, info: pydantic.ValidationInfo) -> object:
        from npgpt2.engine import parse_settings

        try:
            parse_settings(cast("Settings", {info.field_name: value}))
        except TypeError as error:
            raise ValueError(error) from None
        return value


@cache
def options() -> type[llm.Options]:
    """The settings of `Limits` and `Sampling` with the types that they have there, and what is said of them there."""
    from npgpt2.engine import Limits, Settings
    from npgpt2.sampling import Sampling

    types, declared = get_type_hints(Settings), {}
    for settings in (Limits, Sampling):
        described = describe_settings(settings.__doc__ or "")
        for setting in fields(settings):
            if setting.name not in LEFT_OUT:
                default = "" if setting.default in (None, ()) else f" (default: {setting.default})"
                field = pydantic.Field(None, description=described.get(setting.name, "") + default)
                declared[setting.name] = (types[setting.name] | None, field)
    created: type[llm.Options] = pydantic.create_model("Options", __base__=CheckedOptions, **declared)
    return created


def describe_settings(text: str) -> dict[str, str]:
    """What a docstring says of settings, by their names: up to the middle dot before the next, or the full stop."""
    return dict(re.findall(r"(\w+): (.+?)(?= · |\.(?: |$))", " ".join(text.split())))


class GPT2(llm.Model):
    """An installed model, loaded by the first prompt and kept for the next."""

    can_stream = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.model_id = "npgpt2" if name == BUNDLED else f"npgpt2/{name}"
        self._loaded: npgpt2.GPT2 | None = None

    @property
    def Options(self) -> type[llm.Options]:
        return options()

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str]:
        """Continue the text so far in pieces, whether or not llm shows them as they come."""
        messages = prompt.messages
        if prompt.system or any(message.role == "system" for message in messages):
            raise Refused(f"{self.model_id} only continues text and has no system prompt: begin the prompt with it")
        parts = (part for message in messages for part in message.parts)
        text = "".join(part.text for part in parts if isinstance(part, llm.parts.TextPart))
        settings = {name: value for name, value in prompt.options if value is not None}
        from npgpt2 import load
        from npgpt2.cli.commands import describe

        try:
            if self._loaded is None:
                self._loaded = load(self.name)
            pieces = self._loaded.stream(text, **settings)
            yield from pieces
        except (OSError, ValueError, MemoryError) as error:
            raise Refused(describe(error)) from error
        response.set_usage(input=len(pieces.request.prompt), output=len(pieces.request.tokens))
        response.response_json = {"finish_reason": pieces.request.finish_reason}
