"""The page of a trace before it is filled: `report.html`, with what the page of `npgpt2 serve` has as well."""

from __future__ import annotations

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256

from npgpt2.files import decode_utf8, read_packaged


def read_page(name: str) -> str:
    """One of the files beside this module, of which pages are made.

    >>> read_page("distribution.css")[:2]
    '/*'
    """
    return decode_utf8(read_packaged("npgpt2.study", name), name)


@cache
def template() -> str:
    """The page before it is filled."""
    page = read_page("report.html")
    # What the page of `npgpt2 serve` has as well.
    page = page.replace("{{distribution.css}}", read_page("distribution.css"), 1)
    return page.replace("// {{distribution.js}}", read_page("distribution.js"), 1)


def allowed_sources() -> dict[str, str]:
    """By what a Content-Security-Policy knows the page's own script and style, which are all that it allows: a page
    that shows this one in a frame has to allow them too.

    >>> [*allowed_sources()], allowed_sources()["script"][:8]
    (['script', 'style'], "'sha256-")
    """
    sources = {}
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", template(), re.DOTALL)
        digest = b64encode(sha256(content.encode("utf-8")).digest()).decode("ascii")
        sources[tag] = f"'sha256-{digest}'"
    return sources
