"""The command `batch`: a file of requests in, a file of answers out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npgpt2 import GPT2
from npgpt2.bars import Bar
from npgpt2.cli.common import (
    Commands,
    Parser,
    add_command,
    add_distribution,
    add_model_to_run,
    at_least,
    drawing,
    option,
    to_text,
)
from npgpt2.models import find_model
from npgpt2.weights import Weights

if TYPE_CHECKING:
    from npgpt2.serving import Origin, Runner

# What bodies call the options of --lines, where they have another name.
FIELDS = {"length": "max_tokens", "nsamples": "n", "ignore_eot": "ignore_eos"}


def add_commands(commands: Commands[Parser]) -> None:
    parser = add_command(
        commands,
        "batch",
        run_batch,
        "answer a file of requests",
        "Requests and answers are those of OpenAI's batches, for /v1/completions, one to a line. Run again after"
        " whatever stopped it, it goes on where it was. Exits with 3 where some answers are errors.",
    )
    parser.add_argument("requests", type=Path, metavar="REQUESTS", help="the requests, JSON lines")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="where answers are added, JSON lines"
    )
    parser.add_argument(
        "--slots",
        type=at_least(1),
        default=16,
        metavar="N",
        help="how many texts to generate at once: only affects speed and memory (default: %(default)s)",
    )
    parser.add_argument(
        "--dask",
        metavar="WHERE",
        help="have a Dask cluster answer: a scheduler's address, its scheduler file, or local, which makes one here",
    )
    parser.add_argument(
        "--workers", type=at_least(1), metavar="N", help="how many --dask local has (default: one for each core)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="answer lines that are wrong with what is wrong")
    add_model_to_run(parser)
    parser.add_argument(
        "--lines", action="store_true", help="each line is a prompt; the settings from here on are those of all"
    )
    before = len(parser._actions)
    parser.add_argument("--length", type=at_least(1), default=40, help="tokens to generate at most (default: 40)")
    add_distribution(parser, 0.0)
    parser.add_argument("--seed", type=at_least(0), help="fixes what is drawn (default: each line's number does)")
    parser.add_argument("--nsamples", type=at_least(1), default=1, help="how many samples of each (default: 1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--ignore-eot", action="store_true", help="go on when the model ends the text")
    parser.set_defaults(settings=[action.dest for action in parser._actions[before:]])


def read_settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """What all lines of prompts have in their bodies; None where lines have bodies of their own."""
    values = {name: getattr(args, name) for name in args.settings}
    given = {name: value for name, value in values.items() if value != args.parser.get_default(name)}
    if not args.lines:
        for name in given:
            args.parser.error(f"{option(name)} is a setting for --lines; without that, each line has its own")
        return None
    given = {"length": args.length, **given, **drawing(args)}
    if "stop" in given:
        given["stop"] = [*map(to_text, args.stop)]
    return {FIELDS.get(name, name): value for name, value in given.items()}


def tell(message: object) -> None:
    """A line on standard error, above the bar."""
    with Bar.external_write_mode(file=sys.stderr):
        print(message, file=sys.stderr)


@contextmanager
def open_runner(args: argparse.Namespace, model: GPT2, path: Path, origin: Origin, tokens: int) -> Iterator[Runner]:
    """Who answers: this process, or a cluster. tokens: how many all of it is at most"""
    if args.dask is None or not tokens:
        from npgpt2.serving import on_engine

        yield on_engine(model, origin, args.slots)
        return
    from npgpt2.serving.cluster import Work, connect, on_cluster

    with connect(args.dask, args.workers, args.threads) as cluster:
        work = Work(str(path.resolve()), origin, args.slots, cluster.threads)
        yield on_cluster(cluster.client, work, tokens, lambda message: tell(f"npgpt2: {message}"))


def run_batch(args: argparse.Namespace) -> None:
    from npgpt2.serving import Answers, Origin, Requests, check, run, unanswered

    settings = read_settings(args)
    if args.workers is not None and args.dask != "local":
        args.parser.error("--workers is for --dask local; another cluster has its own")
    if "-" in (str(args.requests), str(args.output)):
        args.parser.error("requests are read twice, and answers by the next run: - can't stand for either; name a file")
    path = find_model(args.model, args.models_dir)
    if args.output.exists() and args.requests.exists() and os.path.samefile(args.output, args.requests):
        args.parser.error(f"argument -o: {args.output} is the file of requests")
    weights = Weights(path)
    model, fingerprint = GPT2(weights, threads=args.threads), weights.fingerprint()
    _ = model.tokenizer  # without which no line could be answered
    names = list(dict.fromkeys((args.model, path.stem)))
    requests = Requests(args.requests, model, names, fingerprint, settings)

    def report(number: int, problem: ValueError) -> None:
        tell(f"{args.requests}:{number}: {problem}")

    status = args.requests.stat()
    # Of the file's time, so that answers are the same whenever they are made.
    origin = Origin(path.stem, fingerprint, int(status.st_mtime))
    with Bar(total=status.st_size, unit="B", unit_scale=True, desc="check", disable=None, leave=False) as bar:
        plan = check(requests, report, bar.update)
    if plan.bad and not args.skip_bad:
        what = f"{plan.bad:,} of {plan.lines:,} lines can't be answered"
        if plan.bad < plan.lines:
            what += "; --skip-bad answers the others"
        elif not args.lines:
            what += "; if they are prompts and nothing else, give --lines"
        raise ValueError(f"{args.requests}: {what}")
    with Answers(args.output) as answers:
        wanted, errors = unanswered(plan, requests, answers)
        total = int(plan.tokens[wanted].sum())
        with Bar(total=total, unit=" tokens", desc="batch", disable=None, leave=False) as bar:

            def progress(written: int, saved: int) -> None:
                bar.total = (bar.total or 0) - saved
                bar.update(written)

            with open_runner(args, model, path, origin, total) as runner:
                errors += run(plan, wanted, requests, answers, runner, progress)
    print(f"{args.output}: {plan.lines:,} answers, {errors:,} errors")
    if errors:
        args.parser.exit(3)
