"""What `benchmark.py` measures of npgpt2 alone, a stage in each process.

    python tools/stages.py STAGE FOLDER [NAME CHECKOUT]

prints a stage's rows as JSON: figure, unit, values by column. Where another checkout of npgpt2 is named, it takes its
turns in the stages that are about commands, and has a column of that name. "checkpoint" makes the benchmark's model.
"""

import json
import os
import sys
from collections import defaultdict
from itertools import islice, pairwise, product
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from machine import copy_to_disk, resident_bytes, run, seconds
from served import served

import npgpt2
from npgpt2 import kernels
from npgpt2.engine.cache import Reading
from npgpt2.model import HParams, variable_shapes
from npgpt2.sampling import Sampling
from npgpt2.tokenizer import BYTE_CHARACTERS
from npgpt2.vocabulary import END_OF_TEXT

HPARAMS = HParams(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12)
LARGEST = f"import numpy; numpy.ones({HPARAMS.n_vocab * HPARAMS.n_embd}, 'f4')"
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
# What an engine as it is by default is asked for: how many write, after how many tokens; and the prompt that arrives.
WRITERS, CONTEXT, ARRIVING = 8, 64, 1000
# How long a writer may have to wait at most, in times of the median.
LONGEST_WAIT = 3
# How many layers the deep model has: 14 times those of its draft, as 1558M has 13 times the weights of 124M.
LAYERS = 84
LENGTHS = [10, 900, 30, 700, 20, 800, 50, 600]
# How many requests a file has, how many are answered at once, and how many times as many shouldn't take more memory.
REQUESTS, SLOTS, TIMES = 2000, 16, 100


# ---- Stages about commands, in which other checkouts take their turns: `npgpt2` by column, None for our own


