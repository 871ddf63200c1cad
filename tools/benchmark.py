"""Measure npgpt2 on a model of GPT-2 124M's shapes, beside other engines and what this machine could do at best.

    python tools/benchmark.py [--folder DIR] [--engines NAME,…] [--beside CHECKOUT] [--isa ISA] [--rounds N] …

Run it where npgpt2 is installed, on a machine with 6 GB of free memory, 4 GB of disk and nothing else to do. The
weights are random and written by TensorFlow, which is needed the first time only; a checkpoint that is in the folder
already, such as OpenAI's 124M, is used as it is. The other engines get the same weights, and have to generate the same
tokens before anything is timed; those that aren't installed are left out, and so are those that --engines doesn't name.
See `engines.py`. What npgpt2 does alone is in `stages.py`.

--beside takes a checkout of another version of npgpt2, which takes its turns like an engine, through its own
`tools/engines.py`. Whether a change costs anything is said in minutes by `--engines npgpt2 --beside CHECKOUT`.

--isa avx2 runs everything as on a processor that has AVX2 alone; see `isa.py`. What each engine really computes with is
asked of it, and stands above the table, whose figures are those of one processor and its kernels.

Every engine runs in a process of its own, on as many threads as npgpt2 uses. For each figure they take turns; a
round goes through all figures, and the next begins with new processes. Figures are medians, of the steps in a turn and
then of the rounds. Files come from the system's cache, not from the disk. In brackets: how many times as fast, or as
small, npgpt2 is. The limits, which take their turns like the engines:

- decode and batches: `np.dot` of a matrix and a vector, for the bytes of weights (and, from context 256 on, of
  the cache) that a token has to read; several sequences can share them
- prefill: the products of its linear layers alone, with the weights in C order
- conversion: copying as many bytes to the same disk; for its memory, NumPy holding the largest variable once
- first token: mapping the file and one `np.dot` over all of it, without its checksums
- peak memory: the model file
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

from engines import ENGINES, TOKENIZERS, missing_packages
from isa import ISAS, describe_kernels, run_again
from machine import describe_machine, run, say, start_python
from stages import READ_ONCE

from npgpt2.kernels import count_threads

THREADS = count_threads()
STAGES_PROGRAM = Path(__file__).with_name("stages.py")
# Threads of some engines keep a core busy for 0.2 s after their work, in case there is more.
PAUSE = 0.3

# A figure for which another process takes one of the cores, as on a machine that does something else too.
TAKEN = "decode, context 32 to 96, a core taken"
# What is asked of the engines: the figure's name, how many sequences of how many tokens each, how many tokens to
# generate, how often, and whether it is asked in int8 too.
FIGURES = [
    ("decode, context 32 to 96", 1, 32, 65, 1, True),
    (TAKEN, 1, 32, 65, 1, False),
    ("decode, context 256 to 288", 1, 256, 33, 1, False),
    ("decode, context 1000 to 1020", 1, 1000, 21, 1, False),
    ("prefill of 32", 1, 32, 1, 5, False),
    ("prefill of 512", 1, 512, 1, 2, True),
    ("prefill of 1000", 1, 1000, 1, 1, False),
    ("batch of 1, context 64 to 84", 1, 64, 21, 1, False),
    ("batch of 4, context 64 to 84", 4, 64, 21, 1, False),
    ("batch of 8, context 64 to 84", 8, 64, 21, 1, True),
    ("batch of 16, context 64 to 84", 16, 64, 21, 1, False),
    ("batch of 8, context 500 to 516", 8, 500, 17, 1, False),
]


class Column(NamedTuple):
    """Who has a column of the table: its title, the engine, and where another checkout of npgpt2 is meant, which."""

    title: str
    engine: str
    checkout: Path | None = None

    def start(self, *arguments, **pipes):
        """Start `engines.py`."""
        return start_python(self._program, *arguments, checkout=self.checkout, **pipes)

    def run(self, *arguments):
        return run(self._program, *arguments, checkout=self.checkout)

    @property
    def _program(self):
        return (self.checkout or Path(__file__).parent.parent) / "tools" / "engines.py"


# ---- The engines: dictionaries of what each column, "limit" and npgpt2 too, took for a figure


def write_files(folder, columns):
    """Each engine's files of the same weights, where they aren't there yet."""
    wanted = [("transformers", "float32", "transformers"), ("llama.cpp", "float32", "model.gguf")]
    wanted += [("CTranslate2", dtype, f"ctranslate2-{dtype}") for dtype in ("float32", "int8")]
    engines = {column.engine: column for column in columns}
    if "CTranslate2" in engines:  # which takes the packages of transformers too, and is converted from its files
        engines.setdefault("transformers", Column("transformers", "transformers"))
    for engine, dtype, name in wanted:
        if engine in engines and not (folder / name).exists():
            say(f"write {name}")
            engines[engine].run("write", engine, dtype, folder, THREADS)
    if not (folder / "model-int8.npz").exists():
        say("write model-int8.npz")
        run("-m", "npgpt2", "convert", folder, "-o", folder / "model-int8.npz", "--dtype", "int8")


def ask_engines(folder, columns, rounds):
    """For each figure and each (title, dtype) the median of the rounds, in seconds."""
    seconds = {figure[0]: defaultdict(list) for figure in FIGURES}
    pairs = [(column, "float32") for column in columns]
    pairs += [(column, "int8") for column in columns if column.engine in ("limit", "npgpt2", "CTranslate2")]
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}: start {len(pairs)} processes")
        workers = {(column.title, dtype): start_worker(folder, column, dtype) for column, dtype in pairs}
        if number == 1:
            check_agreement({title: worker for (title, dtype), worker in workers.items() if dtype == "float32"})
        for figure, sequences, context, length, times, in_int8 in FIGURES:
            say(f"round {number} of {rounds}: {figure}")
            for (title, dtype), worker in workers.items():
                if dtype == "float32" or in_int8:
                    with taking_a_core() if figure == TAKEN else nullcontext():
                        answer = ask(worker, sequences=sequences, context=context, length=length, times=times)
                    seconds[figure][title, dtype].append(median(answer["seconds"]))
                    time.sleep(PAUSE)
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return {figure: {pair: median(values) for pair, values in taken.items()} for figure, taken in seconds.items()}


@contextmanager
def taking_a_core():
    process = start_python("-c", "while True: pass")
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def check_agreement(workers):
    say("do all engines generate the same tokens?")
    tokens = {name: ask(w, sequences=2, context=32, length=16, times=1)["tokens"] for name, w in workers.items()}
    for name, found in tokens.items():
        if name != "limit" and found != tokens["npgpt2"]:
            sys.exit(
                f"benchmark: {name} doesn't generate the tokens that npgpt2 does; if its files are of another model,"
                f" delete them: {found[:4]} …, {tokens['npgpt2'][:4]} …"
            )


def start_worker(folder, column, dtype):
    worker = column.start("serve", column.engine, dtype, folder, THREADS, stdin=subprocess.PIPE)
    worker.title = column.title
    read_line(worker)  # it is ready
    return worker


def ask(worker, **question):
    worker.stdin.write(json.dumps(question) + "\n")
    worker.stdin.flush()
    return json.loads(read_line(worker))


def read_line(worker):
    line = worker.stdout.readline()
    return line or sys.exit(f"benchmark: {worker.title} failed, see above")


def engine_rows(measured):
    """Two sections of the table: all engines in float32, and int8 beside CTranslate2's and our own float32."""
    float32, int8 = [], []
    for figure, sequences, context, length, *_ in FIGURES:
        unit = "ms/token" if figure.startswith("decode") else "tokens/s"
        tokens = context if length == 1 else sequences  # that were read in the time
        values = {pair: 1e3 * s if unit == "ms/token" else tokens / s for pair, s in measured[figure].items()}
        float32.append((figure, unit, {title: v for (title, dtype), v in values.items() if dtype == "float32"}))
        if ("npgpt2", "int8") in values:
            row = {title: v for (title, dtype), v in values.items() if dtype == "int8"}
            int8.append((figure, unit, row | {"npgpt2 float32": values["npgpt2", "float32"]}))
    return float32, int8


