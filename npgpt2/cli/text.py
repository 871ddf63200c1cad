"""The commands between text and tokens: `encode`, which also writes training sets, and `decode`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from npgpt2 import Tokenizer, load
from npgpt2.cli.common import (
    Commands,
    Parser,
    add_allow_special,
    add_command,
    add_model,
    at_least,
    read_text,
    write_stdout,
)
from npgpt2.files import decode_utf8


def add_commands(commands: Commands[Parser]) -> None:
    parser = add_command(
        commands,
        "encode",
        run_encode,
        "turn text into tokens",
        "Prints the tokens of TEXT, of --file, or of standard input (less one newline at its end) in one line. With -o,"
        " the arguments are files, folders or patterns, whose texts become a training set.",
    )
    parser.add_argument("text", nargs="*", metavar="TEXT|PATH", help="the text, or with -o the files")
    parser.add_argument("--file", type=Path, metavar="PATH", help="read the text from a file (UTF-8)")
    add_allow_special(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.npz", help="write a training set")
    parser.add_argument(
        "--combine",
        type=at_least(1),
        default=50000,
        metavar="N",
        help="put short texts together up to so many characters (default: %(default)s)",
    )
    add_vocabulary(parser)

    parser = add_command(
        commands,
        "decode",
        run_decode,
        "turn tokens into text",
        "Takes token ids, or a list of ids from each line of standard input.",
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="token ids")
    add_vocabulary(parser)


def add_vocabulary(parser: Parser) -> None:
    """The options that `open_tokenizer` reads."""
    parser.add_argument("--vocab", type=Path, metavar="DIR", help="the folder with the vocabulary, instead of a model")
    add_model(parser)


def open_tokenizer(args: argparse.Namespace) -> Tokenizer:
    return Tokenizer.load(args.vocab) if args.vocab else load(args.model, args.models_dir).tokenizer


def run_encode(args: argparse.Namespace) -> None:
    if args.output is None and len(args.text) + (args.file is not None) > 1:
        args.parser.error("give one TEXT, in quotes, or write a training set with -o")
    if args.output is not None and (args.file is not None or not args.text):
        args.parser.error("give the files for the training set as arguments")
    tokenizer = open_tokenizer(args)
    if args.output is not None:
        from npgpt2.convert import write_dataset

        files, tokens = write_dataset(args.output, args.text, tokenizer, args.combine)
        print(f"{args.output}: {tokens:,} tokens from {files:,} files")
        return
    if args.file is not None:
        text = decode_utf8(args.file.read_bytes(), str(args.file))
    else:
        text = read_text(args.text[0] if args.text else None, None)
    write_stdout(" ".join(map(str, tokenizer.encode(text, allow_special=args.allow_special))) + "\n")


def run_decode(args: argparse.Namespace) -> None:
    tokenizer = open_tokenizer(args)
    for line in [" ".join(args.ids)] if args.ids else read_text(None, None).split("\n"):
        ids = re.split(r"[\s,]+", line.strip(" \t\r[],"))
        if not all(re.fullmatch("[0-9]{0,18}", token) for token in ids):
            raise ValueError(f"{line[:80]!r} is not a list of token ids")
        write_stdout(tokenizer.decode(int(token) for token in ids if token) + "\n")
