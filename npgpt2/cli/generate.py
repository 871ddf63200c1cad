"""The commands that generate: `generate`, and OpenAI's two scripts as `unconditional` and `interactive`."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

from npgpt2 import GPT2, Engine
from npgpt2.bars import Bar
from npgpt2.cli.common import (
    Commands,
    Parser,
    Write,
    add_allow_special,
    add_command,
    add_distribution,
    add_model_to_run,
    add_prompt,
    at_least,
    drawing,
    open_model,
    open_output,
    option,
    read_prompt,
    to_text,
    warn_of_special,
)
from npgpt2.engine import (
    EarlyStopping,
    Search,
    Settings,
    check_best_of,
    parse_settings,
    samples,
    search_beams,
    stream,
)
from npgpt2.samplers import FILTERS

# By what the option is given. What has no part in a search is all that is about drawing.
EARLY_STOPPING: dict[str | None, EarlyStopping] = {"false": False, "true": True, "never": "never"}
NOT_WITH_BEAMS = (*FILTERS, "seed", "nsamples", "batch_size", "best_of", "draft_model")


def add_commands(commands: Commands[Parser]) -> None:
    parser = add_command(
        commands,
        "generate",
        run_generate,
        "continue a prompt",
        "Prints the continuation as it is generated. The prompt is the argument, --file, or standard input where that"
        " is not a terminal (one newline at the end is dropped); without any, a text of its own begins.",
    )
    add_prompt(parser, "the text to continue")
    add_model_to_run(parser, drafted=True)
    add_sampling(parser, 40, 0.0, 1)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--ignore-eot", action="store_true", help="go on when the model ends the text")
    parser.add_argument(
        "--skip-special",
        action="store_const",
        const=True,
        help="leave special tokens out of the text, as the one that ends it is anyway",
    )
    parser.add_argument(
        "--keep-special",
        dest="skip_special",
        action="store_const",
        const=False,
        help="keep even the token that ends the text",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to a file, once all is done")
    parser.add_argument(
        "--best-of",
        type=at_least(1),
        default=1,
        metavar="N",
        help="draw N texts for each sample, and take the one that the model finds likeliest (default: 1)",
    )
    add_beams(parser)

    parser = add_command(
        commands,
        "unconditional",
        run_unconditional,
        "generate texts from nothing",
        "Takes the flags of OpenAI's generate_unconditional_samples.py.",
    )
    add_model_to_run(parser, drafted=True)
    add_sampling(parser, None, 1.0, 0, "the model's n_ctx")
    parser.set_defaults(stop=[], ignore_eot=True, skip_special=None, allow_special=False, output=None, best_of=1)

    parser = add_command(
        commands,
        "interactive",
        run_interactive,
        "ask for prompts and continue each",
        "Takes the flags of OpenAI's interactive_conditional_samples.py. Ctrl-D ends it.",
    )
    add_model_to_run(parser, drafted=True)
    add_sampling(parser, None, 1.0, 1, "half of the model's n_ctx")
    add_allow_special(parser)
    parser.set_defaults(stop=[], ignore_eot=True, skip_special=None, output=None, best_of=1)


def add_sampling(
    parser: Parser, length: int | None, temperature: float, nsamples: int, shown: str = "%(default)s"
) -> None:
    """Options of all that generate. length: the default, or None where it depends on the model, which `shown` says."""
    parser.add_argument(
        "--length", type=at_least(1), default=length, help=f"tokens to generate at most (default: {shown})"
    )
    add_distribution(parser, temperature)
    parser.add_argument("--seed", type=at_least(0), help="fixes what is drawn (default: different every time)")
    parser.add_argument(
        "--nsamples",
        type=at_least(0),
        default=nsamples,
        help="how many samples; 0: until interrupted (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=1,
        help="samples to generate at once: only affects speed and memory (default: 1)",
    )


def add_beams(parser: Parser) -> None:
    """The options that `searching` reads."""
    parser.add_argument(
        "--beams",
        type=at_least(1),
        metavar="N",
        help="instead of token by token, search for a text that is likely as a whole, among N at a time",
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        metavar="X",
        help="with --beams: above 0 longer texts gain, below 0 shorter ones (default: 1)",
    )
    parser.add_argument(
        "--early-stopping",
        choices=EARLY_STOPPING,
        help="with --beams: whether as many ended texts as there are beams end the search; by default, once none that"
        " goes on is better as it is; never: once none can become better",
    )


def searching(args: argparse.Namespace) -> Search | None:
    """What the options say of a beam search, if one is asked for; what doesn't fit ends the program."""
    parser: Parser = args.parser
    said = {"length_penalty": args.length_penalty, "early_stopping": EARLY_STOPPING.get(args.early_stopping)}
    given = {name: value for name, value in said.items() if value is not None}
    if args.beams is None:
        for name in given:
            parser.error(f"{option(name)} is for --beams, which isn't given")
        return None
    for name in NOT_WITH_BEAMS:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"{option(name)} has no part in beam search, which draws nothing: leave it or --beams out")
    try:
        return Search(args.beams, **given)
    except ValueError as error:
        parser.error(str(error))


