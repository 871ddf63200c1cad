"""Batches on a Dask cluster: what happens to lines where workers die, freeze, fail, come and go.

Dask's place is taken by a stand-in, to which anything can happen at any moment; with real processes, which take longer,
`oracles/test_dask.py` does the same.
"""

import asyncio
import json
import pickle
import socket
import sys
import threading
from concurrent.futures import CancelledError
from contextlib import suppress

import pytest
from clusters import FakeClient, Never, answer, lines_of, wait_until, write_requests
from commands import failed
from distributed import LocalCluster

import npgpt2
from npgpt2 import Engine
from npgpt2.serving import Origin, Requests, answers
from npgpt2.serving.cluster import Work, connect, runner
from npgpt2.serving.cluster import client as client_module
from npgpt2.serving.cluster import worker as on_worker
from npgpt2.serving.cluster.jobs import LOSSES, Job, Jobs
from npgpt2.serving.cluster.worker import Problem, Report, answer_lines, packed
from npgpt2.weights import Weights

COUNT = 40


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Requests, and the answers of this machine by itself."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = write_requests(folder / "requests.jsonl", COUNT)
    answer(path, folder / "answers.jsonl", tiny)
    return path, lines_of(folder / "answers.jsonl")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "answers.jsonl"


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(runner, "packed", lambda work, lines: (work, lines))
    monkeypatch.setattr(answers, "STEP", 0.0)
    for name, seconds in (("LOOK", 0.01), ("TICK", 0.01), ("QUIET", 0.1)):
        monkeypatch.setattr(runner, name, seconds)
    made = FakeClient()
    yield made
    made.close()


def ids(lines):
    return [line.custom_id for line in lines]


def errors(output):
    """The errors among answers, by the names of their requests."""
    found = {}
    for line in lines_of(output):
        said = json.loads(line)
        if said["response"]["status_code"] != 200:
            found[said["custom_id"]] = said["response"]["body"]["error"]["message"]
    return found


# ---- Whatever happens to workers


@pytest.mark.parametrize("workers", [1, 3])
def test_it_is_answered_as_on_one_machine(workers, client, undisturbed, output, tiny):
    path, expected = undisturbed
    made = [client.add(f"w{i}") for i in range(workers)]
    said = answer(path, output, tiny, client)
    assert lines_of(output) == expected
    assert all(worker.asked[0] == [] and len(worker.asked) > 1 for worker in made)
    assert len(said) == 1
    assert "computes with" in said[0]


def test_no_worker_has_more_than_two_micro_batches(client, undisturbed, output, tiny):
    path, expected = undisturbed
    most, having = [], {"w0": 0, "w1": 0}

    submit = client.submit

    def watched(*arguments, workers, **more):
        future = submit(*arguments, workers=workers, **more)
        having[workers[0]] += 1
        most.append(having[workers[0]])
        return future

    def note(work, lines, worker):
        having[next(name for name, other in client.workers.items() if other is worker)] -= 1
        return answer_lines(work, lines)

    client.submit = watched
    client.add("w0", note)
    client.add("w1", note)
    answer(path, output, tiny, client)
    assert max(most) == 2
    assert lines_of(output) == expected


def kill(client, name, again=None):
    """A worker's process is gone; where its nanny starts another, that has the same or another address."""
    del client.workers[name]
    if again:
        client.add(*again)


@pytest.mark.parametrize("again", [None, "w0", "w9"])
def test_what_a_dead_worker_had_is_done_by_others(again, client, undisturbed, output, tiny):
    path, expected = undisturbed

    def die(work, lines, worker):
        if not lines:
            return answer_lines(work, lines)
        kill(client, "w0", again and (again,))
        raise Never

    client.add("w0", die)
    client.add("w1")
    said = answer(path, output, tiny, client)
    assert lines_of(output) == expected
    assert "worker w0: it died; others are given its requests" in said


