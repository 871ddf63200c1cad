"""All commands together: the parser that knows them, and `main`, which runs one and answers for what goes wrong."""

from __future__ import annotations

import argparse
import codecs
import errno
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress

from npgpt2 import __version__
from npgpt2.cli import batch, generate, models, serve, study, text
from npgpt2.cli.common import Parser


def build_parser() -> Parser:
    parser = Parser(prog="npgpt2", description="GPT-2 in NumPy: generates text on a CPU.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"npgpt2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for family in (generate, batch, serve, text, study, models):
        family.add_commands(commands)
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments; what is wrong ends the program with status 2. Options can be spelled with `_` for `-`."""
    rest = argv.index("--") if "--" in argv else len(argv)
    dashed = [re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), word) for word in argv[:rest]]
    return build_parser().parse_args([*dashed, *argv[rest:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where it failed, 130 after Ctrl-C. What argparse ends by itself,
    help and wrong arguments, raises SystemExit: 0 and 2.
    """
    _prepare_streams()
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, MemoryError) as error:
        closed_pipe = errno.EINVAL if os.name == "nt" else errno.EPIPE
        if isinstance(error, OSError) and error.filename is None and error.errno == closed_pipe:
            status = 0  # who read our output has seen enough
        else:
            print(f"npgpt2: {describe(error)}", file=sys.stderr)
            status = 1
        # What is still buffered can't be written, which Python would try, and report, at exit.
        if sys.stdout is sys.__stdout__:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return status


def _prepare_streams() -> None:
    """Standard input and output in UTF-8, whatever the locale, and empty where there is none.

    A byte order mark before the input is no part of it, as in files.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # whoever started us closed it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            encoding, errors = ("utf-8-sig", "strict") if name == "stdin" else ("utf-8", "npgpt2.names")
            stream.reconfigure(encoding=encoding, errors=errors)


def _show_name(error: UnicodeError) -> tuple[str | bytes, int]:
    """Show what UTF-8 has no code for: bytes of a file's name that are no text in this locale. In UTF-8 they may be."""
    if isinstance(error, UnicodeEncodeError):
        with suppress(UnicodeError):
            return os.fsencode(error.object[error.start : error.end]).decode("utf-8").encode(), error.end
    return codecs.backslashreplace_errors(error)


codecs.register_error("npgpt2.names", _show_name)


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, MemoryError):
        return f"not enough memory ({error or 'the model or the batch is too large for this machine'})"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split("\n"))
