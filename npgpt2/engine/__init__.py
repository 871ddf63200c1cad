"""The loop that continues texts, whoever asked for them: many at a time, each with its own settings.

An `Engine` is handed a model's matrices, its tokenizer and requests; it knows nothing of files, of how a product is
computed, or of who waits for an answer. `stream` and `samples` run one for callers that have nothing else to do.
`search_beams` has a loop of its own, on the same slots, since what its texts are depends on each other.
"""

from npgpt2.engine.beams import Beam, EarlyStopping, Search, search_beams
from npgpt2.engine.cache import Reading, Slots, Span
from npgpt2.engine.engine import Engine, Model, Prompt, end_tokens
from npgpt2.engine.request import Event, Limits, LogProb, Request, Settings, mean_logprob, parse_settings
from npgpt2.engine.sequence import window_start
from npgpt2.engine.streams import Stream, check_best_of, draws, likeliest, run, samples, stream

__all__ = [
    "Beam",
    "EarlyStopping",
    "Engine",
    "Event",
    "Limits",
    "LogProb",
    "Model",
    "Prompt",
    "Reading",
    "Request",
    "Search",
    "Settings",
    "Slots",
    "Span",
    "Stream",
    "check_best_of",
    "draws",
    "end_tokens",
    "likeliest",
    "mean_logprob",
    "parse_settings",
    "run",
    "samples",
    "search_beams",
    "stream",
    "window_start",
]
