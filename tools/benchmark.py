"""Measure npgpt2 on a model of GPT-2 124M's shapes, beside other engines and what this machine could do at best.

    python tools/benchmark.py [--folder DIR] [--text FILE] [--vocab DIR] [--rounds N] [--json FILE]

Run it where npgpt2 is installed, on a machine with 6 GB of free memory, 4 GB of disk and nothing else to do. The
weights are random and written by TensorFlow, which is needed the first time only; a checkpoint that is in the folder
already, such as OpenAI's 124M, is used as it is. The other engines get the same weights, and have to generate the same
tokens before anything is timed; those that aren't installed are left out. See `engines.py`.

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
import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice, pairwise, product
from pathlib import Path
from statistics import median

import numpy as np
from engines import ENGINES, TOKENIZERS, missing_packages

import npgpt2
from npgpt2.engine.continuation import Continuation
from npgpt2.engine.guesses import Lookup
from npgpt2.kernels.threads import count_threads
from npgpt2.model import HParams, variable_shapes
from npgpt2.sampling import Sampler, random_generator
from npgpt2.tokenizer import BYTE_CHARACTERS, END_OF_TEXT

THREADS = count_threads()
ENGINES_PROGRAM = Path(__file__).with_name("engines.py")
# Threads of some engines keep a core busy for 0.2 s after their work, in case there is more.
PAUSE = 0.3

# What is asked of the engines: the figure's name, how many sequences of how many tokens each, how many tokens to
# generate, how often, and whether it is asked in int8 too.
FIGURES = [
    ("decode, context 32 to 96", 1, 32, 65, 1, True),
    ("decode, context 256 to 288", 1, 256, 33, 1, False),
    ("decode, context 1000 to 1020", 1, 1000, 21, 1, False),
    ("prefill of 32", 1, 32, 1, 5, False),
    ("prefill of 512", 1, 512, 1, 2, True),
    ("prefill of 1000", 1, 1000, 1, 1, False),
    ("batch of 1, context 64 to 84", 1, 64, 21, 1, False),
    ("batch of 4, context 64 to 84", 4, 64, 21, 1, False),
    ("batch of 8, context 64 to 84", 8, 64, 21, 1, True),
    ("batch of 16, context 64 to 84", 16, 64, 21, 1, False),
]
HPARAMS = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
LARGEST = f"import numpy; numpy.ones({HPARAMS['n_vocab'] * HPARAMS['n_embd']}, 'f4')"
# Programs that say how long each of their steps took.
FIRST_TOKEN = """
import sys, time; times = [time.perf_counter()]
import npgpt2; times.append(time.perf_counter())
model = npgpt2.load(sys.argv[1]); times.append(time.perf_counter())
model.generate_tokens([464, 3290, 318], length=1); times.append(time.perf_counter())
print([end - start for start, end in zip(times, times[1:])])
"""
READ_ONCE = """
import mmap, sys, time
import numpy as np
start = time.perf_counter()
with open(sys.argv[1], "rb") as file, np.errstate(all="ignore"):
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    np.dot(np.frombuffer(mapped, "<f4", len(mapped) // 1024 * 256).reshape(-1, 256), np.ones(256, "f4"))
print([time.perf_counter() - start])
"""


# ---- The engines: dictionaries of what each of them, "limit" and npgpt2 too, took for a figure


def write_files(folder, engines):
    """Each engine's files of the same weights, where they aren't there yet."""
    wanted = [("transformers", "float32", "transformers"), ("llama.cpp", "float32", "model.gguf")]
    wanted += [("CTranslate2", dtype, f"ctranslate2-{dtype}") for dtype in ("float32", "int8")]
    for engine, dtype, name in wanted:
        # CTranslate2 takes the packages of transformers too, and is converted from its files.
        if engine in engines and not (folder / name).exists():
            say(f"write {name}")
            run(ENGINES_PROGRAM, "write", engine, dtype, folder, THREADS)
    if not (folder / "model-int8.npz").exists():
        say("write model-int8.npz")
        run("-m", "npgpt2", "convert", folder, "-o", folder / "model-int8.npz", "--dtype", "int8")


def ask_engines(folder, engines, rounds):
    """For each figure and each (engine, dtype) the median of the rounds, in seconds."""
    seconds = {figure[0]: defaultdict(list) for figure in FIGURES}
    pairs = [(engine, "float32") for engine in engines]
    pairs += [(engine, "int8") for engine in engines if engine in ("limit", "npgpt2", "CTranslate2")]
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}: start {len(pairs)} processes")
        workers = {pair: start_worker(folder, *pair) for pair in pairs}
        if number == 1:
            check_agreement({engine: worker for (engine, dtype), worker in workers.items() if dtype == "float32"})
        for figure, sequences, context, length, times, in_int8 in FIGURES:
            say(f"round {number} of {rounds}: {figure}")
            for (engine, dtype), worker in workers.items():
                if dtype == "float32" or in_int8:
                    answer = ask(worker, sequences=sequences, context=context, length=length, times=times)
                    seconds[figure][engine, dtype].append(median(answer["seconds"]))
                    time.sleep(PAUSE)
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return {figure: {pair: median(values) for pair, values in taken.items()} for figure, taken in seconds.items()}


def check_agreement(workers):
    say("do all engines generate the same tokens?")
    tokens = {e: ask(w, sequences=2, context=32, length=16, times=1)["tokens"] for e, w in workers.items()}
    for engine, found in tokens.items():
        if engine != "limit" and found != tokens["npgpt2"]:
            sys.exit(
                f"benchmark: {engine} doesn't generate the tokens that npgpt2 does; if its files are of another model,"
                f" delete them: {found[:4]} …, {tokens['npgpt2'][:4]} …"
            )


def start_worker(folder, engine, dtype):
    command = [sys.executable, ENGINES_PROGRAM, "serve", engine, dtype, folder, THREADS]
    worker = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker.engine = engine
    read_line(worker)  # it is ready
    return worker


def ask(worker, **question):
    worker.stdin.write(json.dumps(question) + "\n")
    worker.stdin.flush()
    return json.loads(read_line(worker))


def read_line(worker):
    line = worker.stdout.readline()
    return line or sys.exit(f"benchmark: {worker.engine} failed, see above")


def engine_rows(measured):
    """Two sections of the table: all engines in float32, and int8 beside CTranslate2's and our own float32."""
    float32, int8 = [], []
    for figure, sequences, context, length, *_ in FIGURES:
        unit = "ms/token" if figure.startswith("decode") else "tokens/s"
        tokens = context if length == 1 else sequences  # that were read in the time
        values = {pair: 1e3 * s if unit == "ms/token" else tokens / s for pair, s in measured[figure].items()}
        float32.append((figure, unit, {engine: v for (engine, dtype), v in values.items() if dtype == "float32"}))
        if ("npgpt2", "int8") in values:
            row = {engine: v for (engine, dtype), v in values.items() if dtype == "int8"}
            int8.append((figure, unit, row | {"npgpt2 float32": values["npgpt2", "float32"]}))
    return float32, int8


def whole_processes(folder, engines, rounds):
    """From nothing to the first token, and the memory that 64 tokens take."""
    rows = []
    for dtype, file in (("float32", "model.npz"), ("int8", "model-int8.npz")):
        chosen = [e for e in engines if e != "limit" and (dtype == "float32" or e in ("npgpt2", "CTranslate2"))]
        took, peaks = defaultdict(list), {}
        for _ in range(rounds):
            say(f"whole processes, {dtype}")
            for engine in chosen:
                took[engine].append(run(ENGINES_PROGRAM, "once", engine, dtype, folder, THREADS, 1)[0])
            took["limit"].append(run("-c", READ_ONCE, folder / file)[0])
        rows.append((f"{dtype}, start to first token", "s", {e: median(times) for e, times in took.items()}))
        for engine in chosen:
            peaks[engine] = run(ENGINES_PROGRAM, "once", engine, dtype, folder, THREADS, 64)[1]
        if peaks["npgpt2"]:
            peaks["limit"] = (folder / file).stat().st_size
            rows.append((f"{dtype}, 64 tokens, peak memory", "MB", {e: peak / 1e6 for e, peak in peaks.items()}))
    return rows


def tokenizers(vocabulary, text, rounds):
    """Each encodes a text in a new process, where no cache is filled yet, and then once more."""
    chosen = [name for name in TOKENIZERS if find_spec(name)]
    size, first, again, results = text.stat().st_size / 1e6, defaultdict(list), defaultdict(list), {}
    for _ in range(rounds):
        say("tokenizers")
        for name in chosen:
            result = json.loads(run(ENGINES_PROGRAM, "tokenize", name, vocabulary, text)[2])
            for rates, seconds in zip((first, again), result.pop("seconds"), strict=True):
                rates[name].append(size / seconds)
            results[name] = result
    for name, result in results.items():
        if result != results["npgpt2"]:
            sys.exit(f"benchmark: {name} makes other tokens of {text} than npgpt2: {result}, {results['npgpt2']}")
    figures = [(f"encode {text.name}, {size:.1f} MB", first), ("the same again", again)]
    return [(figure, "MB/s", {name: median(values) for name, values in rates.items()}) for figure, rates in figures]


# ---- The stages about npgpt2 alone: each yields rows, (figure, unit, values), in a fresh process


def convert(folder, file):
    data, copy = max(folder.glob("*.data-*"), key=lambda path: path.stat().st_size), file.with_suffix(".copy")
    runs, copies = [], []
    for _ in range(3):
        runs.append(run("-m", "npgpt2", "convert", folder, "-o", file))
        copies.append(seconds(copy_to_disk, data, copy))
    copy.unlink()
    yield "conversion", "s", {"npgpt2": median(run[0] for run in runs), "limit": median(copies)}
    if runs[0][1]:
        ours, largest = median(run[1] for run in runs), run("-c", LARGEST)[1]
        yield "conversion, peak memory", "MB", {"npgpt2": ours / 1e6, "limit": largest / 1e6}


def start(_, file):
    command = ["-m", "npgpt2", "generate", "-m", file, "--length", "1", "--ignore-eot", "The dog is"]
    steps, whole, limits, whole_limits = [], [], [], []
    for _ in range(7):
        steps.append(json.loads(run("-c", FIRST_TOKEN, file)[2]))
        whole.append(run(*command)[0])
        took, _, said = run("-c", READ_ONCE, file)
        limits.append(json.loads(said)[0])
        whole_limits.append(took)
    imported, opened, first = (1e3 * median(times) for times in zip(*steps, strict=True))
    yield "import npgpt2", "ms", {"npgpt2": imported}
    yield "npgpt2.load", "ms", {"npgpt2": opened}
    yield "first token after load", "ms", {"npgpt2": first, "limit": 1e3 * median(limits)}
    whole, limit = 1e3 * median(whole), 1e3 * median(whole_limits)
    yield "`npgpt2 generate --length 1`, whole process", "ms", {"npgpt2": whole, "limit": limit}


def two_ways(_, file):
    """What npgpt2 does in two ways, of which the second stands under "beside": with and without guesses, and so on."""
    model, rng = npgpt2.load(file), np.random.default_rng(0)
    prompt = rng.integers(0, model.hparams.n_vocab, 32).tolist()

    def greedy():
        return median(step_seconds(model, prompt, 65, Sampler())[1:])

    def as_text():
        """Top-k, and turning tokens into text."""
        text, clock = model.tokenizer.decode(prompt), []
        settings = {"temperature": 1, "top_k": 40, "seed": 0, "ignore_eot": True}
        list(model.samples(text, length=65, progress=lambda _: clock.append(time.perf_counter()), **settings))
        return median(end - start for start, end in pairwise(clock))

    def drawn():
        """Tokens drawn from all, which hardly ever repeat any."""
        return sum(step_seconds(model, prompt, 65, Sampler(temperature=1))[1:]) / 64

    def repeated():
        return sum(step_seconds(model, prompt, 129, Sampler())[1:]) / 128

    yield beside("draw with top-k 40 as text, beside greedy tokens", no_guesses(as_text), no_guesses(greedy))
    yield beside("no repetition, beside no guesses", drawn, no_guesses(drawn))
    # Random weights that don't know a token's position repeat themselves soon, as small models do.
    model.matrices = {**model.matrices, "wpe": np.zeros_like(model.matrices["wpe"])}
    yield beside("repetition, beside no guesses", repeated, no_guesses(repeated))


def beside(figure, one, other, times=5):
    """A row about two ways, which take turns after a first time that doesn't count."""
    one(), other()
    both = [(one(), other()) for _ in range(times)]
    ours, theirs = (1e3 * median(values) for values in zip(*both, strict=True))
    return figure, "ms/token", {"npgpt2": ours, "beside": theirs}


def no_guesses(action):
    def without():
        guess, Lookup.guess = Lookup.guess, lambda self: []
        try:
            return action()
        finally:
            Lookup.guess = guess

    return without


def step_seconds(model, prompt, length, sampler):
    sequence = Continuation(model.hparams, prompt, random_generator(0, 0))
    return [seconds(model._advance, [sequence], sampler) for _ in range(length)]


def growth(_, file):
    """How much memory 1,000 tokens take beyond the cache."""
    try:
        import resource
    except ImportError:  # Windows
        return
    model, used = npgpt2.load(file), []
    sequence = Continuation(model.hparams, [464, 3290, 318], random_generator(0, 0))
    for step in range(1000):
        model._advance([sequence], Sampler())
        if step in (20, 999):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            cache = sequence.cache
            used.append(peak - (cache.k.nbytes + cache.v.nbytes) * cache.length // model.hparams.n_ctx)
    yield "growth of peak memory, beyond the cache's", "MB", {"npgpt2": (used[1] - used[0]) / 1e6}


STAGES = {stage.__name__: stage for stage in (convert, start, two_ways, growth)}


# ---- How things are measured


def say(what):
    print(f"benchmark: {what} …", file=sys.stderr, flush=True)


def seconds(action, *arguments):
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def run(*arguments):
    """Run Python: how many seconds it took, its peak resident memory in bytes (None on Windows), what it printed."""
    start, peak = time.perf_counter(), None
    with subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.read()
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if process.returncode:
        sys.exit(f"benchmark: python {' '.join(map(str, arguments[:3]))} failed, see above")
    return time.perf_counter() - start, peak, said


def copy_to_disk(source, target):
    with open(source, "rb") as read, open(target, "wb") as written:
        shutil.copyfileobj(read, written, 2**20)
        written.flush()
        os.fsync(written.fileno())


# ---- The model, a text, and the machine


def make_checkpoint(folder):
    """The files of OpenAI's 124M, with random weights, and a vocabulary of bytes and pairs of bytes."""
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "CUDA_VISIBLE_DEVICES": ""}
    import tensorflow as tf

    merges = list(islice(product(BYTE_CHARACTERS, repeat=2), HPARAMS["n_vocab"] - 257))
    entries = [*BYTE_CHARACTERS, *map("".join, merges), END_OF_TEXT]
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    (folder / "encoder.json").write_text(json.dumps({entry: number for number, entry in enumerate(entries)}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        tf1.set_random_seed(0)
        for name, shape in variable_shapes(HParams(**HPARAMS)).items():
            initializer = tf1.ones_initializer() if name.endswith("/g") else tf1.random_normal_initializer(stddev=0.02)
            tf1.get_variable(f"model/{name}", [1, *shape] if name.endswith("/w") else shape, initializer=initializer)
        session.run(tf1.global_variables_initializer())
        saver = tf1.train.Saver(write_version=tf1.train.SaverDef.V2, save_relative_paths=True)
        saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)


def some_english(folder):
    """The reference texts that come with Python, for want of another; 0.7 MB, and none of it twice."""
    from pydoc_data.topics import topics

    path = folder / "text.txt"
    path.write_text("\n".join(topics.values()), encoding="utf-8")
    return path


def processor():
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    names = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.split(": ")[1] for line in names if line.startswith("model name")), platform.processor())


def describe_machine():
    """What the figures depend on, by name."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    about = f"{blas['name']} {blas['version']}"
    try:  # OpenBLAS, which comes with most of NumPy's wheels, says more of itself
        library = ctypes.CDLL(np.linalg._umath_linalg.__file__)
        library.scipy_openblas_get_corename64_.restype = ctypes.c_char_p
        about += f", {library.scipy_openblas_get_corename64_().decode()} kernels"
    except (OSError, AttributeError):
        pass
    machine = {"processor": f"{processor()}, {os.cpu_count()} cores", "system": f"{sys.platform} {platform.machine()}"}
    machine |= {"threads": f"{THREADS} in each engine", "Python": platform.python_version(), "BLAS": about}
    for package in ("numpy", "torch", "transformers", "ctranslate2", "llama-cpp-python", "tiktoken", "tokenizers"):
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
        print((line + " ".join(f"{cell:>17}" for cell in cells)).rstrip())


def main():
    parser = argparse.ArgumentParser(description="Measure npgpt2 on a model of GPT-2 124M's shapes, and other engines.")
    folder = Path(tempfile.gettempdir()) / "npgpt2-benchmark"
    parser.add_argument("--folder", type=Path, default=folder, help="where the models are kept (default: %(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="for the tokenizers (default: Python's reference)")
    parser.add_argument("--vocab", type=Path, metavar="DIR", help="likewise (default: the model's vocabulary)")
    parser.add_argument("--rounds", type=int, default=5, help="how often all is measured (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file as well")
    parser.add_argument("--stage", choices=["checkpoint", *STAGES], help="run a stage in this process")
    args = parser.parse_args()
    folder = args.folder
    for path in (args.text, args.vocab):
        if path and not path.exists():
            parser.error(f"{path}: no such file or folder")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, where at least 1 is expected")
    if args.stage == "checkpoint":
        return make_checkpoint(folder)
    if args.stage:
        return print(json.dumps(list(STAGES[args.stage](folder, folder / "model.npz"))))

    def in_fresh_process(stage):
        say(stage)
        return run(__file__, "--stage", stage, "--folder", folder)[2]

    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(THREADS)
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob("*.index")):
        if find_spec("tensorflow") is None:
            sys.exit(f"benchmark: {folder} holds no checkpoint; to make one, pip install tensorflow-cpu")
        in_fresh_process("checkpoint")
    engines = [engine for engine in ENGINES if not missing_packages(engine)]
    conversion = json.loads(in_fresh_process("convert"))
    write_files(folder, engines)
    measured = ask_engines(folder, engines, args.rounds)
    float32, int8 = engine_rows(measured)
    values = {figure: row["npgpt2"] for figure, _, row in float32}
    vocabulary, text = args.vocab or folder, args.text or some_english(folder)
    near, far = values["decode, context 32 to 96"], values["decode, context 1000 to 1020"]
    sections = {
        "all in float32": float32,
        "weights in int8": int8,
        "whole processes": whole_processes(folder, engines, args.rounds),
        "npgpt2, step by step": conversion + json.loads(in_fresh_process("start")),
        "npgpt2, in two ways": [
            ("decode, context 1000, beside context 32", "ms/token", {"npgpt2": far, "beside": near}),
            *json.loads(in_fresh_process("two_ways")),
            *json.loads(in_fresh_process("growth")),
        ],
        f"tokenizers, vocabulary of {vocabulary.name}": tokenizers(vocabulary, text, args.rounds),
    }
    sections = {title: list(with_ratios(rows)) for title, rows in sections.items()}
    machine = describe_machine()

    print("\n".join(f"{name:<16}  {value}" for name, value in machine.items()))
    print("\nIn brackets: how many times as fast, or as small, npgpt2 is.")
    for title, rows in sections.items():
        print_section(title, rows)
    if args.json:
        report = {"machine": machine, "sections": sections}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
