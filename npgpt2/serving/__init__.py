"""Many requests: what a request's body may say and how its answer looks, the run over a file of them, and the server
that is asked over HTTP. It leaves out how tokens are computed and drawn (`engine`), and arguments (`cli`).

`Requests` reads a file of requests, `check` looks at all of its lines, `unanswered` says which of them `Answers`, the
file of answers, doesn't have yet, and `run` has those answered by `on_engine`, or by another `Runner`. `app` makes of a
model what any WSGI server can run.
"""

from npgpt2.serving.answers import Answers
from npgpt2.serving.batch import Plan, Progress, Runner, check, on_engine, run, unanswered
from npgpt2.serving.choices import Origin, answer
from npgpt2.serving.lines import Line, Requests
from npgpt2.serving.protocol import BadRequest, Completion, error_body, parse_completion
from npgpt2.serving.server import App, app

__all__ = [
    "Answers",
    "App",
    "BadRequest",
    "Completion",
    "Line",
    "Origin",
    "Plan",
    "Progress",
    "Requests",
    "Runner",
    "answer",
    "app",
    "check",
    "error_body",
    "on_engine",
    "parse_completion",
    "run",
    "unanswered",
]
