"""The commands that look at what a model does: `score`, `next` and `inspect`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from math import isfinite
from pathlib import Path

from npgpt2 import GPT2
from npgpt2.bars import Bar
from npgpt2.cli.common import (
    Commands,
    Parser,
    add_command,
    add_distribution,
    add_model_to_run,
    add_prompt,
    at_least,
    drawing,
    open_model,
    read_prompt,
    warn_of_special,
)
from npgpt2.engine import end_tokens, parse_settings
from npgpt2.files import read_text_pieces, replacing
from npgpt2.models import find_model
from npgpt2.samplers import Written
from npgpt2.study.score import Score


def add_commands(commands: Commands[Parser]) -> None:
    parser = add_command(
        commands,
        "score",
        run_score,
        "measure how well a model predicts a text",
        "Prints bits per byte and per character, and perplexity per token and per word: lower is better. Files can be"
        " of any size; - is standard input.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a text (UTF-8)")
    parser.add_argument(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="how far apart the windows are in which the text is read (default: half of the model's n_ctx)",
    )
    parser.add_argument("--per-token", action="store_true", help="print each token too: its bits, its id, its text")
    parser.add_argument("--json", action="store_true", help="print a JSON object in each line")
    add_model_to_run(parser)

    parser = add_command(
        commands,
        "next",
        run_next,
        "show what comes next: the likeliest tokens after a prompt, with their probabilities",
    )
    add_prompt(parser, "the text; if empty, what begins a text")
    parser.add_argument("--top", type=at_least(1), default=10, metavar="N", help="how many (default: %(default)s)")
    add_model_to_run(parser)
    add_distribution(parser, 1.0)

    parser = add_command(
        commands,
        "inspect",
        run_inspect,
        "show what happens inside the model, as a page for the browser",
        "One HTML file, which needs no network: the text as tokens and how each surprised the model, what comes next"
        " under any temperature and cut, every head's attention, the logit lens, and all arrays' shapes.",
    )
    add_prompt(parser, "the text; if empty, what begins a text")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page to write (default: %(default)s)",
    )
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    add_model_to_run(parser)


def run_score(args: argparse.Namespace) -> None:
    model = open_model(args)
    total, width = Score(), max(len("total"), *map(len, args.files))
    for number, name in enumerate(args.files):
        score = score_file(model, name, args)
        if not number and not args.json:
            print_row(width, "file", "tokens", "bits/byte", "bits/char", "perpl/token", "perpl/word")
        print_score(width, name, score, args.json)
        total += score
    if len(args.files) > 1:
        print_score(width, "total", total, args.json)


def score_file(model: GPT2, name: str, args: argparse.Namespace) -> Score:
    """The score of one file, or of standard input for the name `-`, with its tokens printed if that was asked for."""

    def print_token(token: int, bits: float) -> None:
        text = model.tokenizer.decode([token])
        if args.json:
            print(json.dumps({"bits": round(bits, 4), "token": token, "text": text}))
        else:
            print(f"{bits:8.4f} {token:>6} {json.dumps(text, ensure_ascii=False)}")

    each = {"each": print_token} if args.per_token else {}
    with ExitStack() as stack:
        file = sys.stdin.buffer if name == "-" else stack.enter_context(open(name, "rb"))
        size = None if name == "-" else os.fstat(file.fileno()).st_size
        hidden = args.per_token or None  # where tokens are printed, they show how far it is
        bar = stack.enter_context(Bar(total=size, unit="B", unit_scale=True, desc=name, disable=hidden, leave=False))
        score = model.score(read_text_pieces(file, name, bar.update), args.stride, **each)
    if not score.tokens:
        raise ValueError(f"{name}: has nothing to score")
    return score


def print_score(width: int, name: str, score: Score, as_json: bool) -> None:
    kinds = ("bits_per_byte", "bits_per_character", "perplexity_per_token", "perplexity_per_word")
    figures = {kind: getattr(score, kind) for kind in kinds}
    if as_json:
        # JSON has no infinity.
        known = {kind: figure if isfinite(figure) else None for kind, figure in figures.items()}
        print(json.dumps({"file": name} | vars(score) | known))
    else:
        # As many digits as every processor's rounding agrees on.
        shown = (f"{figure:,.{digits}f}" for figure, digits in zip(figures.values(), (4, 4, 2, 1), strict=True))
        print_row(width, name, f"{score.tokens:,}", *shown)


def print_row(width: int, *cells: str) -> None:
    print(f"{{:<{width}}} {{:>10}} {{:>10}} {{:>10}} {{:>11}} {{:>11}}".format(*cells))


def run_next(args: argparse.Namespace) -> None:
    sampling = parse_settings(drawing(args))[0]
    prompt = read_prompt(args)
    model = open_model(args)
    warn_of_special(model, prompt, args)
    logits = model.next_logits(prompt, args.allow_special)
    written = Written(model.prompt_tokens(prompt, args.allow_special), logits.size, end_tokens(model))
    for token, probability in sampling.likeliest(logits, args.top, model.drawable, written):
        text = json.dumps(model.tokenizer.decode([token]), ensure_ascii=False)
        print(f"{probability:>7.2%} {token:>6}  {text:<20} {'█' * round(40 * probability)}".rstrip())


def run_inspect(args: argparse.Namespace) -> None:
    from npgpt2.study.report import make_report

    prompt = read_prompt(args)
    model = open_model(args)
    warn_of_special(model, prompt, args)
    trace = model.trace(model.prompt_tokens(prompt, args.allow_special), attention=True, residual=True)
    page = make_report(trace, model.tokenizer, find_model(args.model, args.models_dir).stem).encode("utf-8")
    with replacing(args.output) as file:
        file.write(page)
    print(f"{args.output}: {len(page):,} bytes, tokens: {len(trace.tokens):,}")
    if args.open:
        import webbrowser

        if not webbrowser.open(args.output.resolve().as_uri()):
            raise OSError(f"there is no browser that could be started; open {args.output} in one")
