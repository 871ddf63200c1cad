"""Measure npgpt2 on a model of GPT-2 124M's shapes, each figure beside what this machine could do at best.

    python tools/benchmark.py [--folder DIR] [--json FILE]

Run it where npgpt2 is installed, on a machine with 2 GB of free memory and disk and nothing else to do. The weights are
random and written by TensorFlow, which is needed the first time only; a checkpoint that is in the folder already, such
as OpenAI's 124M, is used as it is. Files come from the system's cache, not from the disk. Times are medians. Each stage
runs in a fresh process and takes turns with its limit, so that both meet the machine in the same state. The limits:

- conversion: copying as many bytes to the same disk; for its memory, NumPy holding the largest variable once
- first token: mapping the file and one `np.dot` over all of it, without its checksums
- decode, generate: `np.dot` of a matrix and a vector, for the bytes of weights (and, at context 1000, of the cache)
  that a token has to read; several sequences can share them
- prefill: the products of its linear layers alone, with the weights in C order
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from math import prod
from pathlib import Path
from statistics import median

import numpy as np

from npgpt2 import load
from npgpt2.model import Cache, forward
from npgpt2.tokenizer import BYTE_CHARACTERS, END_OF_TEXT
from npgpt2.weights import HParams, variable_shapes

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


# ---- The stages: each yields (figure, unit, value, limit)


def convert(folder, file):
    data, copy = max(folder.glob("*.data-*"), key=lambda path: path.stat().st_size), file.with_suffix(".copy")
    runs, copies = [], []
    for _ in range(3):
        runs.append(run("-m", "npgpt2", "convert", folder, "-o", file))
        copies.append(seconds(copy_to_disk, data, copy))
    copy.unlink()
    yield "conversion", "s", median(run[0] for run in runs), median(copies)
    if runs[0][1]:
        yield "conversion, peak memory", "MB", median(run[1] for run in runs) / 1e6, run("-c", LARGEST)[1] / 1e6


def cold(_, file):
    command = ["-m", "npgpt2", "generate", "-m", file, "--length", "1", "--ignore-eot", "The dog is"]
    steps, whole, limits, whole_limits = [], [], [], []
    for _ in range(7):
        steps.append(json.loads(run("-c", FIRST_TOKEN, file)[2]))
        whole.append(run(*command)[0])
        took, _, said = run("-c", READ_ONCE, file)
        limits.append(json.loads(said)[0])
        whole_limits.append(took)
    imported, opened, first = (1e3 * median(times) for times in zip(*steps, strict=True))
    yield "import npgpt2", "ms", imported, None
    yield "npgpt2.load", "ms", opened, None
    yield "first token after load", "ms", first, 1e3 * median(limits)
    yield "`npgpt2 generate --length 1`, whole process", "ms", 1e3 * median(whole), 1e3 * median(whole_limits)


def decode(_, file):
    """The forward pass alone, reading one more token of each sequence a step."""
    model = load(file)
    value, limit = take_turns(one_more(model, [32]), streaming(model), 64)
    yield "decode, context 32 to 96", "ms/token", 1e3 * value, 1e3 * limit
    cached = 1000 * 8 * model.hparams.n_embd * model.hparams.n_layer
    value, limit = take_turns(one_more(model, [1000]), streaming(model, cached), 20)
    yield "decode, context 1000 to 1020", "ms/token", 1e3 * value, 1e3 * limit
    value, limit = take_turns(one_more(model, [64] * 8), streaming(model), 20)
    yield "decode, 8 sequences at context 64 to 84", "tokens/s", 8 / value, 8 / limit


def generate(_, file):
    """Everything that happens from token to token: the forward pass, sampling, turning tokens into text."""
    model = load(file)
    stream, prompt = streaming(model), " a"
    while len(model.tokenizer.encode(prompt)) < 32:
        prompt += " a"
    steps, limits, start = [], [], 0.0

    def after_each_token(_):
        nonlocal start
        steps.append(time.perf_counter() - start)
        limits.append(seconds(stream))
        start = time.perf_counter()

    for figure, settings in [("greedy", {"temperature": 0}), ("top-k 40", {"top_k": 40, "seed": 0})]:
        steps.clear()
        limits.clear()
        list(model.samples(prompt, 1, length=65, ignore_eot=True, progress=after_each_token, **settings))
        # The first step reads the prompt.
        yield f"generate, {figure}, context 32 to 96", "ms/token", 1e3 * median(steps[1:]), 1e3 * median(limits[1:])


def prefill(_, file):
    model, rng = load(file), np.random.default_rng(0)
    tokens = rng.integers(0, model.hparams.n_vocab, 512)
    shapes = [shape for name, shape in model.weights.shapes.items() if name.endswith("/w")]
    pairs = {shape: [rng.random(size, np.float32) for size in ((512, shape[0]), shape)] for shape in set(shapes)}

    def products():
        for shape in shapes:
            np.dot(*pairs[shape])

    def read():
        forward(model.weights, model.hparams, [tokens], [Cache(model.hparams)])

    value, limit = take_turns(read, products, 9)
    yield "prefill of 512", "tokens/s", 512 / value, 512 / limit


STAGES = {stage.__name__: stage for stage in (convert, cold, decode, generate, prefill)}


# ---- How they are measured


def seconds(action, *arguments):
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def take_turns(action, limit, times):
    """Run two actions in turns, once without a clock; returns the median time of each."""
    limit()
    action()
    pairs = [(seconds(action), seconds(limit)) for _ in range(times)]
    return [median(times) for times in zip(*pairs, strict=True)]


def one_more(model, contexts):
    """An action that reads one more token of each of several sequences, which begin with the lengths `contexts`."""
    rng = np.random.default_rng(0)
    caches = [Cache(model.hparams) for _ in contexts]
    for cache, length in zip(caches, contexts, strict=True):
        forward(model.weights, model.hparams, [rng.integers(0, model.hparams.n_vocab, length)], [cache])
    tokens = list(rng.integers(0, model.hparams.n_vocab, (len(contexts), 1)))
    return lambda: forward(model.weights, model.hparams, tokens, caches)


def streaming(model, cached=0):
    """An action that multiplies a matrix the size of all the model's, and `cached` bytes more, by a vector."""
    size = sum(prod(shape) for name, shape in model.weights.shapes.items() if name.endswith("/w") or name == "wte")
    matrix, vector = np.ones(((size + cached // 4) // 768, 768), np.float32), np.ones(768, np.float32)
    return lambda: np.dot(matrix, vector)


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
        sys.exit(f"benchmark: python {arguments[0]} {arguments[1]} failed, see above")
    return time.perf_counter() - start, peak, said


def copy_to_disk(source, target):
    with open(source, "rb") as read, open(target, "wb") as written:
        shutil.copyfileobj(read, written, 2**20)
        written.flush()
        os.fsync(written.fileno())


# ---- The model and the machine


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
        kernels, threads = library.scipy_openblas_get_corename64_(), library.scipy_openblas_get_num_threads64_()
        about += f", {kernels.decode()} kernels, {threads} threads"
    except (OSError, AttributeError):
        about += ", number of threads unknown"
    machine = {"processor": f"{processor()}, {os.cpu_count()} cores", "system": f"{sys.platform} {platform.machine()}"}
    return machine | {"Python": platform.python_version(), "NumPy": np.__version__, "BLAS": about}


# ---- The program


def main():
    parser = argparse.ArgumentParser(description="Measure npgpt2 on a model of GPT-2 124M's shapes.")
    folder = Path(tempfile.gettempdir()) / "npgpt2-benchmark"
    parser.add_argument("--folder", type=Path, default=folder, help="where the model is kept (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file as well")
    parser.add_argument("--stage", choices=["checkpoint", *STAGES], help="run a stage in this process")
    args = parser.parse_args()
    if args.stage == "checkpoint":
        return make_checkpoint(args.folder)
    if args.stage:
        return print(json.dumps(list(STAGES[args.stage](args.folder, args.folder / "model.npz"))))

    def in_fresh_process(stage):
        print(f"benchmark: {stage} …", file=sys.stderr, flush=True)
        return run(__file__, "--stage", stage, "--folder", args.folder)[2]

    args.folder.mkdir(parents=True, exist_ok=True)
    if not any(args.folder.glob("*.index")):
        if importlib.util.find_spec("tensorflow") is None:
            sys.exit(f"benchmark: {args.folder} holds no checkpoint; to make one, pip install tensorflow-cpu")
        in_fresh_process("checkpoint")
    machine, rows = describe_machine(), []
    for stage in STAGES:
        for figure, unit, value, limit in json.loads(in_fresh_process(stage)):
            ratio = limit and (value / limit if unit.endswith("/s") else limit / value)
            rows.append({"figure": figure, "value": value, "limit": limit, "unit": unit, "ratio": ratio})

    print("\n".join(f"{name:<9}  {value}" for name, value in machine.items()))
    print(f"\n{'figure':<44} {'value':>8} {'limit':>8}  {'unit':<8}  ratio")
    for row in rows:
        limit, ratio = (f"{row['limit']:.2f}", f"{row['ratio']:.2f}") if row["limit"] else ("", "")
        print(f"{row['figure']:<44} {row['value']:>8.2f} {limit:>8}  {row['unit']:<8}  {ratio}".rstrip())
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "figures": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