def test_what_a_frozen_worker_had_is_done_by_others_and_what_it_says_later_is_not_heard(
    client, undisturbed, output, tiny
):
    path, expected = undisturbed
    frozen = []

    def freeze(work, lines, worker):
        if lines and not frozen:
            frozen.extend(ids(lines))
            worker.frozen = True
        return answer_lines(work, lines)

    def wake(work, lines, worker):
        if set(ids(lines)) & set(frozen):
            client.workers["w0"].frozen = False
        return answer_lines(work, lines)

    client.add("w0", freeze)
    client.add("w1", wake)
    said = answer(path, output, tiny, client, patience=0.2)
    assert frozen
    assert lines_of(output) == expected
    assert "worker w0: it gave no sign of life for 0.2 s; others are given its requests" in said


def test_a_worker_that_is_about_to_end_is_given_nothing_and_not_blamed(client, undisturbed, output, tiny, monkeypatch):
    path, expected = undisturbed
    lost = []
    monkeypatch.setattr(Jobs, "lose", lambda self, job, why: lost.append(job) or [])

    def leave(work, lines, worker):
        if not lines:
            return answer_lines(work, lines)
        worker.status = "closing_gracefully"
        raise Never

    async def identity():
        """It is gone when it has been seen to be about to."""
        said = await client.identity()
        if "w0" in client.workers and leaving.status != "running":
            kill(client, "w0")
        return said

    client.scheduler.identity = identity
    leaving = client.add("w0", leave)
    client.add("w1")
    answer(path, output, tiny, client)
    assert lines_of(output) == expected
    assert len(leaving.asked) <= 3
    assert lost == []


def test_a_worker_that_pauses_for_long_is_not_waited_for(client, undisturbed, output, tiny):
    """As Dask's do that are short of memory, which give signs of life all along."""
    path, expected = undisturbed

    def pause(work, lines, worker):
        if not lines:
            return answer_lines(work, lines)
        worker.status = "paused"
        raise Never

    client.add("w0", pause)
    client.add("w1")
    said = answer(path, output, tiny, client, patience=0.2)
    assert lines_of(output) == expected
    assert "worker w0: it has been paused for 0.2 s; others are given its requests" in said


def deadly(names, deaths):
    """A worker that some lines kill, in whose place another is started."""

    def does(work, lines, worker):
        among = set(ids(lines)) & names
        if not among:
            return answer_lines(work, lines)
        client, name = deaths["client"], next(n for n, other in deaths["client"].workers.items() if other is worker)
        deaths.setdefault("lines", []).append(ids(lines))
        kill(client, name, (f"{name}'", does))
        raise Never

    return does


@pytest.mark.parametrize("names", [{"r7"}, {"r7", "r8", "r30"}])
def test_a_line_that_kills_whoever_is_given_it_is_an_error_and_all_others_are_answered(
    names, client, undisturbed, output, tiny
):
    path, expected = undisturbed
    deaths = {"client": client}
    for name in ("w0", "w1"):
        client.add(name, deadly(names, deaths))
    answer(path, output, tiny, client)
    message = f"given up after {LOSSES} workers died of it, or failed: it died"
    assert errors(output) == dict.fromkeys(names, message)
    good = [line for line in expected if json.loads(line)["custom_id"] not in names]
    assert [line for line in lines_of(output) if line in set(expected)] == good
    assert len(lines_of(output)) == len(expected)
    for name in names:  # alone, so often, and no more often with others than it takes to find it
        with_it = [lines for lines in deaths["lines"] if name in lines]
        assert sum(len(lines) == 1 for lines in with_it) == LOSSES
        assert len(with_it) <= LOSSES + 3