def whole_processes(folder, columns, rounds):
    """From nothing to the first token, and the memory that 64 tokens take."""
    rows = []
    for dtype, file in (("float32", "model.npz"), ("int8", "model-int8.npz")):
        chosen = [column for column in columns if column.engine != "limit"]
        if dtype == "int8":
            chosen = [column for column in chosen if column.engine in ("npgpt2", "CTranslate2")]
        took, peaks = defaultdict(list), {}
        for _ in range(rounds):
            say(f"whole processes, {dtype}")
            for column in chosen:
                took[column.title].append(column.run("once", column.engine, dtype, folder, THREADS, 1)[0])
            took["limit"].append(run("-c", READ_ONCE, folder / file)[0])
        rows.append((f"{dtype}, start to first token", "s", {name: median(times) for name, times in took.items()}))
        for column in chosen:
            peaks[column.title] = column.run("once", column.engine, dtype, folder, THREADS, 64)[1]
        if peaks["npgpt2"]:
            peaks["limit"] = (folder / file).stat().st_size
            rows.append((f"{dtype}, 64 tokens, peak memory", "MB", {name: peak / 1e6 for name, peak in peaks.items()}))
    return rows


def tokenizers(columns, vocabulary, text, rounds):
    """Each encodes a text in a new process, where no cache is filled yet, and then once more."""
    chosen = [column for column in columns if column.engine == "npgpt2"]
    if {column.engine for column in columns} > {"npgpt2"}:
        chosen += [Column(name, name) for name in TOKENIZERS if name != "npgpt2" and find_spec(name)]
    size, first, again, results = text.stat().st_size / 1e6, defaultdict(list), defaultdict(list), {}
    for _ in range(rounds):
        say("tokenizers")
        for column in chosen:
            result = json.loads(column.run("tokenize", column.engine, vocabulary, text)[2])
            for rates, seconds in zip((first, again), result.pop("seconds"), strict=True):
                rates[column.title].append(size / seconds)
            results[column.title] = result
    for name, result in results.items():
        if result != results["npgpt2"]:
            sys.exit(f"benchmark: {name} makes other tokens of {text} than npgpt2: {result}, {results['npgpt2']}")
    figures = [(f"encode {text.name}, {size:.1f} MB", first), ("the same again", again)]
    return [(figure, "MB/s", {name: median(values) for name, values in rates.items()}) for figure, rates in figures]


