"""`npgpt2 batch --dask` with real processes that are killed and stopped: what is written is what one machine writes."""

import logging
import os
import signal
from contextlib import contextmanager
from functools import partial

import pytest
from clusters import answer, lines_of, write_requests
from distributed import Client, LocalCluster

# What each worker runs before all else: passes take longer than they do, so that there is a middle of the run.
SLOW = """
import time
from npgpt2.engine import Engine
def slow(self, step=Engine.step):
    time.sleep(0.004)
    return step(self)
Engine.step = slow
"""
# The same, and whoever is given this line dies of it.
POISON = (
    SLOW
    + """
import os
from npgpt2.serving.cluster import worker
def deadly(*arguments, on_engine=worker.on_engine):
    def answers(lines, progress):
        lines = list(lines)
        if any(line.custom_id == "poison" for line in lines):
            os._exit(1)
        return on_engine(*arguments)(iter(lines), progress)
    return answers
worker.on_engine = deadly
"""
)


@contextmanager
def cluster(workers=2, preload=SLOW):
    """A cluster of processes, and a client of it."""
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
            preload=[preload],
        ) as made,
        Client(made) as client,
    ):
        yield made, client


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Requests, and the answers of this machine by itself."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = write_requests(folder / "requests.jsonl")
    answer(path, folder / "answers.jsonl", tiny)
    return path, lines_of(folder / "answers.jsonl")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "answers.jsonl"


def pids(client):
    return list(client.run(os.getpid).values())


class Fault:
    """Something that happens once, when the first answers are there."""

    def __init__(self, output, happen):
        self.output, self.happen, self.happened = output, happen, False

    def __call__(self):
        if not self.happened and lines_of(self.output):
            self.happened = True
            self.happen()


def test_a_worker_that_is_killed_changes_nothing(undisturbed, output, tiny):
    path, expected = undisturbed
    with cluster() as (_, client):
        victim = pids(client)[0]
        fault = Fault(output, partial(os.kill, victim, signal.SIGKILL))
        said = answer(path, output, tiny, client, fault)
    assert fault.happened
    assert any("it died" in line for line in said)
    assert lines_of(output) == expected


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_worker_that_is_stopped_changes_nothing_nor_when_it_goes_on(when, undisturbed, output, tiny):
    path, expected = undisturbed
    with cluster() as (_, client):
        victim = pids(client)[0]
        fault = Fault(output, partial(os.kill, victim, signal.SIGSTOP))
        if when == "before":
            fault.happen()
        try:
            said = answer(path, output, tiny, client, fault if when == "meanwhile" else lambda: None, patience=3)
        finally:
            os.kill(victim, signal.SIGCONT)
        assert lines_of(output) == expected
        assert any("no sign of life" in line for line in said)
        output.unlink()
        answer(path, output, tiny, client)
        assert lines_of(output) == expected


def test_a_line_that_kills_whoever_is_given_it_is_an_error_and_the_others_are_answered(undisturbed, tmp_path, tiny):
    _, expected = undisturbed
    path, output = write_requests(tmp_path / "requests.jsonl", ids={57: "poison"}), tmp_path / "answers.jsonl"
    with cluster(preload=POISON) as (_, client):
        answer(path, output, tiny, client)
    (error,) = set(lines_of(output)) - set(expected)
    assert b'"poison"' in error
    assert b'"status_code": 500' in error
    assert len(lines_of(output)) == len(expected)
    assert set(expected) - set(lines_of(output)) == {line for line in expected if b'"custom_id": "r57"' in line}
