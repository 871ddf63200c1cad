"""Measure again, on this machine, the numbers in npgpt2's kernels and engine that came from a measurement.

    python tools/tune.py [NAME…]

NAME is a module: ways, threads, rows, attention, int8, passes, cache; or drafts, for what passes are expected to
take; by default all, which takes some minutes. For each there is a table: what there is to choose from, times in
microseconds with the least marked by *, and what the code has now. `ways --write` puts what was best into that module.
Shapes are those of GPT-2 124M, and matrices come from memory, as they do while a model runs, not from the cache.

The ways take turns, and of each the least time counts, since other programs only ever add some. Where threads wait for
each other, time is the clock's; elsewhere it is the processor's, divided by the number of threads, which other programs
disturb less.
"""

import os
import re
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from machine import describe_machine

import npgpt2
from npgpt2 import kernels, model
from npgpt2.engine import Reading, Slots, Span, cache
from npgpt2.kernels import attention, count_threads, int8, matmul, passes, rows, ways
from npgpt2.kernels.threads import THREAD_WORTH, share, sharing
from npgpt2.kernels.ways import Way
from npgpt2.model import HParams, variable_shapes
from npgpt2.weights.writer import write

HPARAMS = HParams(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12)
C, H, D = HPARAMS.n_embd, HPARAMS.n_head, HPARAMS.n_embd // HPARAMS.n_head
THREADS = count_threads()
# More than any cache holds.
MEMORY = 128 * 2**20
# So many seconds after their last work, BLAS's threads sleep.
REST = 0.1

rng = np.random.default_rng(0)


def processor_time():
    # Windows counts it in steps of 16 ms.
    return time.process_time() if os.name == "posix" else time.perf_counter()


def least(ways, repeats, clock=processor_time):
    """The least that each of some functions by name took, which take turns, in seconds."""
    took = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = clock()
            way()
            took[name].append(clock() - start)
    return {name: min(times) for name, times in took.items()}


def print_table(title, lines, threads=1):
    """lines: (what is measured, seconds by choice)"""
    print(f"\n{title}")
    choices = list(lines[0][1])
    print(f"{'':<26} " + " ".join(f"{choice:>12}" for choice in choices))
    for name, took in lines:
        best = min(took.values())
        cells = [f"{1e6 * took[choice] / threads:.0f}{'*' if took[choice] == best else ' '}" for choice in choices]
        print(f"{name:<26} " + " ".join(f"{cell:>12}" for cell in cells), flush=True)


def choices(now, *factors):
    """Choices by name: a number, "now", and some of its multiples."""
    return {f"{now * factor:,.0f}{' now' if factor == 1 else ''}": int(now * factor) for factor in factors}


def random(*shape):
    return rng.standard_normal(shape, np.float32)