# ---- A text, and the machine


def some_english(folder):
    """The reference texts that come with Python, for want of another; 0.7 MB, and none of it twice."""
    from pydoc_data.topics import topics

    path = folder / "text.txt"
    path.write_text("\n".join(topics.values()), encoding="utf-8")
    return path


def describe_versions(isa, kernels):
    """The machine, what each engine computes with on it, and the packages that take part or are missing."""
    machine = describe_machine() | {"threads": f"{THREADS} in each engine", "instruction set": isa}
    machine |= {f"  {engine}": said for engine, said in kernels.items() if engine != "limit"}
    for package in ("torch", "transformers", "ctranslate2", "llama-cpp-python", "tiktoken", "tokenizers"):
        with suppress(PackageNotFoundError):
            machine[package] = version(package)
    missing = {engine: missing_packages(engine) for engine in ENGINES}
    missing |= {tokenizer: [] if find_spec(tokenizer) else [tokenizer] for tokenizer in TOKENIZERS}
    left_out = [f"{name} ({', '.join(packages)} not installed)" for name, packages in missing.items() if packages]
    return machine | {"left out": ", ".join(left_out) or "nothing"}


# ---- The program


def with_ratios(rows):
    """Each row with how many times as fast, or as small, as each of the others npgpt2 is."""
    for figure, unit, values in rows:
        ours, ratios = values["npgpt2"], {}
        for name, value in values.items():
            if name != "npgpt2":
                ratios[name] = ours / value if unit.endswith("/s") else value / ours
        yield {"figure": figure, "unit": unit, "values": values, "ratios": ratios}


