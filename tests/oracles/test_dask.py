"""`npgpt2 batch --dask` with real processes that are killed and stopped: what is written is what one machine writes."""

import logging
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import psutil
import pytest
from clusters import answer, lines_of, wait_until, write_requests
from distributed import Client, LocalCluster

from npgpt2.serving.cluster import connect

# What each worker runs before all else: passes take longer than they do, so that there is a middle of the run.
SLOW = """
import time
from npgpt2.engine import Engine
def slow(self, step=Engine.step):
    time.sleep(0.002)
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
    """A cluster of processes, and a client of it. Dask leaves in this process what it sets for theirs."""
    with (
        patch.dict(os.environ),
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


def test_a_local_cluster_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with connect("local", workers=1, threads=1):
        assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    assert os.environ == before


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


def test_a_cluster_that_starts_workers_when_there_is_something_to_do_does(undisturbed, output, tiny):
    path, expected = undisturbed
    with cluster(workers=0) as (made, client):
        made.adapt(minimum=0, maximum=2, interval="200 ms")
        answer(path, output, tiny, client)
    assert lines_of(output) == expected


# ---- The command, in a process of its own


@contextmanager
def command(path, output, tiny, where, *options, **more):
    """`npgpt2 batch --dask`, which is killed at the end if it hasn't ended."""
    words = [sys.executable, "-m", "npgpt2", "batch", path, "-o", output, "-m", tiny, "--slots", "4", "--dask", where]
    words += options
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*map(str, words)], **pipes, **more) as process:
        try:
            yield process
        finally:
            process.kill()


def begun(process, output):
    wait_until(lambda: lines_of(output) or process.poll() is not None)
    assert process.poll() is None, process.communicate()


def test_a_client_that_is_killed_goes_on_where_it_was(undisturbed, output, tiny):
    path, expected = undisturbed
    with cluster() as (made, _):
        with command(path, output, tiny, made.scheduler_address) as process:
            begun(process, output)
        left = lines_of(output)
        assert 0 < len(left) < len(expected)
        with command(path, output, tiny, made.scheduler_address) as process:
            out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == (f"{output}: {len(expected)} answers, 0 errors\n", 0), err
    assert set(left) < set(lines_of(output))
    assert lines_of(output) == expected


# A scheduler, and whatever it says is there when it listens.
SCHEDULER = """
import asyncio, sys
from distributed import Scheduler
async def main():
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address=None) as scheduler:
        print(scheduler.address, flush=True)
        await scheduler.finished()
asyncio.run(main())
"""


@contextmanager
def scheduler(before=""):
    """A scheduler's process, which runs something before all else, and its address."""
    words = [sys.executable, "-c", before + SCHEDULER]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def worker(address, before=SLOW):
    """A worker's process without a nanny."""
    program = (
        "import asyncio, sys\nfrom distributed import Worker\n"
        + before
        + f"""
async def main():
    async with Worker({address!r}, nthreads=1, dashboard=False) as worker:
        await worker.finished()
asyncio.run(main())
"""
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_run_ends_with_the_scheduler_and_goes_on_with_another(undisturbed, output, tiny):
    path, expected = undisturbed
    with scheduler() as (first, address), worker(address), command(path, output, tiny, address) as process:
        begun(process, output)
        first.kill()
        out, err = process.communicate(timeout=20)
    assert (out, process.returncode) == ("", 1)
    assert err.splitlines()[-1] == f"npgpt2: {address}: the scheduler is gone; run again to go on"
    assert 0 < len(lines_of(output)) < len(expected)
    with scheduler() as (_, address), worker(address), command(path, output, tiny, address) as process:
        assert process.wait(timeout=60) == 0
    assert lines_of(output) == expected


def test_a_scheduler_that_is_stopped_is_not_waited_for_forever(undisturbed, output, tiny):
    path, _ = undisturbed
    with scheduler() as (stopped, address), worker(address), Client(address) as client:
        fault = Fault(output, partial(os.kill, stopped.pid, signal.SIGSTOP))
        with pytest.raises(ConnectionError, match="the scheduler doesn't answer; run again to go on"):
            answer(path, output, tiny, client, fault, patience=2)
        os.kill(stopped.pid, signal.SIGCONT)


def test_where_all_workers_are_gone_it_waits_for_one_and_says_so(undisturbed, output, tiny):
    path, expected = undisturbed
    with scheduler() as (_, address), command(path, output, tiny, address) as process:
        said = process.stderr.readline()
        assert said == f"npgpt2: {address}: no workers; waiting for one\n"
        with worker(address) as first:
            begun(process, output)
            first.kill()
            said = [process.stderr.readline() for _ in range(3)]
        assert "it died" in said[1]
        assert said[2] == f"npgpt2: {address}: no workers; waiting for one\n"
        assert len(lines_of(output)) < len(expected)
        with worker(address):
            assert process.wait(timeout=60) == 0
    assert lines_of(output) == expected


MISSING = "import sys\nsys.modules['npgpt2'] = None\n"


def test_workers_and_schedulers_without_npgpt2_are_not_waited_for(undisturbed, output, tiny):
    path, expected = undisturbed
    with scheduler(MISSING) as (_, address), worker(address, MISSING) as first:
        with command(path, output, tiny, address) as process:
            out, err = process.communicate(timeout=60)
        assert (out, process.returncode) == ("", 1)
        assert err.splitlines()[-1].startswith(f"npgpt2: {address}: no worker there can answer; tcp://")
        assert "hasn't got npgpt2" in err.splitlines()[-1]
        with worker(address), command(path, output, tiny, address) as process:
            assert process.wait(timeout=60) == 0
        assert first.poll() is None
    assert lines_of(output) == expected


@pytest.mark.parametrize("where", ["local", "local, one of them stopped", "another"])
def test_ctrl_c_ends_it_at_once_with_whole_lines(where, undisturbed, output, tiny):
    """As a terminal sends it: to all processes."""
    path, expected = undisturbed
    preload = {"DASK_DISTRIBUTED__WORKER__PRELOAD": SLOW}
    with scheduler() as (_, address), worker(address):
        words = ["local", "--workers", "2"] if "local" in where else [address]
        with command(path, output, tiny, *words, start_new_session=True, env=os.environ | preload) as process:
            begun(process, output)
            workers = workers_of(process)
            if "stopped" in where:
                os.kill(workers[0], signal.SIGSTOP)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=20)
        assert len(workers) == (2 if "local" in where else 0)
        wait_until(lambda: not any(map(runs, workers)))
    assert (out, process.returncode) == ("", 130)
    assert "Traceback" not in err
    left = output.read_bytes()
    assert left.endswith(b"\n")
    assert set(left.splitlines()) < set(expected)


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def workers_of(process):
    """The processes of a command's local workers."""
    children = psutil.Process(process.pid).children()
    return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]