@pytest.mark.parametrize("names", [{"r7"}, {f"r{number}" for number in range(0, 30, 5)}])
def test_lines_that_workers_fail_at_are_errors_and_all_others_are_answered(names, client, undisturbed, output, tiny):
    """Also where nothing else is left, at which the only worker would succeed."""
    path, expected = undisturbed

    def fail(work, lines, worker):
        if names & set(ids(lines)):
            return Problem("RecursionError: too deep", unfit=False)
        return answer_lines(work, lines)

    client.add("w0", fail)
    said = answer(path, output, tiny, client)
    assert set(errors(output)) == names
    assert all("RecursionError: too deep" in message for message in errors(output).values())
    assert "worker w0: RecursionError: too deep; its requests are tried again" in said
    assert {json.loads(line)["custom_id"] for line in set(expected) - set(lines_of(output))} == names


def test_a_worker_that_fails_at_everything_is_not_given_more(client, undisturbed, output, tiny):
    path, expected = undisturbed
    bad = client.add(
        "w0", lambda work, lines, worker: Problem("MemoryError: ", False) if lines else answer_lines(work, lines)
    )
    client.add("w1")
    answer(path, output, tiny, client)
    assert lines_of(output) == expected
    assert len(bad.asked) <= runner.FAILURES + 2


@pytest.mark.parametrize("outcome", [CancelledError("somebody cancelled it"), RuntimeError("KilledWorker")])
def test_a_task_that_dask_gives_up_is_tried_again(outcome, client, undisturbed, output, tiny):
    path, expected = undisturbed
    raised = []

    def give_up(work, lines, worker):
        if lines and not raised:
            raised.append(outcome)
            raise outcome
        return answer_lines(work, lines)

    client.add("w0", give_up)
    answer(path, output, tiny, client)
    assert raised
    assert lines_of(output) == expected


def test_a_task_that_cannot_be_sent_is_tried_again(client, undisturbed, output, tiny):
    path, expected = undisturbed
    submit, failed = client.submit, []

    def fail_once(function, arguments, **more):
        if arguments[1] and not failed:
            failed.append(arguments)
            raise RuntimeError("no room to send it")
        return submit(function, arguments, **more)

    client.submit = fail_once
    client.add("w0")
    said = answer(path, output, tiny, client)
    assert lines_of(output) == expected
    assert "worker w0: RuntimeError: no room to send it; its requests are tried again" in said


# ---- Workers that can't answer


def test_a_worker_that_cannot_answer_is_told_of_and_others_do_it(client, undisturbed, output, tiny):
    path, expected = undisturbed
    client.add("w0", lambda work, lines, worker: Problem("models/tiny.npz: no such file", True))
    client.add("w1")

    def missing(work, lines, worker):
        raise ModuleNotFoundError("No module named 'npgpt2'")

    client.add("w2", missing)
    said = answer(path, output, tiny, client)
    assert lines_of(output) == expected
    assert "worker w0: models/tiny.npz: no such file" in said
    assert f"worker w2: hasn't got npgpt2 {Work._field_defaults['version']} (No module named 'npgpt2')" in said


def test_where_no_worker_can_answer_it_is_over(client, undisturbed, output, tiny):
    path, _ = undisturbed
    client.add("w0", lambda work, lines, worker: Problem("has npgpt2 0.0.1, where 9 asks", True))
    with pytest.raises(ValueError, match="tcp://fake: no worker there can answer; w0: has npgpt2"):
        answer(path, output, tiny, client)


def test_where_loading_the_model_kills_workers_it_is_over(client, undisturbed, output, tiny):
    path, _ = undisturbed

    def die(work, lines, worker):
        kill(client, "w0", ("w0", die))
        raise Never

    client.add("w0", die)
    with pytest.raises(ValueError, match=f"{LOSSES} workers were lost while they loaded the model"):
        answer(path, output, tiny, client)


def test_without_workers_it_waits_and_says_so(client, undisturbed, output, tiny):
    """And has the cluster see that there is something to do, since some start workers where there is."""
    path, expected = undisturbed
    looks = []

    def join():
        looks.append(client.demanded)
        if client.demanded and not client.workers:
            client.add("w0")

    said = answer(path, output, tiny, client, join)
    assert lines_of(output) == expected
    assert said[0] == "tcp://fake: no workers; waiting for one"
    assert client.demanded == 1


