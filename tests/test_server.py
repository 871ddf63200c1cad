"""`npgpt2 serve` as it is run: sockets, many clients, clients that go away, signals, and an engine that dies."""

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from typing import ClassVar

import pytest
from asking import JSON, Served, serving
from commands import failed

import npgpt2
from npgpt2.cli import main

waitress = pytest.importorskip("waitress", reason="needs waitress, which npgpt2[serve] brings")
PROMPT = "A language model"
LONG = {"prompt": PROMPT, "max_tokens": 180, "ignore_eos": True, "temperature": 1}
# A server whose steps take as long as a larger model's, so that there is time to go away in; and one whose engine dies
# once its folder has a file of that name.
SLOW = """
import sys, time, os
from npgpt2.engine import Engine
step = Engine.step
def slow(self):
    time.sleep(0.03)
    if os.path.exists("die"):
        raise MemoryError("none left")
    return step(self)
Engine.step = slow
from npgpt2.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def served(tiny):
    with serving("-m", tiny, "--slots", 16, "--queue", 64) as one:
        yield one


@pytest.fixture
def slow(tiny, tmp_path, monkeypatch):
    """Starts servers that are slow, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(npgpt2.__file__)), prepend=os.pathsep)
    return lambda *options: serving("-m", tiny, *options, program=("-c", SLOW))


def until(holds, seconds=20):
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _hang_up():
    yield
    while Streaming.all:
        Streaming.all.pop().go()


class Streaming:
    """A completion that is streamed, or waited for, on a connection of its own."""

    all: ClassVar[list] = []

    def __init__(self, served, **body):
        self.all.append(self)
        self.response = None
        self.connection = served.connect()
        self.connection.request("POST", "/v1/completions", json.dumps(LONG | {"stream": True} | body), JSON)
        self.events = []

    def begin(self):
        """Read up to the first event."""
        assert self.status() == 200
        self.read()
        return self

    def status(self):
        self.response = self.connection.getresponse()
        return self.response.status

    def read(self):
        line = self.response.readline()
        if line.startswith(b"data: "):
            self.events.append(line.removeprefix(b"data: ").strip())
        return line

    def rest(self):
        """Read to the end, which has to be that of a stream."""
        while self.read():
            pass
        assert self.events[-1] == b"[DONE]"
        return [json.loads(event) for event in self.events[:-1]]

    def go(self):
        """Go away, without a word."""
        if self.response:
            self.response.close()
        self.connection.close()


# ---- The command


def test_the_address_is_printed_once_it_is_listened_to(served):
    assert served.ask("GET", "/health").json == {"status": "ok"}
    answer = served.ask("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 4, "temperature": 0})
    assert answer.json["choices"][0]["text"] == " plays one small game"
    assert answer.json["model"] == "tiny"
    assert "Server" not in answer.headers


def test_a_draft_has_to_have_the_models_vocabulary(run, tiny):
    assert failed(run("serve", "-m", tiny, "--draft-model", "storyteller", "--port", "0"), 1, "can't be the draft")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "65536"], "65536"), (["--port", "0000000065536"], "65536"), (["--port", ""], "port"),
        (["--port", "-1"], "port"), (["--port", "http"], "http"), (["--slots", "0"], "slots"),
        (["--queue", "-1"], "queue"), (["--grace", "-1"], "grace"), (["--host", "nowhere.example"], "nowhere.example"),
        (["--host", "0.0.0.0"], "--api-key-file"), (["--host", "::"], "--no-key"), (["--host", "10.0.0.1"], "--no-key"),
        (["--cors-origin", "*"], "no origin"), (["--cors-origin", "https://a.example/page"], "no origin"),
        (["--allowed-host", "http://a.example"], "no name"), (["--allowed-host", "*.example"], "no name"),
        (["--no-key", "--api-key-file", "k"], "both"),
    ],
)  # fmt: skip
def test_options_that_are_wrong_are_refused(run, monkeypatch, options, said):
    monkeypatch.delenv("NPGPT2_API_KEY", raising=False)
    assert failed(run("serve", "-m", "MODEL", *options), 2, said)


