"""The commands that manage model files: `info`, `models`, `convert` and `download`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from npgpt2 import GPT2
from npgpt2.cli.common import Commands, Parser, add_command, add_models_dir, at_least
from npgpt2.models import ALIASES, BUNDLED, MODELS, file_size, find_model, installed_models, models_folder
from npgpt2.weights import DTYPES, Weights


def add_commands(commands: Commands[Parser]) -> None:
    parser = add_command(commands, "info", run_info, "show what a model file holds")
    parser.add_argument(
        "model", nargs="?", default=BUNDLED, metavar="MODEL", help="name or path (default: %(default)s)"
    )
    add_models_dir(parser)

    parser = add_command(
        commands, "models", run_models, "list the models: bundled, installed, and what can be downloaded"
    )
    add_models_dir(parser)

    parser = add_command(
        commands,
        "convert",
        run_convert,
        "make a model file from a checkpoint of TensorFlow or PyTorch, or a Hugging Face folder",
        "Needs neither TensorFlow nor PyTorch.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="the folder, or a checkpoint such as run1/model-40")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT.npz",
        help="default: SRC.npz, beside SRC; of a snapshot in the cache of Hugging Face's hub MODEL.npz, in this folder",
    )
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument("--vocab", type=Path, metavar="DIR", help="the folder with the vocabulary (default: SRC)")
    vocabulary.add_argument(
        "--no-vocab",
        dest="vocab",
        action="store_const",
        const=False,
        help="without a vocabulary, for use with token ids",
    )
    parser.add_argument("--n-head", type=at_least(1), metavar="N", help="attention heads, where SRC doesn't say")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="int8 rounds, and makes a quarter of the file and of the memory that it takes; float16 halves the file"
        " alone, and costs time and memory when it is used (default: %(default)s)",
    )

    parser = add_command(
        commands,
        "download",
        run_download,
        "fetch a model that OpenAI released and convert it",
        "Takes up broken transfers where they ended.",
    )
    parser.add_argument(
        "name",
        choices=(*MODELS, *ALIASES),
        metavar="NAME",
        help=f"{', '.join(MODELS)} ({', '.join(ALIASES)} are older names)",
    )
    add_models_dir(parser)
    parser.add_argument("--base-url", metavar="URL", help="fetch from a mirror of OpenAI's folder `models`")
    parser.add_argument("--keep-checkpoint", action="store_true", help="keep TensorFlow's files")


def models_dir_option(args: argparse.Namespace) -> str:
    """What a command that is suggested needs to use the same models folder."""
    return f" --models-dir {args.models_dir}" if args.models_dir else ""


def run_info(args: argparse.Namespace) -> None:
    weights = Weights(find_model(args.model, args.models_dir))
    model, path = GPT2(weights), weights.path
    vocabulary = f"{len(model.tokenizer):,} tokens" if weights.vocabulary() else "none (give convert --vocab DIR)"
    rows = {
        "model": path,
        **model.hparams._asdict(),
        "parameters": f"{weights.parameters:,}",
        "file size": f"{file_size(path):,} bytes",
        "type": weights.dtype,
        "vocabulary": vocabulary,
    }
    special = model.special
    if special.unused:
        rows["unused rows"] = f"{sum(last - first for first, last in special.unused):,}, of no token"
    if special.added:
        rows["added"] = ", ".join(f"{token.text} ({token.id})" for token in special.added)
    roles = {"begins with": special.begin, "ends with": special.end, "padded with": special.pad}
    rows |= {role: _named(model, tokens) for role, tokens in roles.items() if tokens is not None}
    print("\n".join(f"{name:<11} {value}" for name, value in rows.items()))


def _named(model: GPT2, tokens: int | tuple[int, ...]) -> str:
    """Token ids, and what they say where there is a vocabulary."""
    ids = (tokens,) if isinstance(tokens, int) else tokens
    tokenizer = model.tokenizer if isinstance(model.weights, Weights) and model.weights.vocabulary() else None
    named = (
        f"{tokenizer.decode([token])} ({token})" if tokenizer is not None and token in tokenizer else str(token)
        for token in ids
    )
    return ", ".join(named) or "none"


def run_models(args: argparse.Namespace) -> None:
    installed = installed_models(args.models_dir)
    missing = [name for name in MODELS if name not in installed]
    rows = [
        *(
            (name, file_size(path), path if name != BUNDLED else "comes with npgpt2")
            for name, path in installed.items()
        ),
        *((name, 4 * MODELS[name], f"npgpt2 download {name}{models_dir_option(args)}") for name in missing),
    ]
    width = max(len(name) for name, *_ in rows)
    for name, size, where in rows:
        print(f"{name:<{width}} {size / 1e6:>7,.0f} MB  {where}")


def run_convert(args: argparse.Namespace) -> None:
    from npgpt2.convert import convert

    if args.output is not None and args.output.suffix != ".npz":
        args.parser.error(f"argument -o: {args.output} doesn't end in .npz")
    converted = convert(args.source, args.output, args.vocab, args.n_head, args.dtype)
    print(f"{converted.path}: {converted.path.stat().st_size:,} bytes, {converted.hparams}")
    for note in converted.notes:
        print(f"npgpt2: note: {note}", file=sys.stderr)
    if not converted.has_vocabulary and args.vocab is not False:
        print(
            f"npgpt2: warning: {converted.path} has no vocabulary, so that it can't be used with text;"
            " convert again with --vocab DIR, a folder with encoder.json and vocab.bpe",
            file=sys.stderr,
        )


def run_download(args: argparse.Namespace) -> None:
    from npgpt2.convert import BASE_URL, convert, fetch_checkpoint, remove_checkpoint

    if args.base_url is not None and not re.match("https?://", args.base_url, re.I):
        args.parser.error(f"argument --base-url: {args.base_url!r} doesn't begin with http:// or https://")
    name = ALIASES.get(args.name, args.name)
    folder = models_folder(args.models_dir)
    output, checkpoint = folder / f"{name}.npz", folder / name
    if output.is_file():
        print(f"{output} is already there")
        return
    if checkpoint.exists():
        raise FileExistsError(
            f"{checkpoint} is already there; make a model file of it with: npgpt2 convert {checkpoint}"
        )
    # A folder of our own, so that nothing that a user put beside it is taken for ours and removed.
    fetched = folder / f"{name}.download"
    fetch_checkpoint(name, fetched, args.base_url or BASE_URL)
    try:
        convert(fetched, output)
    except ValueError as error:  # though each file by itself is in order
        raise ValueError(f"{error}; delete {fetched} and run the same command again") from None
    if args.keep_checkpoint:
        fetched.rename(checkpoint)
    else:
        remove_checkpoint(fetched)
    print(f"{output}: ready; try: npgpt2 generate -m {name}{models_dir_option(args)} 'Alan Turing'")