def checkpoint(folder, _):
    """The files of OpenAI's 124M, with random weights, and a vocabulary of bytes and pairs of bytes."""
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "CUDA_VISIBLE_DEVICES": ""}
    import tensorflow as tf

    merges = list(islice(product(BYTE_CHARACTERS, repeat=2), HPARAMS.n_vocab - 257))
    entries = [*BYTE_CHARACTERS, *map("".join, merges), END_OF_TEXT]
    (folder / "hparams.json").write_text(json.dumps(HPARAMS._asdict()))
    (folder / "encoder.json").write_text(json.dumps({entry: number for number, entry in enumerate(entries)}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        tf1.set_random_seed(0)
        for name, shape in variable_shapes(HPARAMS).items():
            initializer = tf1.ones_initializer() if name.endswith("/g") else tf1.random_normal_initializer(stddev=0.02)
            tf1.get_variable(f"model/{name}", [1, *shape] if name.endswith("/w") else shape, initializer=initializer)
        session.run(tf1.global_variables_initializer())
        saver = tf1.train.Saver(write_version=tf1.train.SaverDef.V2, save_relative_paths=True)
        saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)
    return []


def convert(folder, checkouts):
    data, copy = max(folder.glob("*.data-*"), key=lambda path: path.stat().st_size), folder / "copy.npz"
    runs, copies = {name: [] for name in checkouts}, []
    for _ in range(3):
        for name, checkout in checkouts.items():
            file = folder / "model.npz" if checkout is None else copy
            runs[name].append(run("-m", "npgpt2", "convert", folder, "-o", file, checkout=checkout))
        copies.append(seconds(copy_to_disk, data, copy))
    copy.unlink()
    took = {name: median(run[0] for run in each) for name, each in runs.items()}
    yield "conversion", "s", took | {"limit": median(copies)}
    if runs["npgpt2"][0][1]:
        peaks = {name: median(run[1] for run in each) for name, each in runs.items()}
        peaks["limit"] = run("-c", LARGEST)[1]
        yield "conversion, peak memory", "MB", {name: peak / 1e6 for name, peak in peaks.items()}


def start(folder, checkouts):
    file = folder / "model.npz"
    command = ["-m", "npgpt2", "generate", "-m", file, "--length", "1", "--ignore-eot", "The dog is"]
    steps, whole = {name: [] for name in checkouts}, {name: [] for name in [*checkouts, "limit"]}
    limits = []
    for _ in range(7):
        for name, checkout in checkouts.items():
            steps[name].append(json.loads(run("-c", FIRST_TOKEN, file, checkout=checkout)[2]))
            whole[name].append(run(*command, checkout=checkout)[0])
        took, _, said = run("-c", READ_ONCE, file)
        limits.append(json.loads(said)[0])
        whole["limit"].append(took)
    medians = {name: [1e3 * median(times) for times in zip(*each, strict=True)] for name, each in steps.items()}
    yield "import npgpt2", "ms", {name: times[0] for name, times in medians.items()}
    yield "npgpt2.load", "ms", {name: times[1] for name, times in medians.items()}
    first = {name: times[2] for name, times in medians.items()}
    yield "first token after load", "ms", first | {"limit": 1e3 * median(limits)}
    whole = {name: 1e3 * median(times) for name, times in whole.items()}
    yield "`npgpt2 generate --length 1`, whole process", "ms", whole


# ---- Stages that ask an engine


def two_ways(folder, _):
    """What npgpt2 does in two ways, of which the second stands under "beside": with and without guesses, and so on."""
    model = npgpt2.load(folder / "model.npz")
    prompt = random_tokens(32)
    # Random weights that don't know a token's position repeat themselves soon, as small models do.
    weights = {name: model.weights[name] for name in variable_shapes(model.hparams)}
    weights["wpe"] = np.zeros_like(weights["wpe"])
    repeating = npgpt2.GPT2(weights, model.hparams, model.tokenizer)

    def greedy():
        return median(step_seconds(model, prompt, 65, guess=False)[1:])

    def as_text():
        """Top-k, and turning tokens into text."""
        text, clock = model.tokenizer.decode(prompt), []
        settings = {"temperature": 1, "top_k": 40, "seed": 0, "ignore_eot": True, "guess": False}
        list(model.samples(text, length=65, progress=lambda _: clock.append(perf_counter()), **settings))
        return median(end - start for start, end in pairwise(clock))

    def drawn(guess):
        """Tokens drawn from all, which hardly ever repeat any."""
        return sum(step_seconds(model, prompt, 65, temperature=1, seed=0, guess=guess)[1:]) / 64

    def repeated(guess):
        return sum(step_seconds(repeating, prompt, 129, guess=guess)[1:]) / 128

    yield beside("draw with top-k 40 as text, beside greedy tokens", as_text, greedy)
    yield beside("no repetition, beside no guesses", lambda: drawn(True), lambda: drawn(False))
    yield beside("repetition, beside no guesses", lambda: repeated(True), lambda: repeated(False))


def parts(folder, _):
    """What a pass takes its time for, in all of its layers together. The loop is what is left."""
    model, took = npgpt2.load(folder / "model.npz"), defaultdict(float)
    for place, name, part in (
        (kernels, "linear", "products"),
        (Reading, "attend", "attention"),
        (kernels, "layer_norm", "norms"),
        (kernels, "gelu", "GELU"),
        (Sampling, "choose", "sampling"),
    ):
        setattr(place, name, timed(getattr(place, name), took, part))
    passes = {f"{rows} of context {CONTEXT}": writing_steps(model, [CONTEXT] * rows) for rows in (1, 8)}
    for title, steps in {**passes, "prefill of 512": reading_steps(model, 512)}.items():
        each = []
        for step in steps:
            took.clear()
            whole = seconds(step)
            each.append({"a pass": whole, **took, "the loop": whole - sum(took.values())})
        for part in each[0]:
            yield f"{title}: {part}", "ms", {"npgpt2": 1e3 * median(pass_[part] for pass_ in each)}


def timed(function, took, part):
    """The same function, whose seconds are added to a part's."""

    def call(*arguments):
        start = perf_counter()
        result = function(*arguments)
        took[part] += perf_counter() - start
        return result

    return call


def drafts(folder, _):
    """The bundled model made deep, and as it was as its draft: noise in the added layers makes them disagree."""
    draft, prompt = npgpt2.load(), random_tokens(32, most=npgpt2.load().hparams.n_vocab)
    for noise in (0, 0.1, 0.2, 0.23, 0.3):
        arrays, hparams = deepened(draft, LAYERS, noise)
        with_draft, without = (npgpt2.GPT2(arrays, hparams, draft=one) for one in (draft, None))
        settings = {"length": 129, "temperature": 1, "seed": 0}
        text = [*prompt, *with_draft.generate_tokens(prompt, **settings).tolist()]
        both = [drawn_at_each(model, text[:-1], settings["seed"])[len(prompt) - 1 :] for model in (draft, without)]
        right = np.mean([ours == theirs for ours, theirs in zip(*both, strict=True)])

        def token(model, settings=settings):
            return sum(step_seconds(model, prompt, **settings)[1:]) / (settings["length"] - 1)

        figure = f"a draft that is right {right:.0%} of the time, beside none"
        yield beside(figure, lambda: token(with_draft), lambda: token(without), times=3)  # noqa: B023


def deepened(model, layers, noise):
    """A model's arrays and sizes with more layers, which add what random projections of this deviation make."""
    rng, hparams = np.random.default_rng(0), model.hparams._replace(n_layer=layers)
    arrays = {}
    for name, shape in variable_shapes(hparams).items():
        if name in model.weights:
            arrays[name] = model.weights[name]
        elif name.endswith("/w"):
            deviation = noise / layers**0.5 if "c_proj" in name else 0.02
            arrays[name] = rng.standard_normal(shape, np.float32) * np.float32(deviation)
        else:
            arrays[name] = np.full(shape, name.endswith("/g"), np.float32)
    return arrays, hparams


def drawn_at_each(model, tokens, seed):
    """What a model draws after each token of a text, at temperature 1."""
    sampling = Sampling(temperature=1, seed=seed)
    numbers = sampling.numbers()
    return [sampling.choose(row, numbers(place)) for place, row in enumerate(model.logits(tokens), 1)]


def many_callers(folder, _):
    """A long prompt that arrives while others write, and others whose lengths differ."""
    model = npgpt2.load(folder / "model.npz")
    arriving(model)  # which reads the file
    rounds = [arriving(model) for _ in range(3)]
    quiet, reading, firsts, alone = (
        [1e3 * took for each in kind for took in each] for kind in zip(*rounds, strict=True)
    )
    usual, longest, among = median(quiet), max(reading), f"{WRITERS} write"
    yield f"{among}: a token, while nobody arrives", "ms", {"npgpt2": usual}
    yield f"{among}: a token, while {ARRIVING} are read", "ms", {"npgpt2": median(reading), "beside": usual}
    yield f"{among}: longest wait, while {ARRIVING} are read", "ms", {"npgpt2": longest}
    yield f"  by the median of those (below {LONGEST_WAIT})", "times", {"npgpt2": longest / median(reading)}
    yield f"  by the median, nobody arriving (below {LONGEST_WAIT})", "times", {"npgpt2": longest / usual}
    yield f"first token of {ARRIVING}, beside alone", "ms", {"npgpt2": median(firsts), "beside": median(alone)}
    even = [sum(LENGTHS) // len(LENGTHS)] * len(LENGTHS)
    both = [(writing(model, LENGTHS), writing(model, even)) for _ in range(5)]
    ours, theirs = (1e3 * median(values) for values in zip(*both, strict=True))
    figure = f"{WRITERS} of {min(LENGTHS)} to {max(LENGTHS)}, beside {WRITERS} of {even[0]}"
    yield figure, "ms/step", {"npgpt2": ours, "beside": theirs}


def arriving(model):
    """Seconds between two tokens of those that write, before a prompt arrives and while it is read, and to its first
    token, then and in an engine of its own; each a list."""
    engine = npgpt2.Engine(model, text=False)
    writers = start_writing(engine, [CONTEXT] * WRITERS)
    quiet = waits(engine, writers, lambda: len(writers[0].tokens) < 20)
    prompt, start = random_tokens(ARRIVING, WRITERS), perf_counter()
    request = engine.submit(prompt, length=1)
    reading = waits(engine, writers, lambda: not request.tokens)
    first = perf_counter() - start
    alone = npgpt2.Engine(model, text=False)
    alone.submit(prompt, length=1)
    return quiet, reading, [first], [seconds(alone.step)]


def waits(engine, writers, going):
    """Seconds between two tokens of each writer, as long as `going` says; from now to the first of them."""
    last, took = dict.fromkeys(writers, perf_counter()), []
    while going():
        events, now = engine.step(), perf_counter()
        for event in events:
            if event.request in last:
                took.append(now - last[event.request])
                last[event.request] = now
    return took


def writing(model, contexts):
    """Seconds of a step in which sequences of such lengths write."""
    return median(map(seconds, writing_steps(model, contexts)))


def writing_steps(model, contexts):
    engine = npgpt2.Engine(model, chunk=sum(contexts), text=False)
    start_writing(engine, contexts)
    yield from [engine.step] * 16


def reading_steps(model, context):
    """Each of which reads a prompt, in an engine of its own; after a first that doesn't count."""
    engines = [npgpt2.Engine(model, slots=1, text=False) for _ in range(3)]
    for engine in engines:
        engine.submit(random_tokens(context), length=1)
    engines[0].step()
    yield from [engine.step for engine in engines[1:]]


def start_writing(engine, contexts):
    """Submit prompts of such lengths, and read them until each is being continued."""
    writers = [engine.submit(random_tokens(n, i), length=500, guess=False) for i, n in enumerate(contexts)]
    while not all(writer.tokens for writer in writers):
        engine.step()
    return writers


def batches(folder, _):
    """`npgpt2 batch` with the bundled model, from its start to its end, beside an engine that has read the requests."""
    model, rng = npgpt2.load(), np.random.default_rng(0)
    asked = list(zip(random_prompts(REQUESTS), rng.integers(4, 33, REQUESTS).tolist(), strict=True))
    bodies = [{"prompt": prompt, "max_tokens": length, "ignore_eos": True} for prompt, length in asked]
    write_requests(folder / "requests.jsonl", bodies)

    def engine():
        engine = npgpt2.Engine(model, SLOTS)
        for number, (prompt, length) in enumerate(asked):
            engine.submit(prompt, length=length, temperature=1, seed=number, ignore_eot=True)
        while engine.busy:
            engine.step()

    both = [(answer_requests(folder)[0], seconds(engine)) for _ in range(3)]
    ours, theirs = (sum(length for _, length in asked) / median(took) for took in zip(*both, strict=True))
    yield f"{REQUESTS:,} requests, {SLOTS} at once, beside an engine", "tokens/s", {"npgpt2": ours, "beside": theirs}


def workers(folder, _):
    """`npgpt2 batch --dask local` with the bundled model, one worker and two of a thread each, that have loaded it."""
    from npgpt2.serving.cluster import connect

    lengths = np.random.default_rng(0).integers(4, 33, REQUESTS).tolist()
    bodies = zip(random_prompts(REQUESTS), lengths, strict=True)
    path = folder / "requests.jsonl"
    write_requests(path, ({"prompt": text, "max_tokens": n, "ignore_eos": True} for text, n in bodies))
    rates = []
    for count in (1, 2):
        with connect("local", count, threads=1) as cluster:
            took = [seconds(lambda: answer_on_cluster(cluster, path, folder / "answers.jsonl")) for _ in range(3)]
        rates.append(sum(lengths) / median(took[1:]))
        figure = f"{REQUESTS:,} requests, {count} worker{'s' * (count > 1)} of a thread"
        yield figure, "tokens/s", {"npgpt2": rates[-1], "beside": rates[0]}


def answer_on_cluster(cluster, path, output):
    """What `npgpt2 batch --dask` does when it has connected, with the bundled model."""
    from npgpt2.serving import Answers, Origin, Requests, check, unanswered
    from npgpt2.serving import run as run_batch
    from npgpt2.serving.cluster import Work, on_cluster

    output.unlink(missing_ok=True)
    model = npgpt2.load()
    origin = Origin("storyteller", model.weights.fingerprint(), 0)
    requests = Requests(path, model, ["storyteller"], origin.fingerprint)
    plan = check(requests)
    with Answers(output) as answers:
        wanted, _ = unanswered(plan, requests, answers)
        work = Work(str(model.weights.path), origin, SLOTS, cluster.threads)
        runner = on_cluster(cluster.client, work, int(plan.tokens.sum()))
        if run_batch(plan, wanted, requests, answers, runner, lambda written, saved: None):
            raise RuntimeError("workers answered with errors")


def batch_memory(folder, _):
    """Peak memory of `npgpt2 batch`, and of a file with many times as many requests, by a very small model."""
    model = folder / "tiny.npz"
    run("-m", "npgpt2", "convert", Path(__file__).parents[1] / "tests" / "fixtures" / "tiny", "-o", model)
    peaks = []
    for count in (REQUESTS, TIMES * REQUESTS):
        write_requests(folder / "requests.jsonl", ({"prompt": text, "max_tokens": 1} for text in random_prompts(count)))
        peaks.append(answer_requests(folder, "-m", model)[1] / 1e6)
        yield f"peak memory of {count:,} requests", "MB", {"npgpt2": peaks[-1], "beside": peaks[0]}


def answer_requests(folder, *options):
    """What `run` says of `npgpt2 batch`."""
    (folder / "answers.jsonl").unlink(missing_ok=True)
    words = ["batch", folder / "requests.jsonl", "-o", folder / "answers.jsonl", "--slots", SLOTS]
    return run("-m", "npgpt2", *words, *options)


def write_requests(path, bodies):
    with open(path, "w", encoding="utf-8") as file:
        for number, body in enumerate(bodies):
            said = {"custom_id": f"request {number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(said) + "\n")


def random_prompts(count):
    """Texts of 4 to 20 words."""
    rng, words = np.random.default_rng(0), __doc__.split()
    for _ in range(count):
        yield " ".join(rng.choice(words, rng.integers(4, 21)))


def growth(folder, _):
    """How much memory 1,000 tokens take beyond the cache."""
    try:
        import resource
    except ImportError:  # Windows
        return
    model, used = npgpt2.load(folder / "model.npz"), []
    engine = npgpt2.Engine(model, slots=1, text=False)
    prompt = [464, 3290, 318]
    engine.submit(prompt, length=1000, guess=False)
    for step in range(1000):
        engine.step()
        if step in (20, 999):
            cache = 2 * 4 * model.hparams.n_layer * model.hparams.n_embd * (len(prompt) + step)
            used.append(resident_bytes(resource.getrusage(resource.RUSAGE_SELF)) - cache)
    yield "growth of peak memory, beyond the cache's", "MB", {"npgpt2": (used[1] - used[0]) / 1e6}


def random_tokens(number, seed=0, most=HPARAMS.n_vocab):
    return np.random.default_rng(seed).integers(0, most, number).tolist()


def step_seconds(model, prompt, length, **settings):
    """How long each step took that generating so many tokens takes, of which the first reads the prompt."""
    engine = npgpt2.Engine(model, slots=1, text=False)
    engine.submit(prompt, length=length, **settings)
    took = []
    while engine.busy:
        took.append(seconds(engine.step))
    return took


def beside(figure, one, other, times=5):
    """A row about two ways, which take turns after a first time that doesn't count."""
    one(), other()
    both = [(one(), other()) for _ in range(times)]
    ours, theirs = (1e3 * median(values) for values in zip(*both, strict=True))
    return figure, "ms/token", {"npgpt2": ours, "beside": theirs}


STAGES = {
    stage.__name__: stage
    for stage in (
        checkpoint,
        convert,
        start,
        parts,
        two_ways,
        drafts,
        many_callers,
        batches,
        workers,
        batch_memory,
        served,
        growth,
    )
}


def main(stage, folder, *other):
    checkouts = {"npgpt2": None} | ({other[0]: Path(other[1])} if other else {})
    print(json.dumps(list(STAGES[stage](Path(folder), checkouts))))


if __name__ == "__main__":
    main(*sys.argv[1:])
