"""How work is shared among threads: every part is done, once, and nothing of it shows from outside."""

import _thread
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Event, Thread, current_thread
from types import SimpleNamespace

import numpy as np
import pytest

from npgpt2 import GPT2
from npgpt2.engine import cache
from npgpt2.kernels import attention, passes, products, rows, threads, ways

needs_openblas = pytest.mark.skipif(threads.openblas() is None, reason="NumPy doesn't compute with OpenBLAS here")


@pytest.fixture(params=[1, 2, 3, 5])
def count(request):
    return request.param


@pytest.mark.parametrize("step", [1, 7, 64])
@pytest.mark.parametrize("least", [1, 64, 1000])
@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 1000])
@needs_openblas
def test_parts_make_up_the_whole(n, least, step, count):
    parts = []
    with threads.sharing(count):
        threads.share(n, lambda start, stop: parts.append((start, stop, current_thread())), least, step)
    done = sorted((start, stop) for start, stop, _ in parts)
    assert done[0][0] == 0
    assert done[-1][1] == n
    own, *others = (stop - start for start, stop in done)
    assert not others or own >= max(others) + least - 2 * step, "the caller does more"
    assert all(before[1] == after[0] and after[0] % step == 0 for before, after in pairwise(done))
    assert len(done) == max(1, min(count, n // max(least, step))) == len({thread for *_, thread in parts})


def test_outside_of_sharing_all_is_one_part():
    parts = []
    threads.share(1000, lambda *part: parts.append((*part, current_thread())))
    assert parts == [(0, 1000, current_thread())]


@needs_openblas
def test_blas_keeps_to_one_thread_meanwhile():
    blas = threads.openblas()
    had = blas.get_threads()
    blas.set_threads(before := 2)  # even on a single core
    with threads.sharing():
        assert blas.get_threads() == 1
        with threads.sharing():
            assert blas.get_threads() == 1
        assert blas.get_threads() == 1
    try:
        assert blas.get_threads() == before
    finally:
        blas.set_threads(had)


@needs_openblas
@pytest.mark.parametrize("wanted", [1, 3])
def test_a_pass_that_is_not_divided_can_limit_blas(wanted):
    blas = threads.openblas()
    had = blas.get_threads()
    blas.set_threads(2)
    try:
        with threads.sharing(wanted, divided=False):
            assert blas.get_threads() == wanted
            assert not threads.is_sharing()
        assert blas.get_threads() == 2
        with threads.sharing(divided=False):
            assert blas.get_threads() == 2
    finally:
        blas.set_threads(had)


@needs_openblas
def test_a_number_that_somebody_sets_meanwhile_stays():
    blas = threads.openblas()
    had = blas.get_threads()
    try:
        with threads.sharing(2):
            blas.set_threads(3)
        assert blas.get_threads() == 3
    finally:
        blas.set_threads(had)


@needs_openblas
def test_ctrl_c_waits_for_the_parts_of_other_threads():
    ended = []

    def work(start, stop):
        if start:
            time.sleep(0.1)
            _thread.interrupt_main()  # while the main thread waits for this one
            time.sleep(0.2)
            ended.append(start)

    with pytest.raises(KeyboardInterrupt), threads.sharing(2):
        threads.share(2, work)
    assert ended == [1]
    assert not threads.is_sharing()


@needs_openblas
def test_no_warning_comes_from_other_threads():
    huge = np.full((2, 1000), 3e38, np.float32)

    def work(start, stop):
        if start:  # the first part has the settings of the thread that calls
            huge[start:stop] *= 10

    with warnings.catch_warnings(), threads.sharing(2):
        warnings.simplefilter("error")
        threads.share(2, work)
    assert np.isinf(huge[1]).all()


@needs_openblas
def test_where_no_thread_can_start_the_caller_does_all(monkeypatch):
    monkeypatch.setattr(threads, "_queues", [])

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads.Thread, "start", refuse)
    parts = []
    with threads.sharing(7):
        threads.share(7, lambda *part: parts.append(part))
    assert parts == [(i, i + 1) for i in range(7)]


@needs_openblas
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_errors_are_raised_once_all_parts_have_ended(error, failing):
    before, ended = threads.openblas().get_threads(), []

    def work(start, stop):
        if start == failing:
            raise error
        ended.append(start)

    with pytest.raises(error), threads.sharing(2):
        threads.share(2, work)
    assert ended == [1 - failing]
    assert threads.openblas().get_threads() == before
    assert not threads.is_sharing()
    parts = []
    with threads.sharing(2):  # and the threads are there for the next
        threads.share(2, lambda *part: parts.append(part))
    assert sorted(parts) == [(0, 1), (1, 2)]


@needs_openblas
def test_a_second_pass_meanwhile_does_the_same_parts_by_itself(count):
    entered, leave = Event(), Event()

    def hold():
        with threads.sharing():
            entered.set()
            leave.wait(60)

    holder = Thread(target=hold)
    holder.start()
    entered.wait(60)
    alone, together = [], []
    try:
        with threads.sharing(count):
            threads.share(1000, lambda *part: alone.append((*part, current_thread())), step=3)
    finally:
        leave.set()
        holder.join()
    with threads.sharing(count):
        threads.share(1000, lambda *part: together.append(part), step=3)
    assert {thread for *_, thread in alone} == {current_thread()}
    assert sorted((start, stop) for start, stop, _ in alone) == sorted(together)


@pytest.fixture
def divided(monkeypatch):
    """The small model's kernels in as many parts as a large model's."""
    for module in (threads, products, attention, passes, cache):
        monkeypatch.setattr(module, "THREAD_WORTH", 1)
    monkeypatch.setattr(products, "TILES", (16,))
    monkeypatch.setattr(cache, "BYTES_WORTH", 1)
    monkeypatch.setattr(rows, "ROWS", 4)


def with_threads(model, count):
    return GPT2(model.weights, model.hparams, model.tokenizer, threads=count)


@pytest.mark.usefixtures("divided")
def test_programs_with_threads_of_their_own_get_the_same_logits(model):
    prompts = [np.random.default_rng(i).integers(520, size=40 + i) for i in range(8)]
    expected = [model.logits(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for ours, theirs in zip(pool.map(model.logits, prompts), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("divided")
def test_logits_are_the_same_with_any_number_of_threads(model, count):
    prompt = np.random.default_rng(0).integers(520, size=100)
    logits = with_threads(model, count).logits(prompt)
    np.testing.assert_allclose(logits, with_threads(model, 1).logits(prompt), rtol=1e-5, atol=1e-5)


@needs_openblas
@pytest.mark.usefixtures("divided")
def test_a_model_computes_on_as_many_threads_as_it_was_given(model, count, monkeypatch):
    """Those that do the parts of a batch's attention are counted; BLAS has one in each, and afterwards what it had."""
    seen, decode_attention = set(), cache.decode_attention

    def note(*arguments):
        seen.add(current_thread())
        assert threads.openblas().get_threads() == 1
        return decode_attention(*arguments)

    monkeypatch.setattr(cache, "decode_attention", note)
    before = threads.openblas().get_threads()
    texts = with_threads(model, count).generate(["A language model"] * 5, length=4)
    assert texts == [" plays one small game"] * 5
    assert len(seen) == count
    assert threads.openblas().get_threads() == before


@needs_openblas
def test_a_model_of_one_thread_starts_none(tiny):
    program = f"""if True:
        import threading, npgpt2
        model = npgpt2.load({str(tiny)!r}, threads=1)
        assert model.generate(["A language model"] * 8, length=4) == [" plays one small game"] * 8
        model.logits(range(190))
        assert threading.active_count() == 1
    """
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


def test_another_blas_computes_the_same(model, monkeypatch):
    prompt = np.random.default_rng(0).integers(520, size=100)
    logits = model.logits(prompt)
    for module in (threads, ways):
        monkeypatch.setattr(module, "openblas", lambda: None)
    assert threads.count_threads() == 1
    np.testing.assert_allclose(model.logits(prompt), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(with_threads(model, 3).logits(prompt), logits, rtol=1e-5, atol=1e-5)


def test_a_library_that_is_no_openblas_is_left_alone(monkeypatch):
    class Other:
        def __getattr__(self, name):
            raise AttributeError(name)

    for library in (lambda path: Other(), lambda path: (_ for _ in ()).throw(OSError("can't be opened"))):
        monkeypatch.setattr(threads.ctypes, "CDLL", library)
        assert threads.openblas.__wrapped__() is None


# What NumPy's builds contain for systems that tests seldom run on: files, how the functions in one are called, and
# whether a module that is linked with that one leads to them.
BUILDS = {
    "2.4 for Windows": ("pyd", "numpy.libs/libscipy_openblas64_-63c857e7.dll", "scipy_openblas_{}64_", False),
    "2.4 for Windows on ARM": ("pyd", "numpy.libs/scipy_openblas-a851836c.dll", "scipy_openblas_{}", False),
    "1.26 for Windows": ("pyd", "numpy.libs/libopenblas64__v0.3.23-gcc_10_3_0-2bde3a66.dll", "openblas_{}64_", False),
    "2.4 for Linux on ARM": ("so", "numpy.libs/libscipy_openblas64_-7220728c.so", "scipy_openblas_{}64_", True),
    "1.26 for Linux on ARM": ("so", "numpy.libs/libopenblas64_p-r0-17488984.so", "openblas_{}64_", True),
    "2.4 for macOS 11": ("so", "numpy/.dylibs/libscipy_openblas64_.dylib", "scipy_openblas_{}64_", True),
    "Debian's": ("so", "lib/libblas.so.3", "openblas_{}", True),
    "2.4 for macOS 14": ("so", "Accelerate.framework/Accelerate", None, True),
}


@pytest.mark.parametrize("build", BUILDS)
def test_the_blas_of_other_systems_is_found_by_stand_ins(build, tmp_path, monkeypatch):
    ending, file, name, leads_there = BUILDS[build]
    module = tmp_path / "numpy" / "linalg" / f"_umath_linalg.{ending}"
    for path in (module, tmp_path / file, tmp_path / "numpy.libs" / "msvcp140-5f1c5dd3.dll"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(np.linalg._umath_linalg, "__file__", str(module))

    class Library:
        def __init__(self, path):
            if name and path in {str(tmp_path / file), str(module) if leads_there else None}:
                answers = {"get_num_threads": 6, "set_num_threads": None, "get_parallel": 1, "get_corename": b"ARMV8"}
                for function, answer in answers.items():
                    setattr(self, name.format(function), lambda *_, answer=answer: answer)

    monkeypatch.setattr(threads.ctypes, "CDLL", Library)
    found = threads.openblas.__wrapped__()
    assert (found and (found.threads, found.kernels)) == ((6, "ARMV8") if name else None)


@needs_openblas
@pytest.mark.parametrize(("variable", "value"), [("OPENBLAS_NUM_THREADS", "1"), ("OMP_NUM_THREADS", "1")])
def test_the_number_of_threads_is_that_of_blas(variable, value):
    environment = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
    program = [sys.executable, "-c", "from npgpt2.kernels.threads import count_threads; print(count_threads())"]
    assert subprocess.check_output(program, env=environment | {variable: value}, text=True) == f"{value}\n"
    assert int(subprocess.check_output(program, env=environment)) <= os.cpu_count()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@needs_openblas
def test_a_fork_has_threads_of_its_own():
    program = """if True:
        import os, sys
        from npgpt2.kernels import threads
        def parts():
            done = []
            with threads.sharing(3):
                threads.share(30, lambda start, stop: done.append(stop - start))
            return done
        assert parts() == [10, 10, 10]
        before = threads.openblas().get_threads()
        with threads.sharing(3):  # as where another thread is in the middle of a pass
            child = os.fork()
            if not child:
                same = threads.openblas().get_threads() == before
                os._exit(7 if same and parts() == [10, 10, 10] else 8)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60).returncode == 7


@needs_openblas
@pytest.mark.parametrize(
    ("copies", "rows", "sequences", "divided"),
    [
        (True, 1, 1, False),
        (True, 2, 2, False),
        (True, 4, 4, True),
        (False, 1, 1, False),
        (False, 2, 2, True),
        *((copies, rows, 1, rows > 42) for copies in (True, False) for rows in (4, 16, 42, 43)),  # guesses, or a prompt
    ],
)
def test_passes_of_124M_that_are_divided(copies, rows, sequences, divided, monkeypatch):
    monkeypatch.setattr(passes, "copies", lambda: copies)
    for threads_asked, expected in ((2, divided), (1, True)):  # one thread works as each of several does
        for in_int8 in (False, True):
            weights = SimpleNamespace(width=768, in_int8=in_int8, threads=threads_asked)
            with passes.sharing_work(weights, rows, sequences):
                assert threads.is_sharing() == (expected or in_int8)


@needs_openblas
def test_each_thread_multiplies_in_the_way_that_is_best_on_one_thread(count):
    seen = []
    with threads.sharing(count):
        threads.share(count, lambda start, stop: seen.append((threads.is_sharing(), ways.way_for(3), current_thread())))
    assert len(seen) == count == len({thread for *_, thread in seen})
    assert {(divided, way) for divided, way, _ in seen} == {(True, seen[0][1])}
