"""The command line's arguments: what the commands and their options are, and which values they take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from npgpt2.models import ALIASES, BUNDLED, MODELS
from npgpt2.sampling import Sampler
from npgpt2.version import __version__
from npgpt2.weights.reader import DTYPES


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


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


def _add_prompt(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help=help)
    parser.add_argument("--file", type=Path, metavar="PATH", help="read the prompt from a file (UTF-8)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        "--model-name",
        default=BUNDLED,
        metavar="MODEL",
        help="a model's name, such as 124M, or the path of a model file (default: %(default)s, which is bundled)",
    )
    _add_models_dir(parser)


def _add_models_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models-dir",
        metavar="DIR",
        help="the folder with the models (default: $NPGPT2_MODELS, else ./models if there, else ~/.cache/npgpt2)",
    )


def _add_distribution(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Options of what tokens are drawn from."""
    add = parser.add_argument
    add(
        "--temperature",
        type=float,
        default=temperature,
        help="below 1 plays safe, above 1 takes risks; 0 always takes the likeliest token (default: %(default)s)",
    )
    add("--top-k", type=at_least(0), default=0, help="choose among the k likeliest tokens; 0: among all (default: 0)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="choose among the fewest tokens whose probabilities reach p (default: 1, all)",
    )


def _add_sampling(
    parser: argparse.ArgumentParser, length: int | None, temperature: float, nsamples: int, shown: str = "%(default)s"
) -> None:
    """Options of all that generate. length: the default, or None where it depends on the model, which `shown` says."""
    add = parser.add_argument
    add("--length", type=at_least(1), default=length, help=f"tokens to generate at most (default: {shown})")
    _add_distribution(parser, temperature)
    add("--seed", type=at_least(0), help="fixes what is drawn (default: different every time)")
    add(
        "--nsamples",
        type=at_least(0),
        default=nsamples,
        help="how many samples; 0: until interrupted (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=at_least(1),
        default=1,
        help="samples to generate at once: only affects speed and memory (default: 1)",
    )


