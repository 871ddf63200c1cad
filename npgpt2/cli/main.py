"""The command line: arguments in, text out. What the commands do is in the other modules."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from math import isfinite
from pathlib import Path

from tqdm import tqdm

from npgpt2 import GPT2, Tokenizer, load
from npgpt2.cli.arguments import parse_arguments
from npgpt2.engine.continuation import Prefix
from npgpt2.files import decode_utf8, read_text_pieces, replacing
from npgpt2.models import ALIASES, BUNDLED, MODELS, find_model, installed_models, models_folder
from npgpt2.sampling import Sampler
from npgpt2.study.score import Score
from npgpt2.weights.reader import Weights

Write = Callable[[str], object]

# ---- Input and output


def read_text(argument: str | None, file: Path | None) -> str:
    """A text from an argument, a file, or standard input if that is no terminal; one newline at the end is dropped."""
    if argument is not None:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ValueError("the argument is not UTF-8")
        return argument
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


def open_tokenizer(args: argparse.Namespace) -> Tokenizer:
    return Tokenizer.load(args.vocab) if args.vocab else load(args.model, args.models_dir).tokenizer


def models_dir_option(args: argparse.Namespace) -> str:
    """What a command that is suggested needs to use the same models folder."""
    return f" --models-dir {args.models_dir}" if args.models_dir else ""


def write_samples(
    model: GPT2,
    prompt: str,
    args: argparse.Namespace,
    write: Write,
    prefix: Prefix | None = None,
    streams: bool = True,
    first: int = 0,
    headed: bool = True,
    stop: Sequence[str] = (),
    ignore_eot: bool = True,
) -> None:
    """Generate samples and write them: piece by piece one after another, or whole with a progress bar.

    streams: whether anyone sees pieces as they are written · first: the first sample's number in the run ·
    headed: whether a line with its number stands above each
    """
    settings = (args.length, args.temperature, args.top_k, args.top_p, args.seed, stop, ignore_eot)

    def header(number: int) -> str:
        return f"{'=' * 40} SAMPLE {number + 1} {'=' * 40}\n" if headed else ""

    if streams and args.batch_size == 1:
        if args.nsamples != 1:
            prefix = model.prefix(prompt, prefix)
        for number in range(args.nsamples) if args.nsamples else count():
            write(header(number))
            for piece in model.stream(prompt, *settings, prefix, sample=first + number):
                write(piece)
            write("\n")
    else:
        total = args.nsamples * args.length or None
        with tqdm(total=total, unit=" tokens", desc="generate", disable=None, leave=False) as bar:
            texts = model.samples(
                prompt, args.nsamples, args.batch_size, *settings, prefix, first=first, progress=bar.update
            )
            for number, text in enumerate(texts):
                with bar.external_write_mode(file=sys.stdout):
                    write(f"{header(number)}{text}\n")


# ---- Commands


def run_generate(args: argparse.Namespace) -> None:
    prompt = read_text(args.prompt, args.file)
    model = load(args.model, args.models_dir)
    with open_output(args.output) as write:
        write_samples(
            model,
            prompt,
            args,
            write,
            streams=args.output is None,
            headed=args.nsamples != 1,
            stop=args.stop,
            ignore_eot=args.ignore_eot,
        )


def run_unconditional(args: argparse.Namespace) -> None:
    model = load(args.model, args.models_dir)
    args.length = args.length or model.hparams.n_ctx
    write_samples(model, "", args, write_stdout)


def run_interactive(args: argparse.Namespace) -> None:
    model = load(args.model, args.models_dir)
    args.length = args.length or max(1, model.hparams.n_ctx // 2)
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows edits lines by itself
            import readline  # noqa: F401, lets input() edit lines and bring back earlier ones
    prefix = None
    for answered in count():
        try:
            while not (prompt := input("Model prompt >>> ").removesuffix("\r")):
                print("Prompt should not be empty!")
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input: not UTF-8 at byte {error.start} of what was read last") from None
        # Samples are numbered through the whole session, so that a seed doesn't give one prompt one answer for ever.
        prefix = model.prefix(prompt, prefix)  # what a prompt has in common with the last one isn't read again
        write_samples(model, prompt, args, write_stdout, prefix, first=answered * args.nsamples)
        print("=" * 80, flush=True)


def run_encode(args: argparse.Namespace) -> None:
    tokenizer = open_tokenizer(args)
    if args.output is not None:
        from npgpt2.convert.dataset import write_dataset

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


def run_score(args: argparse.Namespace) -> None:
    model = load(args.model, args.models_dir)
    total, headed, width = Score(), False, max(len("total"), *map(len, args.files))
    rows = f"{{:<{width}}} {{:>10}} {{:>10}} {{:>10}} {{:>11}} {{:>11}}".format

    def show(name: str, score: Score) -> None:
        nonlocal headed
        figures = [score.bits_per_byte, score.bits_per_character, score.perplexity_per_token, score.perplexity_per_word]
        if args.json:
            names = ("bits_per_byte", "bits_per_character", "perplexity_per_token", "perplexity_per_word")
            finite = [figure if isfinite(figure) else None for figure in figures]  # JSON knows no infinity
            print(json.dumps({"file": name} | vars(score) | dict(zip(names, finite, strict=True))))
        else:
            if not headed:
                print(rows("file", "tokens", "bits/byte", "bits/char", "perpl/token", "perpl/word"))
                headed = True
            # As many digits as every processor's rounding agrees on.
            shown = (f"{figure:,.{4 if i < 2 else 2}f}" for i, figure in enumerate(figures))
            print(rows(name, f"{score.tokens:,}", *shown))

    def show_token(token: int, bits: float) -> None:
        text = model.tokenizer.decode([token])
        if args.json:
            print(json.dumps({"bits": round(bits, 4), "token": token, "text": text}))
        else:
            print(f"{bits:8.4f} {token:>6} {json.dumps(text, ensure_ascii=False)}")

    each = {"each": show_token} if args.per_token else {}
    for name in args.files:
        with ExitStack() as stack:
            file = sys.stdin.buffer if name == "-" else stack.enter_context(open(name, "rb"))
            size = None if name == "-" else os.fstat(file.fileno()).st_size
            hidden = args.per_token or None  # where tokens are printed, they show how far it is
            bar = stack.enter_context(
                tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=hidden, leave=False)
            )
            score = model.score(read_text_pieces(file, name, bar.update), args.stride, **each)
        if not score.tokens:
            raise ValueError(f"{name}: has nothing to score")
        show(name, score)
        total += score
    if len(args.files) > 1:
        show("total", total)


def run_next(args: argparse.Namespace) -> None:
    prompt = read_text(args.prompt, args.file)
    model = load(args.model, args.models_dir)
    logits = model.prefix(prompt).logits
    for token, probability in Sampler(args.temperature, args.top_k, args.top_p).likeliest(logits, args.top):
        text = json.dumps(model.tokenizer.decode([token]), ensure_ascii=False)
        print(f"{probability:>7.2%} {token:>6}  {text:<20} {'█' * round(40 * probability)}".rstrip())


def run_inspect(args: argparse.Namespace) -> None:
    from npgpt2.study.report import make_report

    prompt = read_text(args.prompt, args.file)
    model = load(args.model, args.models_dir)
    trace = model.trace(model.prompt_tokens(prompt), attention=True, residual=True)
    page = make_report(trace, model.tokenizer, model.weights.path.stem).encode("utf-8")
    with replacing(args.output) as file:
        file.write(page)
    print(f"{args.output}: {len(page):,} bytes, tokens: {len(trace.tokens):,}")
    if args.open:
        import webbrowser

        if not webbrowser.open(args.output.resolve().as_uri()):
            raise OSError(f"there is no browser that could be started; open {args.output} in one")


def run_info(args: argparse.Namespace) -> None:
    path = find_model(args.model, args.models_dir)
    model = GPT2(Weights(path))
    vocabulary = f"{len(model.tokenizer):,} tokens" if model.weights.vocabulary() else "none (give convert --vocab DIR)"
    rows = {
        "model": path,
        **model.hparams._asdict(),
        "parameters": f"{model.weights.parameters:,}",
        "file size": f"{path.stat().st_size:,} bytes",
        "type": model.weights.dtype,
        "vocabulary": vocabulary,
    }
    print("\n".join(f"{name:<11} {value}" for name, value in rows.items()))


def run_models(args: argparse.Namespace) -> None:
    installed = installed_models(args.models_dir)
    missing = [name for name in MODELS if name not in installed]
    rows = [
        *(
            (name, path.stat().st_size, path if name != BUNDLED else "comes with npgpt2")
            for name, path in installed.items()
        ),
        *((name, 4 * MODELS[name], f"npgpt2 download {name}{models_dir_option(args)}") for name in missing),
    ]
    width = max(len(name) for name, *_ in rows)
    for name, size, where in rows:
        print(f"{name:<{width}} {size / 1e6:>7,.0f} MB  {where}")


def run_convert(args: argparse.Namespace) -> None:
    from npgpt2.convert.convert import convert

    converted = convert(args.source, args.output, args.vocab, args.n_head, args.dtype)
    print(f"{converted.path}: {converted.path.stat().st_size:,} bytes, {converted.hparams}")
    if not converted.has_vocabulary:
        print(
            f"npgpt2: warning: {converted.path} has no vocabulary, so that it can't be used with text;"
            " convert again with --vocab DIR, a folder with encoder.json and vocab.bpe",
            file=sys.stderr,
        )


def run_download(args: argparse.Namespace) -> None:
    from npgpt2.convert import download
    from npgpt2.convert.convert import convert

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
    download.fetch_checkpoint(name, fetched, args.base_url or download.BASE_URL)
    convert(fetched, output)
    if args.keep_checkpoint:
        fetched.rename(checkpoint)
    else:
        download.remove_checkpoint(fetched)
    print(f"{output}: ready; try: npgpt2 generate -m {name}{models_dir_option(args)} 'Alan Turing'")


COMMANDS = {
    "generate": run_generate,
    "unconditional": run_unconditional,
    "interactive": run_interactive,
    "encode": run_encode,
    "decode": run_decode,
    "score": run_score,
    "next": run_next,
    "inspect": run_inspect,
    "info": run_info,
    "models": run_models,
    "convert": run_convert,
    "download": run_download,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where it failed, 2 for wrong arguments, 130 after Ctrl-C."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # whoever started us closed it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            # Only the names of files can hold what UTF-8 has no code for.
            stream.reconfigure(encoding="utf-8", errors="strict" if name == "stdin" else "backslashreplace")
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        COMMANDS[args.command](args)
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


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, MemoryError):
        return f"not enough memory ({error or 'the model or the batch is too large for this machine'})"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split("\n"))
