"""The loop that continues texts, whoever asked for them: many at a time, each with its own settings.

An `Engine` is handed a model's matrices, its tokenizer and requests; it knows nothing of files, of how a product is
computed, or of who waits for an answer. `stream` and `samples` run one for callers that have nothing else to do.
"""

from npgpt2.engine.cache import Reading, Slots, Span
from npgpt2.engine.engine import Engine, Model, Prompt, end_tokens
from npgpt2.engine.request import Event, Limits, LogProb, Request, Settings, mean_logprob, parse_settings
from npgpt2.engine.sequence import window_start
from npgpt2.engine.streams import Stream, run, samples, stream

__all__ = [
    "Engine",
    "Event",
    "Limits",
    "LogProb",
    "Model",
    "Prompt",
    "Reading",
    "Request",
    "Settings",
    "Slots",
    "Span",
    "Stream",
    "end_tokens",
    "mean_logprob",
    "parse_settings",
    "run",
    "samples",
    "stream",
    "window_start",
]
