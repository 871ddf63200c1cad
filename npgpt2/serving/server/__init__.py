"""Requests over HTTP: an application that any WSGI server with threads can run, and `serve`, which has waitress run it.

It knows what comes over a network: paths, headers, who may ask, and clients that go away. It leaves out what a request
may say and how its answer looks (`protocol`, `choices`, `chunks`), and the parsing of HTTP, sockets and threads for
them, which are waitress's.
"""

from npgpt2.serving.server.application import App, app
from npgpt2.serving.server.guard import Guard
from npgpt2.serving.server.runner import serve

__all__ = ["App", "Guard", "app", "serve"]