def run_generate(args: argparse.Namespace) -> None:
    sampling, _ = parse_settings(drawing(args))
    search = searching(args)
    try:
        check_best_of(args.best_of, sampling)
    except ValueError as error:
        args.parser.error(str(error))
    if args.output is not None and not args.nsamples:
        args.parser.error("--nsamples 0 goes on until interrupted, so that --output would never be complete")
    if "" in args.stop:
        args.parser.error("argument --stop: is empty, which would end every text at once")
    args.stop = [*map(to_text, args.stop)]
    prompt = read_prompt(args)
    model = open_model(args)
    warn_of_special(model, prompt, args)
    with open_output(args.output) as write:
        if search:
            write_found(model, prompt, search, args, write)
        else:
            slots = max(args.batch_size, min(args.best_of, 16))
            write_samples(Engine(model, slots), prompt, args, write, headed=args.nsamples != 1)


def run_unconditional(args: argparse.Namespace) -> None:
    drawing(args)
    model = open_model(args)
    args.length = args.length or model.hparams.n_ctx
    with open_output(None) as write:
        write_samples(Engine(model, args.batch_size), "", args, write)


def run_interactive(args: argparse.Namespace) -> None:
    drawing(args)
    if args.nsamples < 1 or args.nsamples % args.batch_size:
        args.parser.error(f"nsamples {args.nsamples} is not a multiple of batch_size {args.batch_size}, or not above 0")
    model = open_model(args)
    args.length = args.length or max(1, model.hparams.n_ctx // 2)
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows edits lines by itself
            import readline  # noqa: F401, lets input() edit lines and bring back earlier ones
    engine = Engine(model, args.batch_size)  # whose slots remember what a prompt has in common with the last ones
    warned = False
    for answered in count():
        try:
            while not (prompt := input("Model prompt >>> ").removesuffix("\r")):
                print("Prompt should not be empty!")
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input: not UTF-8 at byte {error.start} of what was read last") from None
        if not warned:
            warned = warn_of_special(model, prompt, args)
        # Samples are numbered through the whole session, so that a seed doesn't give one prompt one answer for ever.
        with open_output(None) as write:
            write_samples(engine, prompt, args, write, first=answered * args.nsamples)
        print("=" * 80, flush=True)


def settings_of(args: argparse.Namespace) -> Settings:
    """What the options say of a text."""
    return {
        "length": args.length,
        **drawing(args),
        "seed": args.seed,
        "stop": args.stop,
        "ignore_eot": args.ignore_eot,
        "allow_special": args.allow_special,
        "skip_special": args.skip_special,
    }


def write_found(model: GPT2, prompt: str, search: Search, args: argparse.Namespace, write: Write) -> None:
    """Search for a text and write it, with a progress bar meanwhile."""
    with Bar(total=args.length, unit=" tokens", desc="search", disable=None, leave=False) as bar:
        found = search_beams(model, prompt, search, bar.update, **settings_of(args))
    write(f"{found.text}\n")


def write_samples(
    engine: Engine, prompt: str, args: argparse.Namespace, write: Write, first: int = 0, headed: bool = True
) -> None:
    """Generate samples and write them: piece by piece one after another where somebody sees it, which isn't the case
    in batches and in files, or else whole, with a progress bar.

    first: the first sample's number in the run · headed: whether a line with its number stands above each
    """
    settings = settings_of(args)

    def header(number: int) -> str:
        return f"{'=' * 40} SAMPLE {number + 1} {'=' * 40}\n" if headed else ""

    if args.output is None and args.batch_size == args.best_of == 1:
        for number in range(args.nsamples) if args.nsamples else count():
            write(header(number))
            for piece in stream(engine, prompt, **settings | {"sample": first + number}):
                write(piece)
            write("\n")
    else:
        total = args.nsamples * args.best_of * args.length or None
        with Bar(total=total, unit=" tokens", desc="generate", disable=None, leave=False) as bar:
            texts = samples(engine, prompt, args.nsamples, first, bar.update, args.best_of, **settings)
            for number, text in enumerate(texts):
                with bar.external_write_mode(file=sys.stdout):
                    write(f"{header(number)}{text}\n")