def test_a_port_that_is_taken_is_said(run, served):
    assert failed(run("serve", "-m", "MODEL", "--port", served.port), 1, "use")


def test_without_waitress_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "waitress.channel", None)
    assert failed(run("serve", "-m", "MODEL", "--port", "0"), 1, "pip install npgpt2[serve]")


def test_keys_come_from_a_file_or_the_environment(tiny, tmp_path, run):
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    with serving("-m", tiny, "--host", "0.0.0.0", "--api-key-file", keys) as one:
        assert one.ask("GET", "/v1/models").status == 401
        for key in ("first", "second"):
            assert one.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"}).status == 200
        assert one.ask("GET", "/health", headers={"Host": "evil.example"}).status == 403
        assert one.ask("GET", "/health", headers={"Host": "10.1.2.3"}).status == 200
    with serving("-m", tiny, env={"NPGPT2_API_KEY": "third"}) as one:
        assert one.ask("GET", "/v1/models").status == 401
        assert one.ask("GET", "/v1/models", headers={"Authorization": "Bearer third"}).status == 200
    keys.write_text("\n")
    assert failed(run("serve", "-m", "MODEL", "--api-key-file", keys), 1, "has no key")
    assert failed(run("serve", "-m", "MODEL", "--api-key-file", tmp_path / "none"), 1, "No such file")


# ---- Many at once, and those that go away


def test_200_clients_of_16_slots_are_answered_or_told_to_wait(tiny):
    answers, lock, ready = [], threading.Lock(), threading.Barrier(200)
    with serving("-m", tiny, "--slots", 16, "--queue", 64) as one:
        one.ask("POST", "/v1/completions", {"prompt": PROMPT, "n": 16, "max_tokens": 2})
        threads_before = one.threads

        def ask(number):
            ready.wait()
            body = {
                "prompt": [number, 7],
                "max_tokens": 100,
                "ignore_eos": True,
                "seed": number,
                "stream": number % 2 == 0,
            }
            answer = one.ask("POST", "/v1/completions", body)
            with lock:
                answers.append((number, answer))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [answer.status for _, answer in answers]
        assert len(statuses) == 200
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= 64
        for number, answer in answers:
            if answer.status == 429:
                assert answer.headers["Retry-After"] == "1"
            elif number % 2 == 0:
                assert len(answer.events) == 100
            else:
                assert answer.json["usage"]["completion_tokens"] == 100
        until(lambda: one.metric("slots_used") == one.metric("requests_waiting") == one.metric("requests_running") == 0)
        assert one.metric('requests_finished_total{reason="length"}') == statuses.count(200) + 1
        assert one.threads == threads_before
        assert one.end() == 0
        assert len([line for line in one.log if "/v1/completions" in line]) == 201


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_slot_in_each_phase(slow, streamed):
    with slow("--slots", 1) as one:

        def cancelled(count):
            until(lambda: one.metric('requests_finished_total{reason="cancelled"}') == count, 10)

        writing = Streaming(one, stream=streamed)
        if streamed:
            writing.begin()
        until(lambda: one.metric("generated_tokens_total") > 2)
        waiting = Streaming(one, stream=streamed)
        until(lambda: one.metric("requests_waiting") == 1)
        waiting.go()  # while it waited
        cancelled(1)
        assert one.metric("requests_waiting") == 0
        assert one.metric("slots_used") == 1
        writing.go()  # while it was writing
        cancelled(2)
        until(lambda: one.metric("slots_used") == 0)
        # While its prompts are read, of which there is always another; each is read and done with in one step, so that
        # its slot is seldom seen in use.
        reading = Streaming(one, stream=streamed, prompt=[[i, *range(100)] for i in range(200)], max_tokens=1)
        until(lambda: one.metric("requests_running") == 1)
        reading.go()
        cancelled(3)
        until(lambda: one.metric("slots_used") == 0)
        assert one.metric("generated_tokens_total") < 180 + 100
        assert one.end() == 0
        assert sum(" gone " in line for line in one.log) == 3


