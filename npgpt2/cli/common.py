"""What commands of several families share: how they are added to the parser, options, and input and output."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, cast

from npgpt2 import GPT2, load
from npgpt2.engine import Settings, parse_settings
from npgpt2.files import decode_utf8, replacing
from npgpt2.models import BUNDLED
from npgpt2.sampling import Sampling

Write = Callable[[str], object]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


Commands = argparse._SubParsersAction  # which argparse has no public name for


def add_command(
    commands: Commands[Parser], name: str, run: Callable[[argparse.Namespace], None], help: str, more: str = ""
) -> Parser:
    """Add a command, and return its parser for its options.

    run: does what the command is for; is given the parsed arguments, whose `parser` is for refusing what no option's
    type can see to be wrong · help: a phrase for the list of commands · more: sentences for the command's own help
    """
    description = f"{help[0].upper()}{help[1:]}. {more}".strip()
    parser = commands.add_parser(name, help=help, description=description, allow_abbrev=False)
    parser.set_defaults(run=run, parser=parser)
    return parser


# ---- Options


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return parse


def option(name: str) -> str:
    """How a setting is written on the command line."""
    return f"--{name.replace('_', '-')}"


def token_bias(text: str) -> tuple[int, float]:
    """An argument type: a token's id and what to add to its logit, as ID=BIAS."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, as in 50256=-100") from None


def add_prompt(parser: Parser, help: str) -> None:
    """The options that `read_prompt` reads, and how its text is."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help=help)
    parser.add_argument("--file", type=Path, metavar="PATH", help="read the prompt from a file (UTF-8)")
    add_allow_special(parser)


def add_allow_special(parser: Parser) -> None:
    parser.add_argument(
        "--allow-special",
        action="store_true",
        help="special tokens in the text, such as <|endoftext|>, are tokens, not text",
    )


def add_model(parser: Parser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        "--model-name",
        default=BUNDLED,
        metavar="MODEL",
        help="a model's name, such as 124M, or the path of a model file (default: %(default)s, which is bundled)",
    )
    add_models_dir(parser)


def add_models_dir(parser: Parser) -> None:
    parser.add_argument(
        "--models-dir",
        metavar="DIR",
        help="the folder with the models (default: $NPGPT2_MODELS, else ./models if there, else ~/.cache/npgpt2)",
    )


def add_model_to_run(parser: Parser, drafted: bool = False) -> None:
    """The options that `open_model` reads. drafted: whether a text may be written alone, which a draft speeds up"""
    add_model(parser)
    parser.set_defaults(draft_model=None)
    if drafted:
        parser.add_argument(
            "--draft-model",
            metavar="MODEL",
            help="a smaller model with the same vocabulary, by whose guesses a text comes faster and stays the same",
        )
    parser.add_argument(
        "--threads",
        type=at_least(1),
        metavar="N",
        help="how many threads work (default: as many as there are cores, or as $OPENBLAS_NUM_THREADS says)",
    )


def open_model(args: argparse.Namespace) -> GPT2:
    return load(args.model, args.models_dir, threads=args.threads, draft=args.draft_model)


def warn_of_special(model: GPT2, prompt: str, args: argparse.Namespace) -> bool:
    """Say so where a prompt spells out special tokens, and isn't told to read them as such; returns whether it does."""
    found = [] if args.allow_special else model.tokenizer.find_special(prompt)
    if found:
        print(
            f"npgpt2: {', '.join(found)} in the prompt is read as text; --allow-special reads it as the token",
            file=sys.stderr,
        )
    return bool(found)


# The settings of `drawing`, with how their options are read, and what is said of them.
DRAWING: dict[str, tuple[Callable[[str], float], str]] = {
    "temperature": (float, "below 1 plays safe, above 1 takes risks; 0 always takes the likeliest token"),
    "top_k": (at_least(0), "choose among the k likeliest tokens; 0: among all"),
    "top_p": (float, "choose among the fewest tokens whose probabilities reach p; 1: among all"),
    "min_p": (float, "choose among tokens at least p times as likely as the likeliest; 0: among all"),
    "typical_p": (float, "choose among the least atypical tokens whose probabilities reach p; 1: among all"),
    "repetition_penalty": (float, "above 1, what prompt or text has is less likely to come again"),
    "presence_penalty": (float, "above 0, what the text has is less likely to come again"),
    "frequency_penalty": (float, "the same for each time that the text has it"),
    "no_repeat_ngram_size": (at_least(0), "never write the same N tokens in a row twice; 0: off"),
    "min_tokens": (at_least(0), "don't let the model end the text before N tokens"),
}


def add_distribution(parser: Parser, temperature: float) -> None:
    """The options that `drawing` reads: what tokens are drawn from."""
    for name, (kind, help) in DRAWING.items():
        parser.add_argument(
            option(name),
            type=kind,
            default=getattr(Sampling(temperature), name),
            metavar="X" if kind is float else "N",
            help=f"{help} (default: %(default)s)",
        )
    parser.add_argument(
        "--logit-bias",
        type=token_bias,
        action="append",
        default=[],
        metavar="ID=BIAS",
        help="add to the logit of a token: -100 hardly ever lets it come; repeatable",
    )


def drawing(args: argparse.Namespace) -> Settings:
    """What the options say of what tokens are drawn from; numbers out of range end the program as wrong arguments."""
    chosen = {name: getattr(args, name) for name in DRAWING}
    settings = cast(Settings, chosen | {"logit_bias": dict(args.logit_bias)})
    parser: Parser = args.parser
    try:
        parse_settings(settings)
    except ValueError as error:
        parser.error(str(error))
    return settings


# ---- Input and output


def read_prompt(args: argparse.Namespace) -> str:
    if args.file is not None and args.prompt is not None:
        args.parser.error("give a prompt or --file, not both")
    return read_text(args.prompt, args.file)


def to_text(argument: str) -> str:
    """An argument as text, which is in UTF-8 whatever the locale; what isn't raises ValueError.

    The names of files stay as Python has them, since that is how it finds the files.
    """
    if not any("\ud800" <= character <= "\udfff" for character in argument):
        return argument
    try:  # these stand for bytes that are no text in this locale
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        raise ValueError(f"the argument {argument!r} is not UTF-8") from None


def read_text(argument: str | None, file: Path | None) -> str:
    """A text from an argument, a file, or standard input if that is no terminal; one newline at the end is dropped."""
    if argument is not None:
        return to_text(argument)
    if file is not None:
        text = decode_utf8(file.read_bytes(), str(file))
    elif sys.stdin.isatty():
        return ""
    else:
        text = decode_utf8(sys.stdin.buffer.read(), "standard input")
    return text.removesuffix("\n").removesuffix("\r")


def write_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def open_output(path: Path | None) -> Iterator[Write]:
    """Where text goes: to standard output at once, or to a file that appears when all is written."""
    if path is None:
        yield write_stdout
    else:
        with replacing(path) as file:
            yield lambda text: file.write(text.encode("utf-8"))
