"""A fork while other threads are busy: the forked process has all that it needs, whole, and no lock that nobody opens.

Each program runs in a process of its own, which is given up where it or one that it forks hangs.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

BEGIN = """
import os, sys, threading, time, traceback
import npgpt2

def fork(child):
    "Whether a forked process does what it is given, and soon."
    number = os.fork()
    if not number:
        try:
            os._exit(0 if child() else 1)
        finally:
            traceback.print_exc()
            os._exit(2)
    for _ in range(3000):
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(number, 9)
    os.waitpid(number, 0)
    return False

def beside(work):
    "A thread that works for as long as the program runs."
    def forever():
        while True:
            work()
    threading.Thread(target=forever, daemon=True).start()
"""


def run(program):
    """The program ends with what it has to print, and nothing is hung up, or said."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BEGIN + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_process_can_be_forked_while_another_thread_computes():
    """BLAS's locks are as they were, and at work they are mostly taken: four of five such processes hung."""
    assert (
        run("""
model = npgpt2.load()
expected = model.generate("Once upon a time", length=4)
beside(lambda: model.generate(["Once upon a time there was a wolf"] * 8, length=10))
beside(lambda: model.logits([1] * 200))
time.sleep(0.2)
print(all([fork(lambda: model.generate("Once upon a time", length=4) == expected) for _ in range(12)]), flush=True)
os._exit(0)
""")
        == "True\n"
    )


def test_a_forked_process_goes_on_with_an_engine_that_another_thread_steps():
    assert (
        run("""
model = npgpt2.load(threads=1)  # since those of several processes would wait for each other
settings = [{"length": 4 + i, "temperature": 1, "seed": i} for i in range(4)]
expected = [model.generate("Once upon a time", **each) for each in settings]
found = []

def go_on():
    while engine.busy:
        engine.step()
    return [request.text for request in requests] == expected

for moment in range(8):
    engine = npgpt2.Engine(model, slots=2)
    requests = [engine.submit("Once upon a time", **each) for each in settings]
    thread = threading.Thread(target=go_on)
    thread.start()
    time.sleep(0.01 * moment)
    found.append(fork(go_on))
    thread.join()
    found.append(go_on())
print(all(found))
""")
        == "True\n"
    )


@pytest.mark.parametrize(
    "module", ["npgpt2.gpt2", "zipfile", "encodings.cp437", "numpy.random", "npgpt2.study.score", "npgpt2.study.trace"]
)
def test_a_process_can_be_forked_while_another_thread_imports(module, tiny):
    """Each module has a lock while it is imported, which a fork leaves as it is."""
    assert (
        run(f"""
begun = threading.Event()

class Slow:
    def find_spec(self, name, *_):
        if name == {module!r}:
            begun.set()
            time.sleep(1)

sys.meta_path.insert(0, Slow())

def work():
    model = npgpt2.load({str(tiny)!r})
    model.score("A language model")
    model.trace([1, 2])
    model.generate([1, 2], length=1)
    return True

threading.Thread(target=work, daemon=True).start()
begun.wait(30)
print(fork(work), flush=True)
os._exit(0)
""")
        == "True\n"
    )


@pytest.mark.parametrize("lock", ["npgpt2.bars.Bar", "tqdm.tqdm"])
def test_a_forked_process_draws_bars_though_another_thread_was_drawing(lock, fixtures, tmp_path):
    assert (
        run(f"""
import npgpt2.bars, tqdm
from npgpt2.convert import convert
held = threading.Event()

def draw():
    with {lock}.get_lock():
        held.set()
        time.sleep(100)

threading.Thread(target=draw, daemon=True).start()
held.wait(30)
print(fork(lambda: convert({str(fixtures / "tiny")!r}, {str(tmp_path / "out.npz")!r})), flush=True)
os._exit(0)
""")
        == "True\n"
    )


def test_a_fork_waits_for_what_has_to_be_whole_and_that_waits_for_a_fork():
    assert (
        run("""
from npgpt2.forks import whole
said, begun, forked = [], threading.Event(), threading.Event()

def first():
    with whole("step"), whole("pass"):
        begun.set()
        time.sleep(0.5)
        said.append("first ended")

def second():
    time.sleep(0.2)
    with whole("pass"):
        said.append("second began")

threads = [threading.Thread(target=each) for each in (first, second)]
for thread in threads:
    thread.start()
begun.wait(30)
print(fork(lambda: print(said, flush=True) or True))
for thread in threads:
    thread.join()
print(said)
""")
        == "['first ended']\nTrue\n['first ended', 'second began']\n"
    )


def test_a_thread_can_fork_in_the_middle_of_its_own_work():
    assert (
        run("""
from npgpt2.forks import whole

def child():
    with whole("pass"):
        return True

began = time.monotonic()
with whole("step"), whole("pass"):
    print(fork(child))
assert time.monotonic() - began < 10
print(fork(child))
""")
        == "True\nTrue\n"
    )
