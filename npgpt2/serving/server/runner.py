"""The application run by waitress: the address, signals, and an end in which nothing is lost."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from npgpt2.serving.protocol import error_body
from npgpt2.serving.server.application import App, Log, printable
from npgpt2.serving.server.guard import BODY_LIMIT

if TYPE_CHECKING:
    from waitress.server import TcpWSGIServer

INSTALL = "pip install npgpt2[serve]"
# Connections at once, and threads beside those of requests that run or wait, which answer the others.
CONNECTIONS, SPARE_THREADS = 512, 16
# Seconds that a thread which only runs Python may keep the engine's from going on. While a long text was encoded, a
# step of 8 that write took 3 times as long with Python's own 0.005, and 2 times as long with this.
SWITCH = 0.001
# Seconds between two looks at what there is to do besides requests, and those that clients have to take what they were
# sent when the server is about to end.
TICK, FLUSH = 0.5, 5.0
# Seconds after which a client that takes nothing of what it is sent is taken for gone: it would keep a thread for ever.
STALLED = 60.0


def serve(
    app: App, host: str, port: int, threads: int, grace: float, log: Log, ready: Callable[[str], object]
) -> int | None:
    """Serve an application until a signal comes, or its engine dies, which raises OSError.

    threads: how many requests can run or wait · grace: seconds that requests have to end once SIGTERM or Ctrl-C has
    come; a second signal ends the process at once · log: called with a line for what the application doesn't see ·
    ready: called with the address, once it is listened to → the signal that came
    """
    server = _open(app, host, port, threads + SPARE_THREADS, log)
    run = _Run(app, server, grace)
    sys.setswitchinterval(SWITCH)
    before = {number: signal.signal(number, run.note_signal) for number in _signals()}
    try:
        name = f"[{host}]" if ":" in host else host
        ready(f"http://{name}:{server.effective_port}")
        run.until_ended()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.task_dispatcher.shutdown(timeout=1)
        app.close()
        server.asyncore.close_all(server._map)
        server.close()
    if app.loop.error:
        raise OSError(f"the engine failed: {app.loop.error!r}")
    return run.signal


def _signals() -> list[signal.Signals]:
    """Those that end it: all but what is ignored from the outset, as Ctrl-C is in the background."""
    return [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]


class _Run:
    """A server from its start to its end: `signal` is the one that came."""

    def __init__(self, app: App, server: TcpWSGIServer, grace: float) -> None:
        self._app, self._server, self._grace = app, server, grace
        self.signal: int | None = None
        app.loop.died = server.pull_trigger

    def note_signal(self, number: int, frame: object) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number

    def until_ended(self) -> None:
        self._serve_while(lambda: self.signal is None and self._app.loop.error is None)
        self._app.refuse()
        self._stop_listening()
        if self._app.loop.error is None:
            self._serve_while(lambda: self._app.active > 0, self._grace)
        self._app.end()
        self._serve_while(lambda: self._app.active > 0 or self._unsent, FLUSH)

    @property
    def _unsent(self) -> bool:
        return any(channel.total_outbufs_len for channel in [*self._server.active_channels.values()])

    def _serve_while(self, going: Callable[[], bool], seconds: float | None = None) -> None:
        """Take and send what there is, while something is so, and for so many seconds at most."""
        end = None if seconds is None else monotonic() + seconds
        while going() and (end is None or monotonic() < end):
            tick = TICK if end is None else TICK / 10
            self._server.asyncore.loop(timeout=tick, map=self._server._map, use_poll=True, count=1)
            self._close_stalled()

    def _close_stalled(self) -> None:
        for channel in [*self._server.active_channels.values()]:
            if channel.total_outbufs_len and time() - channel.last_activity > STALLED:
                channel.handle_close()

    def _stop_listening(self) -> None:
        """Take no new connections; those that there are stay."""
        self._server.accepting = False
        self._server.del_channel()
        self._server.socket.close()


def _open(app: App, host: str, port: int, threads: int, log: Log) -> TcpWSGIServer:
    """A server that listens; OSError where it can't, or where waitress isn't there."""
    try:
        from waitress.channel import HTTPChannel
        from waitress.server import create_server
        from waitress.task import ErrorTask
    except ModuleNotFoundError:
        raise OSError(f"serve takes waitress: {INSTALL}") from None

    class Refusal(ErrorTask):  # type: ignore[misc, unused-ignore]
        """What waitress itself can't take for a request, answered as the application would, and logged."""

        def execute(self) -> None:
            error = self.request.error
            said = json.dumps(error_body(f"{error.reason}: {error.body}")).encode("ascii")
            # What it can't do, as other encodings than in chunks, is the client's to change; at 501 it would try again.
            code, reason = (400, "Bad Request") if error.code == 501 else (error.code, error.reason)
            self.status = f"{code} {reason}"
            self.response_headers += [("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff")]
            self.set_close_on_finish()
            self.content_length = len(said)
            self.write(said)
            log(f"{self.channel.addr[0]} - - {code} {printable(str(error.body))}")

    class Channel(HTTPChannel):  # type: ignore[misc, unused-ignore]
        error_task_class = Refusal

    _log_through(log)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"can't listen at port {port} of {host}: {error.strerror}") from None
    server: Any = create_server(
        app,
        sockets=[listening],
        threads=threads,
        ident="",
        connection_limit=CONNECTIONS,
        channel_request_lookahead=1,
        asyncore_use_poll=True,
        max_request_header_size=2**14,
        max_request_body_size=2 * BODY_LIMIT,
        inbuf_overflow=2**16,
        outbuf_high_watermark=2**20,
        clear_untrusted_proxy_headers=True,
    )
    server.channel_class = Channel
    return server


def _log_through(log: Log) -> None:
    """Have waitress say what it says as lines of our log, but for how many tasks wait."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            log(" ".join(filter(None, ["-", printable(record.getMessage()), printable(repr(error)) if error else ""])))

    logger = logging.getLogger("waitress")
    logger.handlers, logger.propagate = [Lines()], False
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
