"""What a browser shows: the files of the playground, and a text's page of `npgpt2 inspect`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from npgpt2.engine import end_tokens
from npgpt2.files import read_packaged
from npgpt2.study.distribution import next_place
from npgpt2.study.template import allowed_sources

if TYPE_CHECKING:
    from npgpt2 import GPT2

# The files there are, which no other can be asked for: by name, the package that they are in. `/` is the first.
PLAYGROUND, STUDY = "npgpt2.serving.playground", "npgpt2.study"
SCRIPTS = ("main", "api", "branches", "copy", "desk", "editor", "files", "keys", "place", "settings", "theme", "tree")
FILES = {
    **dict.fromkeys(("index.html", "style.css", "icon.svg"), PLAYGROUND),
    **dict.fromkeys((f"{name}.js" for name in (*SCRIPTS, "storage", "views", "writing")), PLAYGROUND),
    **dict.fromkeys(("distribution.js", "distribution.css"), STUDY),
}
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "json": "application/json",
}
# The page of a text has its own policy in it, which allows its own script alone. In a frame, or a tab, it has an origin
# of its own, so that it can't reach what else this server answers.
INSPECT_POLICY = "sandbox allow-scripts; frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
# Tokens of a text that is looked into: its attention takes memory by their square, 151 MB in 124M.
INSPECT_LIMIT = 512


class File(NamedTuple):
    """A file of the playground, its type, and by what a browser knows that it has it already."""

    data: bytes
    type: str
    tag: str


@cache
def policy() -> str:
    """What the playground may do: run and show what this server has, and ask it. The page of a text, in a frame, is
    held to this as well as to its own policy, so that its script and style are named.
    """
    allowed = allowed_sources()
    return (
        f"default-src 'none'; script-src 'self' {allowed['script']}; style-src 'self' {allowed['style']};"
        " connect-src 'self'; img-src 'self' data:; frame-src 'self' blob:; frame-ancestors 'none'; base-uri 'none';"
        " form-action 'none'"
    )


@cache
def find_file(name: str) -> File | None:
    """A file by its name; None where there is none of that name."""
    if name not in FILES:
        return None
    data = read_packaged(FILES[name], name)
    return File(data, TYPES[name.rpartition(".")[2]], f'"{sha256(data).hexdigest()[:16]}"')


def next_place_of(model: GPT2, tokens: Sequence[int], biased: Iterable[int]) -> dict[str, Any]:
    """What can come after a text; see `next_place`. biased: ids of tokens that a bias concerns"""
    return next_place(model.next_logits([*tokens]), tokens, model.tokenizer, end_tokens(model), biased)


def inspect_page(model: GPT2, tokens: Sequence[int], name: str) -> bytes:
    """What happens inside the model with a text, as HTML; see `make_report`."""
    from npgpt2.study.report import make_report  # which a server that nobody asks for it doesn't need

    trace = model.trace(tokens, attention=True, residual=True)
    return make_report(trace, model.tokenizer, name).encode("utf-8")
