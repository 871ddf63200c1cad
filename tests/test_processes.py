"""One model in several processes and threads: each gives the text that the model gives alone.

Processes begin as they do in programs: pools of multiprocessing and concurrent.futures, by fork and by spawn, and by a
fork at a moment when another thread is reading the model.
"""

import copy
import multiprocessing
import os
import pickle
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import numpy as np
import pytest

import npgpt2
from npgpt2.models import BUNDLED_FILE
from npgpt2.weights import Weights

# Python warns of every fork in a process with threads, BLAS's among them. That it works all the same is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
forks = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system can't fork processes"
)
# Seconds after which a process that doesn't answer hangs.
PATIENCE = 120
PROCESSES = 4


def tell(model):
    return model.generate("Once upon a time", length=6)


@pytest.fixture(scope="module")
def story():
    return tell(npgpt2.load())


@pytest.fixture(scope="module")
def deflated(tmp_path_factory):
    """The bundled model, compressed as `np.savez_compressed` does."""
    path = tmp_path_factory.mktemp("deflated") / "storyteller.npz"
    with zipfile.ZipFile(BUNDLED_FILE) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    return path


@pytest.fixture(params=["bundled", "compressed", "rounded"])
def fresh(request, deflated):
    """A model of which nothing has been read yet; all three tell the same."""
    return npgpt2.load(deflated if request.param == "compressed" else BUNDLED_FILE,
                       dtype="int8" if request.param == "rounded" else None)  # fmt: skip


# What the workers of a pool are given: forked ones find it here, spawned ones are sent it.
given = {}


def give(model, barrier):
    given.update(model=model, barrier=barrier)


def tell_together(_):
    """The text, once every worker has begun with one."""
    given["barrier"].wait(PATIENCE)
    return tell(given["model"])


@contextmanager
def pool(method, initializer=None, arguments=()):
    """A pool of processes that are gone at the end, even if they hang."""
    processes = multiprocessing.get_context(method).Pool(PROCESSES, initializer, arguments)
    try:
        yield processes
    finally:
        processes.terminate()
        processes.join()


@contextmanager
def executor(method):
    """The same of concurrent.futures, which waits for workers unless they are killed."""
    processes = ProcessPoolExecutor(2, multiprocessing.get_context(method))
    try:
        yield processes
    except BaseException:
        for child in multiprocessing.active_children():
            child.kill()
        raise
    finally:
        processes.shutdown(cancel_futures=True)


@forks
def test_a_pool_of_forked_processes_reads_a_model_at_once(fresh, story):
    give(fresh, multiprocessing.get_context("fork").Barrier(PROCESSES))
    with pool("fork") as processes:
        found = processes.map_async(tell_together, range(PROCESSES), chunksize=1).get(PATIENCE)
    assert found == [story] * PROCESSES


def test_a_pool_of_spawned_processes_is_given_a_model(story):
    context = multiprocessing.get_context("spawn")
    with pool("spawn", give, (npgpt2.load(), context.Barrier(PROCESSES))) as processes:
        found = processes.map_async(tell_together, range(PROCESSES), chunksize=1).get(PATIENCE)
    assert found == [story] * PROCESSES


@pytest.mark.parametrize("method", [pytest.param("fork", marks=forks), "spawn"])
def test_an_executor_of_processes_is_given_a_model(method, story):
    model = npgpt2.load()
    with executor(method) as processes:
        found = [task.result(PATIENCE) for task in [processes.submit(tell, model) for _ in range(4)]]
    assert found == [story] * 4


def test_threads_read_a_model_at_once(fresh, story):
    give(fresh, Barrier(8))
    with ThreadPoolExecutor(8) as threads:
        assert [*threads.map(tell_together, range(8), timeout=PATIENCE)] == [story] * 8


def test_threads_that_ask_for_one_array_at_once_get_the_same(fresh):
    barrier = Barrier(8)

    def read(_):
        barrier.wait(PATIENCE)
        return [*fresh.weights.values()]

    with ThreadPoolExecutor(8) as threads:
        first, *others = threads.map(read, range(8), timeout=PATIENCE)
    for arrays in others:
        assert all(ours is theirs for ours, theirs in zip(arrays, first, strict=True))


def tell_and_exit(model, story):
    sys.exit(tell(model) != story)


def read(model):
    arrays = dict(model.weights)
    return len(arrays), model.tokenizer


def fork_while_a_thread_reads(path, dtype, story):
    """At moments from before the first array is read until after the vocabulary is; thirty with all three models."""
    began = time.monotonic()
    read(npgpt2.load(path, dtype=dtype))
    duration = time.monotonic() - began
    with ThreadPoolExecutor(1) as thread:
        for moment in np.linspace(0, 1.1 * duration, 10):
            model = npgpt2.load(path, dtype=dtype)
            child = multiprocessing.get_context("fork").Process(target=tell_and_exit, args=(model, story))
            reading = thread.submit(read, model)
            time.sleep(moment)
            child.start()
            child.join(PATIENCE)
            exitcode = child.exitcode
            child.kill()
            child.join()
            reading.result(PATIENCE)
            assert exitcode == 0, f"forked {moment:.3f} s after reading began: {exitcode}"


@forks
def test_a_process_can_be_forked_while_a_thread_reads_the_model(fresh, story):
    """In a process of its own: what measures the tests' coverage in this one has a lock of its own, which children that
    are forked while a thread runs inherit taken.
    """
    path, dtype = fresh.weights.path, "int8" if "wte/scales" in fresh.weights else None
    forking = multiprocessing.get_context("spawn").Process(target=fork_while_a_thread_reads, args=(path, dtype, story))
    forking.start()
    forking.join(2 * PATIENCE)
    exitcode = forking.exitcode
    forking.kill()
    forking.join()
    assert exitcode == 0, "what failed is on standard error"


# ---- Copies


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_copy_of_a_model_tells_the_same(copied, dtype, story):
    model = npgpt2.load(dtype=dtype)
    for twin in (copied(model), tell(model) and copied(model)):  # nothing read yet; all read
        assert twin is not model
        assert (twin.hparams, list(twin.weights), twin.weights.path) == (
            model.hparams,
            list(model.weights),
            model.weights.path,
        )
        assert tell(twin) == tell(model) == story


def test_a_copy_of_weights_is_the_same_object():
    weights = Weights(BUNDLED_FILE)
    assert copy.copy(weights) is copy.deepcopy(weights) is weights
    assert copy.deepcopy({"weights": weights})["weights"] is weights


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_pickled_weights_are_opened_again_wherever_the_program_is(dtype, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    weights = Weights(type(tiny)(tiny.name), dtype)
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(weights, protocol)
        assert len(data) < 1000
        again = pickle.loads(data)
        assert (again.path, again.dtype, list(again)) == (tiny, weights.dtype, list(weights))
        for name, array in weights.items():
            np.testing.assert_array_equal(again[name], array, strict=True)


def test_pickled_weights_whose_file_is_gone_say_so(tiny, tmp_path):
    path = tmp_path / "moved.npz"
    os.link(tiny, path)
    data = pickle.dumps(Weights(path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"moved\.npz"):
        pickle.loads(data)