def build_parser() -> Parser:
    parser = Parser(prog="npgpt2", description="GPT-2 in NumPy: generates text on a CPU.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"npgpt2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, more: str = "") -> Parser:
        description = f"{help[0].upper()}{help[1:]}. {more}".strip()
        added: Parser = commands.add_parser(name, help=help, description=description, allow_abbrev=False)
        added.set_defaults(parser=added)
        return added

    generate = command(
        "generate",
        "continue a prompt",
        "Prints the continuation as it is generated. The prompt is the argument, --file, or standard input where that"
        " is not a terminal (one newline at the end is dropped); without any, a text of its own begins.",
    )
    _add_prompt(generate, "the text to continue")
    _add_model(generate)
    _add_sampling(generate, 40, 0.0, 1)
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    generate.add_argument("--ignore-eot", action="store_true", help="go on when the model ends the text")
    generate.add_argument("--output", type=Path, metavar="FILE", help="write to a file, once all is done")

    unconditional = command(
        "unconditional",
        "generate texts from nothing",
        "Takes the flags of OpenAI's generate_unconditional_samples.py.",
    )
    _add_model(unconditional)
    _add_sampling(unconditional, None, 1.0, 0, "the model's n_ctx")

    interactive = command(
        "interactive",
        "ask for prompts and continue each",
        "Takes the flags of OpenAI's interactive_conditional_samples.py. Ctrl-D ends it.",
    )
    _add_model(interactive)
    _add_sampling(interactive, None, 1.0, 1, "half of the model's n_ctx")

    encode = command(
        "encode",
        "turn text into tokens",
        "Prints the tokens of TEXT, of --file, or of standard input (less one newline at its end) in one line. With -o,"
        " the arguments are files, folders or patterns, whose texts become a training set.",
    )
    encode.add_argument("text", nargs="*", metavar="TEXT|PATH", help="the text, or with -o the files")
    encode.add_argument("--file", type=Path, metavar="PATH", help="read the text from a file (UTF-8)")
    encode.add_argument("--allow-special", action="store_true", help="<|endoftext|> in the text is the token, not text")
    encode.add_argument("-o", "--output", type=Path, metavar="FILE.npz", help="write a training set")
    encode.add_argument(
        "--combine",
        type=at_least(1),
        default=50000,
        metavar="N",
        help="put short texts together up to so many characters (default: %(default)s)",
    )
    encode.add_argument("--vocab", type=Path, metavar="DIR", help="the folder with the vocabulary, instead of a model")
    _add_model(encode)

    decode = command(
        "decode",
        "turn tokens into text",
        "Takes token ids, or a list of ids from each line of standard input.",
    )
    decode.add_argument("ids", nargs="*", metavar="ID", help="token ids")
    decode.add_argument("--vocab", type=Path, metavar="DIR", help="the folder with the vocabulary, instead of a model")
    _add_model(decode)

    score = command(
        "score",
        "measure how well a model predicts a text",
        "Prints bits per byte and per character, and perplexity per token and per word: lower is better. Files can be"
        " of any size; - is standard input.",
    )
    score.add_argument("files", nargs="+", metavar="FILE", help="a text (UTF-8)")
    score.add_argument(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="how far apart the windows are in which the text is read (default: half of the model's n_ctx)",
    )
    score.add_argument("--per-token", action="store_true", help="print each token too: its bits, its id, its text")
    score.add_argument("--json", action="store_true", help="print a JSON object in each line")
    _add_model(score)

    next_token = command("next", "show what comes next: the likeliest tokens after a prompt, with their probabilities")
    _add_prompt(next_token, "the text; if empty, what begins a text")
    next_token.add_argument("--top", type=at_least(1), default=10, metavar="N", help="how many (default: %(default)s)")
    _add_model(next_token)
    _add_distribution(next_token, 1.0)

    inspect = command(
        "inspect",
        "show what happens inside the model, as a page for the browser",
        "One HTML file, which needs no network: the text as tokens and how each surprised the model, what comes next"
        " under any temperature, top-k and top-p, every head's attention, the logit lens, and all arrays' shapes.",
    )
    _add_prompt(inspect, "the text; if empty, what begins a text")
    inspect.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page to write (default: %(default)s)",
    )
    inspect.add_argument("--open", action="store_true", help="open it in the browser")
    _add_model(inspect)

    info = command("info", "show what a model file holds")
    info.add_argument("model", nargs="?", default=BUNDLED, metavar="MODEL", help="name or path (default: %(default)s)")
    _add_models_dir(info)

    models = command("models", "list the models: bundled, installed, and what can be downloaded")
    _add_models_dir(models)

    convert = command(
        "convert",
        "make a model file from a TensorFlow checkpoint or a Hugging Face folder",
        "Needs neither TensorFlow nor PyTorch.",
    )
    convert.add_argument("source", type=Path, metavar="SRC", help="the folder, or a checkpoint such as run1/model-40")
    convert.add_argument("-o", "--output", type=Path, metavar="OUT.npz", help="default: SRC.npz, beside SRC")
    convert.add_argument("--vocab", type=Path, metavar="DIR", help="the folder with the vocabulary (default: SRC)")
    convert.add_argument(
        "--n-head", type=at_least(1), metavar="N", help="attention heads, where SRC has no hparams.json"
    )
    convert.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="int8 rounds, and makes a quarter of the file and of the memory that it takes; float16 halves the file"
        " alone, and costs time and memory when it is used (default: %(default)s)",
    )

    download = command(
        "download",
        "fetch a model that OpenAI released and convert it",
        "Takes up broken transfers where they ended.",
    )
    download.add_argument(
        "name",
        choices=(*MODELS, *ALIASES),
        metavar="NAME",
        help=f"{', '.join(MODELS)} ({', '.join(ALIASES)} are older names)",
    )
    _add_models_dir(download)
    download.add_argument("--base-url", metavar="URL", help="fetch from a mirror of OpenAI's folder `models`")
    download.add_argument("--keep-checkpoint", action="store_true", help="keep TensorFlow's files")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments; what is wrong ends the program with status 2. Options can be spelled with `_` for `-`."""
    rest = argv.index("--") if "--" in argv else len(argv)
    dashed = [re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), word) for word in argv[:rest]]
    args = build_parser().parse_args([*dashed, *argv[rest:]])
    if "temperature" in args:
        try:
            Sampler(args.temperature, args.top_k, args.top_p)
        except ValueError as error:
            args.parser.error(str(error))
    if args.command == "interactive" and (args.nsamples < 1 or args.nsamples % args.batch_size):
        args.parser.error(f"nsamples {args.nsamples} is not a multiple of batch_size {args.batch_size}, or not above 0")
    if "prompt" in args and args.file is not None and args.prompt is not None:
        args.parser.error("give a prompt or --file, not both")
    if args.command == "generate" and args.output is not None and not args.nsamples:
        args.parser.error("--nsamples 0 goes on until interrupted, so that --output would never be complete")
    if args.command == "generate" and "" in args.stop:
        args.parser.error("argument --stop: is empty, which would end every text at once")
    if args.command == "encode":
        if args.output is None and len(args.text) + (args.file is not None) > 1:
            args.parser.error("give one TEXT, in quotes, or write a training set with -o")
        if args.output is not None and (args.file is not None or not args.text):
            args.parser.error("give the files for the training set as arguments")
    if args.command == "convert" and args.output is not None and args.output.suffix != ".npz":
        args.parser.error(f"argument -o: {args.output} doesn't end in .npz")
    if args.command == "download" and args.base_url is not None and not re.match("https?://", args.base_url, re.I):
        args.parser.error(f"argument --base-url: {args.base_url!r} doesn't begin with http:// or https://")
    return args