# ---- The scheduler, and the end


def test_it_ends_with_the_scheduler(client, undisturbed, output, tiny):
    path, _ = undisturbed
    client.add("w0")

    def lose():
        if lines_of(output):
            client.status = "connecting"

    with pytest.raises(ConnectionError, match="tcp://fake: the scheduler is gone; run again to go on"):
        answer(path, output, tiny, client, lose)
    wait_until(lambda: all(future.released for future in client.futures))


@pytest.mark.parametrize("how", ["silent", "closed"])
def test_a_scheduler_that_does_not_answer_is_not_waited_for_forever(how, client, undisturbed, output, tiny):
    path, _ = undisturbed

    async def identity():
        if how == "closed":
            raise OSError("closed")
        await asyncio.Event().wait()

    client.scheduler.identity = identity
    with pytest.raises(ConnectionError, match="tcp://fake: the scheduler doesn't answer; run again to go on"):
        answer(path, output, tiny, client, patience=0.1)


def test_a_look_at_the_workers_that_fails_is_the_end(client, undisturbed, output, tiny):
    """Since nobody would ever know of a worker that dies."""
    path, _ = undisturbed

    async def identity():
        return {}

    client.scheduler.identity = identity
    with pytest.raises(KeyError, match="workers"):
        answer(path, output, tiny, client)


def test_ctrl_c_lets_go_of_all_tasks(client, undisturbed, output, tiny):
    path, expected = undisturbed
    client.add("w0")
    client.add("w1")

    def interrupt():
        if len(lines_of(output)) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(path, output, tiny, client, interrupt)
    assert 0 < len(lines_of(output)) < COUNT
    assert set(lines_of(output)) < set(expected)
    wait_until(lambda: all(future.released for future in client.futures))


# ---- Micro-batches


@pytest.fixture
def lines(tiny, undisturbed):
    """A function that gives the requests' lines, in order."""
    weights = Weights(tiny)
    requests = Requests(undisturbed[0], npgpt2.GPT2(weights), ["tiny"], weights.fingerprint())
    return requests.lines


def tokens(job):
    return sum(line.completion.most_tokens for line in job.lines)


def test_a_first_micro_batch_fills_the_slots_and_others_take_ten_seconds(lines):
    jobs = Jobs(lines(), 10**9, slots=4)
    first = jobs.take(pace=0.0, workers=1)
    assert sum(line.completion.sequences for line in first.lines[:-1]) < 4
    assert sum(line.completion.sequences for line in first.lines) >= 4
    second = jobs.take(pace=20.0, workers=1)
    assert second.work >= 200 > second.work - Job(second.lines[-1:]).work
    assert jobs.take(pace=1e6, workers=1).lines[-1].number == COUNT
    assert not jobs.left
    assert jobs.take(pace=1e6, workers=1) is None


def test_the_last_micro_batches_are_small_enough_for_all_to_end_together(lines):
    total = sum(line.completion.most_tokens for line in lines())
    jobs, sizes = Jobs(lines(), total, slots=1), []
    while job := jobs.take(pace=1e6, workers=2):
        sizes.append(tokens(job))
    assert sum(sizes) == total
    assert total / 4 <= sizes[0] < total / 3
    assert max(sizes[-3:]) <= 80
    assert len(sizes) > 6


def test_few_lines_are_read_ahead(lines):
    read = []
    jobs = Jobs((read.append(line.number) or line for line in lines()), 10**9, slots=4)
    for _ in range(3):
        jobs.take(pace=0.0, workers=1)
    assert len(read) <= 13