def test_a_connection_serves_several_requests(served):
    connection = served.connect()
    for _ in range(3):
        connection.request("GET", "/v1/models")
        assert connection.getresponse().read()
    sock = connection.sock
    body = json.dumps({"prompt": PROMPT, "max_tokens": 2})
    connection.request("POST", "/v1/completions", body, JSON)
    assert json.loads(connection.getresponse().read())["usage"]["completion_tokens"] == 2
    assert connection.sock is sock
    connection.close()


# ---- HTTP that is none


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost localhost\r\n\r\n", 400),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET / HTTP/1.0\r\nHost: localhost\r\nX-Forwarded-Host: evil.example\r\n\r\n", 200),
        (b"GET /\x1b[2J\x00 HTTP/1.0\r\nHost: localhost\r\n\r\n", 404),
    ],
    ids=lambda value: str(value[:60]) if isinstance(value, bytes) else str(value),
)
def test_what_is_no_sound_http_is_answered_in_json_all_the_same(served, data, status):
    said = b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(data)
        while not said.endswith((b"}", b"</html>\n")):
            part = connection.recv(65536)
            assert part
            said += part
    assert int(said.split()[1]) == status
    if status != 200:
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_body_in_chunks_is_a_body(served):
    body = b'{"prompt": "A language model"}'
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    said = served.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert json.loads(said.partition(b"\r\n\r\n")[2])["count"] == 3