def print_section(title, rows):
    columns = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    print(f"\n{title:<48} {'npgpt2':>8} {'':<8} " + " ".join(f"{name:>17}" for name in columns))
    for row in rows:
        cells = [f"{row['values'][c]:.2f} ({row['ratios'][c]:.2f})" if c in row["ratios"] else "" for c in columns]
        line = f"{row['figure']:<48} {row['values']['npgpt2']:>8.2f} {row['unit']:<8} "
        print((line + " ".join(f"{cell:>17}" for cell in cells)).rstrip(), flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measure npgpt2 on a model of GPT-2 124M's shapes, and other engines.")
    folder = Path(tempfile.gettempdir()) / "npgpt2-benchmark"
    parser.add_argument("--folder", type=Path, default=folder, help="where the models are kept (default: %(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="for the tokenizers (default: Python's reference)")
    parser.add_argument("--vocab", type=Path, metavar="DIR", help="likewise (default: the model's vocabulary)")
    names = f"which to measure, of {', '.join(ENGINES)} (default: all that are installed; npgpt2 always)"
    parser.add_argument("--engines", type=lambda names: names.split(","), metavar="NAME,…", help=names)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another version of npgpt2 to measure as well")
    parser.add_argument("--isa", choices=ISAS, default="native", help="the instructions to keep to (default: native)")
    parser.add_argument("--rounds", type=int, default=5, help="how often all is measured (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file as well")
    args = parser.parse_args()
    for path in (args.text, args.vocab, args.beside and args.beside / "tools" / "engines.py"):
        if path and not path.exists():
            parser.error(f"{path}: no such file or folder")
    for engine in args.engines or []:
        if engine not in ENGINES:
            parser.error(f"there is no engine {engine!r}, but {', '.join(ENGINES)}")
        if missing := missing_packages(engine):
            parser.error(f"{engine} needs {', '.join(missing)}, which are not installed")
    if args.isa == "avx2" and platform.machine() not in ("x86_64", "AMD64"):
        parser.error(f"--isa avx2 is of x86 processors, and this is {platform.machine()}")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, where at least 1 is expected")
    return args


def choose_columns(engines, checkout):
    """Who takes part, ourselves among them."""
    engines = engines or [engine for engine in ENGINES if not missing_packages(engine)]
    columns = [Column(engine, engine) for engine in ENGINES if engine in {*engines, "npgpt2"}]
    if checkout:
        checkout = checkout.resolve()  # it is where its processes run
        title = "other" if checkout.name in ENGINES else checkout.name
        columns.insert(1 + columns.index(Column("npgpt2", "npgpt2")), Column(title, "npgpt2", checkout))
    return columns


def measure(args, folder, columns, stage, conversion):
    """All sections of the report, a title and rows each, as they come."""
    float32, int8 = engine_rows(ask_engines(folder, columns, args.rounds))
    values = {figure: row["npgpt2"] for figure, _, row in float32}
    near, far = values["decode, context 32 to 96"], values["decode, context 1000 to 1020"]
    yield "all in float32", float32
    yield "weights in int8", int8
    yield "whole processes", whole_processes(folder, columns, args.rounds)
    yield "npgpt2, the parts of a pass", stage("parts")
    vocabulary, text = (args.vocab or folder).resolve(), (args.text or some_english(folder)).resolve()
    yield f"tokenizers, vocabulary of {vocabulary.name}", tokenizers(columns, vocabulary, text, args.rounds)
    yield "npgpt2, step by step", conversion + stage("start")
    both = ("decode, context 1000, beside context 32", "ms/token", {"npgpt2": far, "beside": near})
    yield "npgpt2, in two ways", [both, *stage("two_ways"), *stage("drafts"), *stage("growth")]
    yield "many callers", [*stage("many_callers"), *stage("served")]
    yield "a file of requests", [*stage("batches"), *stage("workers"), *stage("batch_memory")]


def main():
    args = parse_arguments()
    run_again(args.isa)
    folder = args.folder.resolve()
    columns = choose_columns(args.engines, args.beside)
    others = [part for column in columns if column.checkout for part in (column.title, column.checkout)]

    def stage(name):
        say(name)
        return json.loads(run(STAGES_PROGRAM, name, folder, *others)[2])

    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(THREADS)
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob("*.index")):
        if find_spec("tensorflow") is None:
            sys.exit(f"benchmark: {folder} holds no checkpoint; to make one, pip install tensorflow-cpu")
        stage("checkpoint")
    conversion = stage("convert")
    write_files(folder, columns)
    machine = describe_versions(args.isa, describe_kernels(args.isa, [column.engine for column in columns], folder))
    print("\n".join(f"{name:<16}  {value}" for name, value in machine.items()))
    print("\nIn brackets: how many times as fast, or as small, npgpt2 is.", flush=True)
    sections = {}
    # Each is shown when it is there, so that what has been measured isn't lost by what comes later.
    for title, rows in measure(args, folder, columns, stage, conversion):
        sections[title] = list(with_ratios(rows))
        print_section(title, sections[title])
        if args.json:
            report = {"machine": machine, "sections": sections}
            args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