def test_what_a_worker_died_of_is_cut_up_and_waits_behind_what_nobody_is_to_blame_for(lines):
    jobs = Jobs(iter([]), 0, slots=4)
    all_lines = [*lines()]
    suspect, innocent = Job(all_lines[:10]), Job(all_lines[10:])
    assert jobs.lose(suspect, "it died") == []
    jobs.give_back(innocent)
    assert jobs.take(0.0, 1) is innocent
    assert jobs.suspect
    parts = [jobs.take(0.0, 1) for _ in range(4)]
    assert [line for part in parts for line in part.lines] == all_lines[:10]
    assert [len(part.lines) for part in parts] == [3, 3, 3, 1]
    assert all(part.suspect for part in parts)
    assert not jobs.left


def test_what_a_worker_had_no_time_for_is_cut_up_and_not_suspected(lines):
    jobs = Jobs(iter([]), 0, slots=4)
    all_lines = [*lines()]
    jobs.shorten(Job(all_lines[:10]))
    parts = [jobs.take(0.0, 1) for _ in range(4)]
    assert sorted(line.number for part in parts for line in part.lines) == [*range(1, 11)]
    assert not any(part.suspect for part in parts)
    jobs.shorten(Job(all_lines[:1], suspect=True, losses=2))
    assert (jobs.take(0.0, 1).losses, jobs.left) == (2, False)


# ---- On a worker


@pytest.fixture
def work(tiny):
    return Work(str(tiny), Origin("tiny", Weights(tiny).fingerprint(), 7), slots=2, threads=1)


def test_what_is_sent_is_opened_by_pickle_alone_and_answers(work, lines):
    report = pickle.loads(packed(work, [*lines()][:3]))
    assert isinstance(report, Report)
    assert [number for number, _, _ in sorted(report.answers, key=lambda answer: answer[0])] == [1, 2, 3]
    assert report.threads == 1
    assert report.written > 0


def test_the_model_is_loaded_once(work, lines, monkeypatch):
    loaded, real = [], on_worker.GPT2
    monkeypatch.setattr(on_worker, "GPT2", lambda *arguments, **more: loaded.append(1) or real(*arguments, **more))
    on_worker._load.cache_clear()
    for line in [*lines()][:3]:
        assert isinstance(answer_lines(work, [line]), Report)
    assert len(loaded) == 1


def test_another_version_of_npgpt2_is_said(work):
    assert answer_lines(work._replace(version="9"), []) == Problem(f"has npgpt2 {work.version}, where 9 asks", True)


def test_a_model_that_is_missing_or_another_is_said(work, tmp_path, monkeypatch):
    monkeypatch.setenv("NPGPT2_MODELS", str(tmp_path))
    problem = answer_lines(work._replace(path="elsewhere/tiny.npz"), [])
    assert problem.unfit
    assert "tiny" in problem.why
    other = work._replace(origin=work.origin._replace(fingerprint="0123456789abcdef"))
    problem = answer_lines(other, [])
    assert problem.unfit
    assert problem.why.startswith(f"{work.path}: is another model here, ")


def test_a_model_in_the_workers_own_folder_will_do(work, tiny, tmp_path, monkeypatch):
    (tmp_path / "tiny.npz").write_bytes(tiny.read_bytes())
    monkeypatch.setenv("NPGPT2_MODELS", str(tmp_path))
    assert isinstance(answer_lines(work._replace(path="elsewhere/tiny.npz"), []), Report)


def test_whatever_goes_wrong_with_lines_comes_back_as_a_text(work, lines, monkeypatch):
    def deep(*arguments):
        return deep(*arguments)

    monkeypatch.setattr(on_worker, "on_engine", deep)
    problem = answer_lines(work, [*lines()][:1])
    assert not problem.unfit
    assert problem.why.startswith("RecursionError: ")


def test_a_worker_that_cannot_write_a_single_token_is_unfit(work, lines, monkeypatch):
    def fail(engine):
        raise MemoryError

    monkeypatch.setattr(Engine, "step", fail)
    assert answer_lines(work, [*lines()][:1]) == Problem("MemoryError:", unfit=True)


# ---- Dask itself