def matrices(n_in, n_out):
    """Copies without end of a matrix that lies in memory by columns, as those of a model do."""
    return cycle([random(n_out, n_in).T for _ in range(max(2, MEMORY // (4 * n_in * n_out)))])


# ---- ways.py: how few rows are multiplied


def tune_ways():
    """ALONE, TOGETHER: every way of multiplying a few rows by a layer's matrices, and its share of the last one."""
    candidates = {"whole": None}
    for way in ("rows", "tiles"):
        for size in (2**18, 3 * 2**18, 2**21):
            candidates[f"{way} {size / 2**20:g} MB"] = Way(sys.maxsize, way, size)
    candidates["small tiles"] = Way(sys.maxsize, "small tiles", 0)
    shapes = ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, HPARAMS.n_vocab // HPARAMS.n_layer))
    layer = [(n_in, matrices(n_in, n_out)) for n_in, n_out in shapes]
    chosen = {}
    for table, divided in (("ALONE", True), ("TOGETHER", False)):
        lines = []
        for N in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 80):
            x = {n_in: random(N, n_in) for n_in in (C, 4 * C)}

            def read(x=x):
                for n_in, following in layer:
                    kernels.linear(x[n_in], next(following))

            turns = {name: partial(all_one_way, way, read) for name, way in candidates.items()}
            with sharing(divided=divided):
                lines.append((f"{N} rows", least(turns, 12, time.perf_counter)))
        print_table(f"ways.py: {table}, of {ways.kind()}. Now {getattr(ways, table).get(ways.kind())}", lines)
        chosen[table] = chosen_ways(lines, candidates)
        print(f"best: {chosen[table]}")
    if "--write" in sys.argv:
        write_ways(chosen)


def all_one_way(way, action):
    """Act while every product of several rows goes one way."""
    with patch.object(matmul, "way_for", lambda rows: way):
        action()


def chosen_ways(lines, candidates):
    """The way that was fastest, up to how many rows, as `ways` has it; up to the last row that isn't best as a whole.

    One that was less than 5 % faster than that of fewer rows doesn't count, since figures differ by as much.
    """
    found = []
    for name, took in lines:
        best = min(took, key=took.get)
        if found and took[found[-1][0]] < 1.05 * took[best]:
            best = found.pop()[0]
        found.append((best, int(name.split()[0])))
    while found and found[-1][0] == "whole":
        found.pop()
    return [Way(rows, *(candidates[name][1:] if candidates[name] else ("whole", 0))) for name, rows in found]


def write_ways(chosen):
    """Put this machine's lines into `ways.py`, in place of those that there are for its kind of kernels."""
    path = Path(ways.__file__)
    text = path.read_text(encoding="utf-8")
    for table, of_kind in chosen.items():
        body = ""
        for kind, several in sorted((getattr(ways, table) | {ways.kind(): of_kind}).items()):
            lines = [f'        Way({rows}, "{way}", {size}),\n' for rows, way, size in several]
            body += f'    "{kind}": [\n{"".join(lines)}    ],\n' if lines else f'    "{kind}": [],\n'
        text = re.sub(rf"(?<=^{table} = {{\n).*?(?=^}}$)", lambda _, body=body: body, text, flags=re.M | re.S)
    compile(text, path, "exec")
    path.write_text(text, encoding="utf-8")
    print(f"written to {path}")


# ---- threads.py: what is worth a thread


def tune_threads():
    """THREAD_WORTH: products of more and more multiplications, on one thread and divided."""
    lines, N = [], 8
    for exponent in range(17, 25):
        n_out = 2**exponent // (N * C)
        x, y, w = random(N, C), np.empty((N, n_out), np.float32), random(n_out, C).T

        def work(start, stop, x=x, w=w, y=y):
            matmul.matmul(x, w[:, start:stop], y[:, start:stop])

        ways = {
            "one thread": lambda work=work, n=n_out: work(0, n),
            "divided": lambda work=work, n=n_out: share(n, work),
        }
        with sharing():
            lines.append((f"{2**exponent:,}", least(ways, 200, time.perf_counter)))
    print_table(f"threads.py: a product of so many multiplications. Now divided from {2 * THREAD_WORTH:,}", lines)


# ---- rows.py


def tune_rows():
    """ROWS: how many GELU takes at once, and from how many on rows are divided."""
    x = random(512, 4 * C)
    ways = {}
    for name, number in choices(rows.ROWS, 1 / 4, 1 / 2, 1, 2, 4).items():
        ways[name] = patched(rows, "ROWS", number, lambda: rows.gelu(x.copy()))
    with sharing(1):
        print_table("rows.py: rows that GELU takes at once, of 512", [("gelu", least(ways, 10))])
    lines, gain = [], np.ones(C, np.float32)
    for name, width, kernel, each in (
        ("layer norm", C, lambda x: rows.layer_norm(x, gain, gain), rows.ROWS),
        ("gelu", 4 * C, rows.gelu, rows.ROWS // 4),
    ):
        for number in (each // 2, each, 2 * each, 4 * each, 8 * each):
            x = random(number, width)
            # With ROWS as low as this, all of them are divided if there is more than one thread.
            ways = {}
            for way, threads in (("one thread", 1), ("divided", THREADS)):
                ways[way] = shared_by(threads, patched(rows, "ROWS", 8, lambda kernel=kernel, x=x: kernel(x)))
            lines.append((f"{name}, {number} rows", least(ways, 100, time.perf_counter)))
    print_table(f"rows.py: from where on to divide. Now from {2 * rows.ROWS} and {2 * (rows.ROWS // 4)}", lines)


def patched(module, name, number, action):
    """A function that acts while a module has another number."""

    def act():
        with patch.object(module, name, number):
            return action()

    return act


def shared_by(threads, action):
    def act():
        with sharing(threads):
            return action()

    return act


# ---- attention.py


def tune_attention():
    """QUERY_BLOCK: the queries of a prompt that are taken at once."""
    lines = []
    for T in (128, 512, 1000):
        q, k, v = random(3, H, T, D)
        ways = {}
        for name, number in choices(attention.QUERY_BLOCK, 1 / 4, 1 / 2, 1, 2, 4).items():
            ways[name] = patched(
                attention, "QUERY_BLOCK", number, lambda q=q, k=k, v=v: attention.causal_attention(q, k, v)
            )
        with sharing(1):
            lines.append((f"prompt of {T}", least(ways, 8)))
    print_table("attention.py: QUERY_BLOCK", lines)


# ---- int8.py


def tune_int8():
    """TILE_BYTES: what is widened at once, for all the matrices of 12 layers."""
    shapes = ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C))
    layers = []
    for _ in range(HPARAMS.n_layer):
        for n_in, n_out in shapes:
            values = rng.integers(-127, 128, (n_out, n_in), np.int8)
            layers.append(int8.Quantized(values, np.ones(n_out, np.float32)))
    lines = []
    for N in (1, 8):
        x = {n_in: random(N, n_in) for n_in in (C, 4 * C)}

        def read(x=x):
            for layer in layers:
                kernels.linear(x[layer.shape[0]], layer)

        # The first time with a buffer of another size doesn't count.
        took = {}
        for _ in range(8):
            for name, number in choices(int8.TILE_BYTES, 1 / 4, 1 / 2, 1, 2, 4).items():
                with patch.object(int8, "TILE_BYTES", number), sharing():
                    kernels.linear(x[C], layers[0])
                    found = least({name: read}, 1, time.perf_counter)[name]
                took[name] = min(found, took.get(name, found))
        lines.append((f"{N} rows, 12 layers", took))
    print_table(f"int8.py: TILE_BYTES, threads: {THREADS}", lines)
    # NumPy has no product of int8 with float32; einsum widens within its own loop.
    values, wide, row = layers[2].values, np.empty((4 * C, C), np.float32), random(C)
    ways = {
        "widen": lambda: np.copyto(wide, values),
        "multiply": lambda: wide @ row,
        "einsum": lambda: np.einsum("oi,i->o", values, row, dtype=np.float32),
    }
    with sharing(1):
        print_table(f"int8.py: {4 * C} x {C} numbers, in the cache, one thread", [("1 row", least(ways, 50))])


# ---- passes.py


def tune_passes():
    """`worth`: passes of a few rows, divided among our threads or left to BLAS's; of 4 layers, with a small vocabulary.

    Rows of one sequence are guesses, which come between single rows, or a prompt, which comes after a rest. What comes
    before is not counted; rows of several sequences come after others of theirs.
    """
    hparams = HPARAMS._replace(n_vocab=1024, n_layer=4)
    arrays = ((name, random(*shape) * np.float32(0.02)) for name, shape in variable_shapes(hparams).items())
    lines = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.npz"
        write(path, hparams, arrays, None)
        for dtype in (None, "int8"):
            opened = npgpt2.load(path, dtype=dtype)
            for rows_are in ("several", "guesses", "a prompt"):
                for N in (1, 2, 3, 4, 6, 8, 16, 24, 32, 48):
                    if N > 1 or (dtype and rows_are == "guesses"):
                        kind = f"{dtype or 'float32'}, {N} rows, {rows_are}"
                        lines.append((kind, time_passes(opened, N, rows_are)))
            del opened  # so that the folder can go, also on Windows
    print_table("passes.py: who does a pass. As now: what `kernels.sharing_work` chooses", lines)


def tune_drafts():
    """ROWS, BANDWIDTH, CALLS: passes of some rows of one sequence, by a model whose weights come from memory."""
    wide, thin = HPARAMS._replace(n_vocab=1024), HPARAMS._replace(n_vocab=64, n_embd=48)
    print("\npasses.py, now: " + ", ".join(f"{name} {getattr(passes, name):g}" for name in ("BANDWIDTH", "CALLS")))
    with TemporaryDirectory() as folder:
        for hparams in (thin, wide):
            arrays = ((name, random(*shape) * np.float32(0.02)) for name, shape in variable_shapes(hparams).items())
            path = Path(folder) / "model.npz"
            write(path, hparams, arrays, None)
            for dtype in (None, "int8"):
                opened = npgpt2.load(path, dtype=dtype)
                took = {N: time_passes(opened, N, "guesses")["as now"] for N in passes.ROWS}
                if hparams is thin:  # whose weights are nothing
                    calls = took[1]
                    print(f"{dtype or 'float32'}: CALLS {calls / hparams.n_layer:.1e}")
                    continue
                one = took[1] - calls
                numbers = sum(array.size for array in opened.weights.values())
                print(
                    f"{dtype or 'float32'}: {numbers / one:.1e} numbers a second, for BANDWIDTH and INT8_BYTES; ROWS:"
                )
                print({N: round((seconds - calls) / one, 1) for N, seconds in took.items()}, "now", passes.ROWS)
                del opened  # so that the folder can go, also on Windows


def time_passes(opened, N, rows_are):
    """The least seconds of a pass of N rows, of several sequences or one's guesses or prompt, in each way."""
    spans = [Span(i, 64, 65) for i in range(N)] if rows_are == "several" else [Span(0, 64, 64 + N)]
    slots = Slots(opened.hparams, N)
    wanted = np.arange(N)

    def read(spans):
        memory = Reading(slots, spans)
        tokens = np.zeros(len(memory.positions), np.int64)
        model.forward(opened.matrices, opened.hparams, tokens, memory.positions, memory, wanted[: len(tokens)], kernels)

    def single():
        with kernels.sharing_work(opened.matrices, 1):
            read([Span(0, 63, 64)])

    ways = {
        "as now": lambda: kernels.sharing_work(opened.matrices, N, len(spans)),
        "BLAS": nullcontext,
        "divided": sharing,
    }
    took = {}
    for _ in range(12):
        for name, way in ways.items():
            if rows_are == "guesses":
                single()
            else:
                time.sleep(REST)
            if rows_are == "several":
                with way():
                    read(spans)
            start = time.perf_counter()
            with way():
                read(spans)
            found = time.perf_counter() - start
            took[name] = min(found, took.get(name, found))
    return took


# ---- cache.py


def tune_cache():
    """CALL_WORTH: sequences of various lengths, whose attention is one call or several."""
    slots = Slots(HPARAMS._replace(n_layer=2), 16)
    slots.k[:], slots.v[:] = 0, 0
    cases = {
        "8 of 64": [64] * 8,
        "8 of 60 to 95": [*range(60, 100, 5)],
        "16 of 20 to 170": [*range(20, 180, 10)],
        "8 of 10 to 900": [10, 900, 30, 700, 20, 800, 50, 600],
        "16 of 500 to 650": [*range(500, 660, 10)],
    }
    lines = []
    for case, lengths in cases.items():
        q, k, v = random(3, H, len(lengths), D)
        spans = [Span(slot, length, length + 1) for slot, length in enumerate(lengths)]

        def read(spans=spans, q=q, k=k, v=v):
            memory = Reading(slots, spans)
            for number in range(HPARAMS.n_layer):
                memory.attend(number % 2, q, k, v)

        ways = {"none together": patched(cache, "CALL_WORTH", 0, read)}
        for name, number in choices(cache.CALL_WORTH, 1 / 4, 1 / 2, 1, 2, 4).items():
            ways[name] = patched(cache, "CALL_WORTH", number, read)
        ways["all together"] = patched(cache, "CALL_WORTH", 2**40, read)
        with sharing(1):
            lines.append((case, least(ways, 12)))
    print_table("cache.py: CALL_WORTH, for 12 layers", lines)


TABLES = {name.removeprefix("tune_"): table for name, table in list(globals().items()) if name.startswith("tune_")}


def main(names):
    names = [name for name in names if name != "--write"]
    if unknown := set(names) - set(TABLES):
        sys.exit(f"tune: there is no {', '.join(sorted(unknown))}, but {', '.join(TABLES)}")
    print("\n".join(f"{name:<10} {value}" for name, value in describe_machine().items()))
    print(f"{'threads':<10} {THREADS}")
    for name in names or TABLES:
        TABLES[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
