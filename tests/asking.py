"""What asks a server in tests: an application by itself, without sockets, or one that runs in a process of its own."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from tempfile import TemporaryFile

JSON = {"Content-Type": "application/json"}


class Answer:
    """What came of a request: its status, its headers, and its body."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]

    @property
    def events(self):
        """What a stream says; `[DONE]` has to be its end."""
        *said, done, end = self.body.decode("utf-8").split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in said if not event.startswith(":")]


def environ_of(method, path, body=b"", **headers):
    """What a WSGI server tells of a request. headers: with `_` for `-`; None for one that is left out"""
    path, _, query = path.partition("?")
    environ = {
        "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "REMOTE_ADDR": "127.0.0.1",
        "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)),
        "HTTP_HOST": "localhost:8000", "CONTENT_TYPE": "application/json" if body else "",
    }  # fmt: skip
    for name, value in headers.items():
        key = name.upper() if name in ("Content_Type", "Content_Length") else f"HTTP_{name.upper()}"
        environ[key] = value
    return {name: value for name, value in environ.items() if value is not None}


def begin(app, environ):
    """The status, the headers, and the body as it comes."""
    said = []
    body = app(environ, lambda status, headers: said.append((status, headers)))
    ((status, headers),) = said
    assert len(dict(headers)) == len(headers)
    return int(status.split()[0]), dict(headers), body


def ask(app, method, path, body=b"", **headers):
    """An answer by an application. body: bytes, or what JSON is made of"""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, said, pieces = begin(app, environ_of(method, path, data, **headers))
    whole = b"".join(pieces)
    pieces.close()
    if "Content-Length" in said and method != "HEAD":
        assert len(whole) == int(said["Content-Length"])
    return Answer(status, said, whole)


def complete(app, **body):
    """The answer to a completion that is in order."""
    answer = ask(app, "POST", "/v1/completions", body)
    assert answer.status == 200, answer.body
    return answer.json


def stream(app, **body):
    """The same, streamed: its chunks."""
    answer = ask(app, "POST", "/v1/completions", body | {"stream": True})
    assert answer.status == 200, answer.body
    return answer.events


def joined(chunks, count=1):
    """The choices that chunks say, one behind another."""
    choices = [{"index": i, "text": "", "logprobs": None, "finish_reason": None} for i in range(count)]
    for chunk in chunks:
        for said in chunk["choices"]:
            choice = choices[said["index"]]
            assert choice["finish_reason"] is None
            choice["text"] += said["text"]
            choice["finish_reason"] = said["finish_reason"]
            for name in ("token_ids", "prompt_token_ids"):
                if name in said:
                    choice[name] = choice.get(name, []) + said[name]
            if said["logprobs"] is not None:
                lists = choice["logprobs"] or {name: [] for name in said["logprobs"]}
                choice["logprobs"] = {name: lists[name] + more for name, more in said["logprobs"].items()}
    return choices


# ---- Processes


class Served:
    """A server that runs: `port`, `process`, and the lines of its log once it has ended."""

    def __init__(self, process, port, errors):
        self.process, self.port, self.errors, self.log = process, port, errors, []

    def connect(self):
        return HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, method, path, body=None, headers=()):
        connection = self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {**(JSON if data else {}), **dict(headers)})
        response = connection.getresponse()
        answer = Answer(response.status, dict(response.getheaders()), response.read())
        connection.close()
        return answer

    def raw(self, data):
        """What is answered to bytes, to the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(data)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts)

    def metric(self, name):
        """A figure of `/metrics`, with its labels in its name."""
        text = self.ask("GET", "/metrics").body.decode()
        return float(re.search(rf"^npgpt2_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    @property
    def threads(self):
        """How many the process has; None where the system doesn't say."""
        folder = f"/proc/{self.process.pid}/task"
        return len(os.listdir(folder)) if os.path.isdir(folder) else None

    def end(self, number=signal.SIGTERM):
        """Its exit status, once it has been sent a signal."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        status = self.process.wait(timeout=60)
        self.errors.seek(0)
        self.log = self.errors.read().splitlines()
        return status


@contextmanager
def serving(*options, program=("-m", "npgpt2"), env=()):
    """A server in a process of its own, at any port that is free; whatever happens, it ends."""
    command = [sys.executable, *program, "serve", "--port", "0", *map(str, options)]
    with ExitStack() as stack:
        # A pipe that nobody reads would be full after some hundred lines, and writing the next would take forever.
        errors = stack.enter_context(TemporaryFile("w+", encoding="utf-8"))
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = stack.enter_context(subprocess.Popen(command, **pipes, env=os.environ | dict(env)))
        stack.callback(process.kill)
        line = process.stdout.readline()
        if " at http://" not in line:
            errors.seek(0)
            raise AssertionError(line + errors.read())
        yield Served(process, int(line.rpartition(":")[2]), errors)
