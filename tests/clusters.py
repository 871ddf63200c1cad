"""What the tests of batches on Dask clusters share: requests that take a while, and a run whose messages are kept."""

import json
import os
import time

import npgpt2
from npgpt2.serving import Answers, Origin, Requests, check, on_engine, run, unanswered
from npgpt2.serving.cluster import Work, on_cluster
from npgpt2.weights import Weights

# When the requests were written, which answers say.
CREATED = 1_790_000_000


def write_requests(path, count=120, ids=None):
    """Requests for the model `tiny`, of different lengths, greedy and drawn, some of several texts."""
    with open(path, "w", encoding="ascii") as file:
        for i in range(count):
            body = {
                "prompt": "A language model",
                "max_tokens": 1 + 7 * i % 40,
                "temperature": i % 3 / 2,
                "n": 1 + i % 2,
            }
            name = (ids or {}).get(i, f"r{i}")
            said = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(said) + "\n")
    os.utime(path, (CREATED, CREATED))
    return path


def answer(path, output, file, client=None, each=lambda: None, slots=4, patience=30.0, work=None):
    """Answer requests as the command does, on a cluster's workers, or without one here; returns what was said.

    each: called again and again meanwhile · work: what the workers are asked for, if it is to be another
    """
    weights = Weights(file)
    model, said = npgpt2.GPT2(weights), []
    requests = Requests(path, model, [file.stem], weights.fingerprint())
    plan, origin = check(requests), Origin(file.stem, weights.fingerprint(), CREATED)
    with Answers(output) as answers:
        wanted, _ = unanswered(plan, requests, answers)
        runner = on_engine(model, origin, slots)
        if client:
            tokens = int(plan.tokens[wanted].sum())
            runner = on_cluster(client, work or Work(str(file), origin, slots), tokens, said.append, patience)
        run(plan, wanted, requests, answers, runner, lambda written, saved: each())
    return said


def lines_of(output):
    """The answers there are, in an order of their own."""
    return sorted(output.read_bytes().splitlines()) if output.exists() else []


def wait_until(condition, seconds=60.0):
    """Wait for a condition, which has so many seconds to come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
