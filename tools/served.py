"""A stage of `stages.py`: `npgpt2 serve` with many clients at once, beside an engine that has the same requests."""

import json
import re
from contextlib import contextmanager
from http.client import HTTPConnection
from statistics import median
from subprocess import DEVNULL
from threading import Barrier, Thread
from time import perf_counter

import numpy as np
from machine import start_python

import npgpt2

CLIENTS, CONTEXT, LENGTH = 16, 64, 128
# A prompt that comes while they write, and how many such.
JOINING, TIMES = 32, 3


def served(folder, _):
    """What many clients get together, and how long one waits that joins them."""
    model = npgpt2.load(folder / "model.npz")
    rng = np.random.default_rng(0)

    def random_prompts(count, length):
        """New ones each time, since a server remembers what it has read."""
        return rng.integers(0, model.hparams.n_vocab, (count, length)).tolist()

    def library(prompts):
        engine = npgpt2.Engine(model, CLIENTS)
        settings = {"length": LENGTH, "temperature": 1, "ignore_eot": True}
        times = {engine.submit(prompt, seed=number, **settings): [] for number, prompt in enumerate(prompts)}
        while engine.busy:
            for event in engine.step():
                times[event.request].append(perf_counter())
        return times.values()

    with serving(folder / "model.npz", CLIENTS + 1) as port:
        ours, theirs, waits = [], [], []
        for _ in range(TIMES + 1):  # the first doesn't count
            prompts = random_prompts(CLIENTS, CONTEXT)
            theirs.append(rate(library(prompts)))
            ours.append(rate(at_once(port, [body(prompt, LENGTH, number) for number, prompt in enumerate(prompts)])))
        for _ in range(TIMES):
            waits.append(joining(port, random_prompts(CLIENTS, CONTEXT), *random_prompts(1, JOINING)))
    figure = f"{CLIENTS} clients of `npgpt2 serve`, all writing, beside an engine"
    yield figure, "tokens/s", {"npgpt2": median(ours[1:]), "beside": median(theirs[1:])}
    first, between = (median(values) for values in zip(*waits, strict=True))
    yield f"first token of {JOINING} that join them", "ms", {"npgpt2": 1e3 * first}
    yield "  by the time between theirs (below 5)", "times", {"npgpt2": first / between}


def rate(streams):
    """Tokens a second of all streams together, while all of them write. streams: when each token of each came"""
    start, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    return sum(start < time <= end for times in streams for time in times) / (end - start)


def body(prompt, length, seed):
    settings = {"max_tokens": length, "seed": seed, "ignore_eos": True, "stream": True}
    return json.dumps({"prompt": prompt} | settings).encode()


@contextmanager
def serving(model, slots):
    """A server in a process of its own, which stands for what its port is."""
    with start_python("-m", "npgpt2", "serve", "-m", model, "--port", 0, "--slots", slots, stderr=DEVNULL) as process:
        try:
            yield int(re.search(r":(\d+)$", process.stdout.readline())[1])
        finally:
            process.terminate()


def at_once(port, bodies):
    """When each token of each stream came, as lists, of requests that are sent at the same time."""
    times, ready = [[] for _ in bodies], Barrier(len(bodies))

    def ask(number):
        connection = HTTPConnection("127.0.0.1", port)
        connection.connect()
        ready.wait()
        times[number] += tokens_of(connection, bodies[number])

    threads = [Thread(target=ask, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def tokens_of(connection, body):
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            yield perf_counter()
    connection.close()


def joining(port, prompts, prompt):
    """Seconds to the first token of a prompt that joins others that write, and between two of theirs."""
    others = [[] for _ in prompts]

    def ask(number):
        for when in tokens_of(HTTPConnection("127.0.0.1", port), body(prompts[number], LENGTH, number)):
            others[number].append(when)

    threads = [Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    while min(map(len, others)) < 10:
        threads[0].join(0.01)
    start = perf_counter()
    first = next(tokens_of(HTTPConnection("127.0.0.1", port), body(prompt, 1, 0))) - start
    for thread in threads:
        thread.join()
    return first, float(np.median(np.diff(others[0][10:])))
