"""What the tests of batches on Dask clusters share: requests that take a while, and a run whose messages are kept."""

import asyncio
import json
import os
import threading
import time
from types import SimpleNamespace

import npgpt2
from npgpt2.serving import Answers, Origin, Requests, check, on_engine, run, unanswered
from npgpt2.serving.cluster import Work, on_cluster
from npgpt2.serving.cluster.worker import answer_lines
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


class FakeFuture:
    """What a task becomes, in time."""

    def __init__(self, outcome):
        self._outcome, self.released = outcome, False

    def __await__(self):
        return self._outcome.__await__()

    def release(self):
        self.released = True


class FakeWorker:
    """A worker, which does at once what it is asked for, unless a test has it do something else.

    does: is given the work, the lines and this; returns or raises what comes of it, or Never
    """

    def __init__(self, does, process):
        self.does, self.process = does, process
        self.frozen, self.status, self.beats, self.asked = False, "running", 0, []


class Never(Exception):
    """No answer comes."""


class FakeClient:
    """Stands for Dask: a scheduler and its workers, in a thread as Dask's client has one, to which anything can happen.

    Tests have the runner send it lines as they are, not packed.
    """

    def __init__(self):
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, daemon=True)
        self._thread.start()
        self.loop, self.status, self.workers, self.futures = SimpleNamespace(asyncio_loop=loop), "running", {}, []
        self.scheduler = SimpleNamespace(address="tcp://fake", identity=self.identity)
        self.demanded = 0

    def add(self, name, does=lambda work, lines, worker: answer_lines(work, lines)):
        self.workers[name] = FakeWorker(does, object())
        return self.workers[name]

    async def identity(self):
        for worker in self.workers.values():
            worker.beats += not worker.frozen
        known = {"local_directory": "process", "last_seen": "beats", "status": "status"}
        return {
            "workers": {
                name: {key: getattr(worker, attribute) for key, attribute in known.items()}
                for name, worker in self.workers.items()
            }
        }

    def submit(self, function, arguments=None, *, key, workers=None, allow_other_workers=False, pure):
        assert not pure
        if arguments is None:
            self.demanded += 1
            return FakeFuture(None)
        (name,) = workers
        self.futures.append(FakeFuture(self._do(name, *arguments)))
        return self.futures[-1]

    async def _do(self, name, work, lines):
        worker = self.workers.get(name)
        if worker is None:
            await asyncio.Event().wait()
        worker.asked.append(lines)
        await asyncio.sleep(0.001)
        try:
            outcome = worker.does(work, lines, worker)
        except Never:
            await asyncio.Event().wait()
        while worker.frozen:
            await asyncio.sleep(0.001)
        return outcome

    def close(self):
        async def end():
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop.asyncio_loop).result()
        self.loop.asyncio_loop.call_soon_threadsafe(self.loop.asyncio_loop.stop)
        self._thread.join()
        self.loop.asyncio_loop.close()