def test_what_waitress_refuses_is_logged_in_lines_that_nobody_forges(tiny):
    with serving("-m", tiny) as one:
        one.raw(b"GARBAGE\r\n\r\n")
        one.raw(b"GET / HTTP/1.1\r\nHost: a\r\nX\n2026-11-29 127.0.0.1 GET /forged 200\r\n\r\n")
        one.raw(b"GET /%0a2026-11-29%20GET%20/forged%1b[31m HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert one.end() == 0
    assert [line.split()[5] for line in one.log] == ["400", "400", "404"]
    assert not any(line.isascii() and "GET /forged" in line for line in one.log)
    assert all(line.isprintable() for line in one.log)


# ---- How it ends


def test_sigterm_lets_what_runs_finish(slow):
    with slow("--slots", 4) as one:
        streams = [Streaming(one, max_tokens=120, seed=i).begin() for i in range(4)]
        waiting = Streaming(one, max_tokens=2)
        idle = one.connect()
        idle.request("GET", "/health")
        idle.getresponse().read()
        until(lambda: one.metric("requests_waiting") == 1)
        one.process.send_signal(signal.SIGTERM)
        until(lambda: not listens(one))
        idle.request("GET", "/v1/models")
        response = idle.getresponse()
        assert (response.status, response.getheader("Retry-After")) == (503, "1")
        idle.close()
        for stream in streams:
            said = stream.rest()
            assert len(said) == 120
            assert said[-1]["choices"][0]["finish_reason"] == "length"
        assert len(waiting.begin().rest()) == 2
        assert one.wait() == 0


def test_sigterm_ends_with_an_error_what_takes_longer_than_it_may(slow):
    with slow("--slots", 2, "--grace", 0) as one:
        streams = [Streaming(one).begin(), Streaming(one, n=2).begin()]
        whole = Streaming(one, stream=False)
        until(lambda: one.metric("requests_waiting") == 1)
        assert one.end() == 0
        for stream in streams:
            *said, error = stream.rest()
            assert all(len(chunk["choices"]) == 1 for chunk in said)
            assert error["error"]["message"] == "the server is shutting down"
        assert whole.status() == 503


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_a_second_signal_ends_it_at_once(slow, first, second):
    with slow("--slots", 1, "--grace", 600) as one:
        stream = Streaming(one).begin()
        one.process.send_signal(first)
        until(lambda: not listens(one))
        assert one.end(second) == 128 + second
        stream.go()


def test_ctrl_c_lets_what_runs_finish_too(slow):
    with slow("--slots", 1) as one:
        stream = Streaming(one, max_tokens=20).begin()
        one.process.send_signal(signal.SIGINT)
        assert len(stream.rest()) == 20
        assert one.wait() == 130
        assert not any("Traceback" in line for line in one.log)


def listens(served):
    try:
        socket.create_connection(("127.0.0.1", served.port), timeout=5).close()
    except ConnectionError:
        return False
    return True


def test_the_death_of_the_engine_is_an_error_for_all_and_ends_it(slow, tmp_path):
    with slow("--slots", 1) as one:
        stream, waiting = Streaming(one).begin(), Streaming(one, stream=False)
        until(lambda: one.metric("requests_waiting") == 1)
        (tmp_path / "die").touch()
        assert "the engine failed" in stream.rest()[-1]["error"]["message"]
        assert waiting.status() == 500
        assert one.wait() == 1
    assert "npgpt2: the engine failed: MemoryError('none left')" in one.log


def test_a_client_that_takes_nothing_holds_up_nobody(slow):
    """Nor the end: what it was sent fits into the system's buffers, and else it is left behind."""
    with slow("--slots", 2) as one:
        lazy = Streaming(one, max_tokens=100, logprobs=100, prompt=[5])
        until(lambda: one.metric("slots_used") == 1)
        assert len(Streaming(one, max_tokens=5).begin().rest()) == 5
        assert one.end() == 0
        lazy.go()


def test_a_client_that_takes_nothing_for_long_is_taken_for_gone(tiny, monkeypatch):
    """It would keep one of the threads for ever."""
    monkeypatch.setattr("npgpt2.serving.server.runner.STALLED", 0.3)
    monkeypatch.setattr("npgpt2.serving.server.runner.TICK", 0.1)
    with in_thread(monkeypatch, "-m", tiny, "--slots", 2, "--queue", 2) as (one, end, lines, _):
        body = json.dumps(LONG | {"stream": True, "logprobs": 100, "n": 14}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", one.port))
            lazy.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: any("POST /v1/completions" in line for line in lines), 30)
        assert one.ask("GET", "/health").status == 200
        end()
    assert any(" gone " in line for line in lines)


@contextmanager
def in_thread(monkeypatch, *options):
    """The command in this process, whose signals are called as the system would call them."""
    handlers, lines = {}, []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.setdefault(number, handler))
    monkeypatch.setattr("builtins.print", lambda *said, **options: lines.append(" ".join(map(str, said))))
    before = sys.getswitchinterval()
    status = []
    thread = threading.Thread(target=lambda: status.append(main(["serve", "--port", "0", *map(str, options)])))
    thread.start()
    try:
        until(lambda: lines)
        # A second call would be a second signal, which ends the process.
        end = handlers.pop(signal.SIGTERM)
        yield Served(None, int(lines[0].rpartition(":")[2]), None), lambda: end(signal.SIGTERM, None), lines, status
    finally:
        thread.join(30)
        sys.setswitchinterval(before)


def test_it_runs_where_it_is_called_and_leaves_no_thread(tiny, monkeypatch):
    before = threading.active_count()
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with in_thread(monkeypatch, "-m", tiny, "--slots", 2, "--queue", 2, "--open") as (one, end, lines, status):
        assert opened == [f"http://127.0.0.1:{one.port}"]
        stream = Streaming(one, max_tokens=150).begin()
        assert one.raw(b"GARBAGE\r\n\r\n").startswith(b"HTTP/1.0 400 ")
        end()
        assert len(stream.rest()) == 150
    assert status == [0]
    until(lambda: threading.active_count() == before)
    assert any(" 400 " in line for line in lines)