def test_the_command_is_answered_by_the_workers_of_an_address_or_a_scheduler_file(run, undisturbed, output, tmp_path):
    """Workers in threads of this process, which share nothing else with the command."""
    path, expected = undisturbed
    with LocalCluster(
        n_workers=2, threads_per_worker=2, processes=False, protocol="tcp://", dashboard_address="127.0.0.1:0"
    ) as cluster:
        scheduler = tmp_path / "scheduler.json"
        scheduler.write_text(json.dumps({"address": cluster.scheduler_address}))
        for where in (cluster.scheduler_address, scheduler):
            status, out, err = run("batch", path, "-o", output, "-m", "MODEL", "--slots", 4, "--dask", where)
            assert (status, out) == (0, f"{output}: {COUNT} answers, 0 errors\n"), err
            assert lines_of(output) == expected
            assert err.startswith("npgpt2: worker tcp://127.0.0.1:")
            output.unlink()
        worker = next(iter(cluster.scheduler_info["workers"]))
        result = run("batch", path, "-o", output, "-m", "MODEL", "--dask", worker)
        failed(result, 1, f"{worker}: no Dask scheduler answers there (it is a Worker)")


def test_a_batch_without_anything_left_to_do_needs_no_cluster(run, undisturbed, output):
    path, _ = undisturbed
    assert run("batch", path, "-o", output, "-m", "MODEL")[0] == 0
    assert run("batch", path, "-o", output, "-m", "MODEL", "--dask", "tcp://127.0.0.1:1")[:2] == (
        0,
        f"{output}: {COUNT} answers, 0 errors\n",
    )


def speak(server, said):
    """Say something to whoever comes, and wait until they leave."""
    connection, _ = server.accept()
    with connection, suppress(ConnectionError):
        connection.sendall(said)
        while connection.recv(2**16):
            pass


def test_what_is_no_cluster_is_said(run, undisturbed, output, tmp_path, monkeypatch):
    path, _ = undisturbed
    words = ("batch", path, "-o", output, "-m", "MODEL", "--dask")
    failed(run(*words, "elsewhere"), 1, "--dask is 'elsewhere'", "tcp://host:8786, a scheduler file, or local")
    failed(run(*words, tmp_path / "missing.json"), 1, "missing.json: No such file")
    (tmp_path / "other.json").write_text("[1]")
    failed(run(*words, tmp_path / "other.json"), 1, "other.json: holds a JSON list")
    (tmp_path / "other.json").write_text('{"address": 5}')
    failed(run(*words, tmp_path / "other.json"), 1, "names no scheduler's address")
    failed(run(*words, "tcp://127.0.0.1", "--workers", "2"), 2, "--workers is for --dask local")
    monkeypatch.setattr(client_module, "CONNECT", 0.2)
    failed(run(*words, "tcp://127.0.0.1:1"), 1, "tcp://127.0.0.1:1: no Dask scheduler answers there")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        (tmp_path / "other.json").write_text(json.dumps({"address": address}))
        failed(run(*words, address), 1, f"{address}: no Dask scheduler answers there")
        failed(run(*words, tmp_path / "other.json"), 1, f"other.json: no Dask scheduler answers at {address}")
    with socket.create_server(("127.0.0.1", 0)) as talking:
        where = f"tcp://127.0.0.1:{talking.getsockname()[1]}"
        speaking = threading.Thread(target=speak, args=(talking, b"SSH-2.0-OpenSSH_9.6\r\n"))
        speaking.start()
        failed(run(*words, where), 1, f"{where}: no Dask scheduler answers there")
        speaking.join()
    for wrong in ("nonsense://127.0.0.1:1", "tcp://", "tls://127.0.0.1:1"):
        failed(run(*words, wrong), 1, f"{wrong}: no Dask scheduler answers there (")
    monkeypatch.setitem(sys.modules, "distributed", None)
    failed(run(*words, "local"), 1, "pip install npgpt2[dask]")


def test_connecting_needs_dask_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.system", None)
    with pytest.raises(ValueError, match=r"pip install npgpt2\[dask\]"), connect("local"):
        pass
