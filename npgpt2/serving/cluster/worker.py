"""What runs on a worker: a model that is loaded once, and an engine for each micro-batch. It doesn't know Dask.

What is asked for comes as bytes that are opened here, within the task, since Dask opens a task's own parts before it: a
worker that lacks a module of theirs says nothing, and never answers anything again.
"""

from __future__ import annotations

import os
import pickle
import socket
from functools import lru_cache
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

from npgpt2 import GPT2, __version__
from npgpt2.kernels import count_threads
from npgpt2.models import find_model
from npgpt2.serving.batch import Answer, on_engine
from npgpt2.serving.choices import Origin
from npgpt2.serving.lines import Line
from npgpt2.weights import Weights


class Work(NamedTuple):
    """What a run asks of all its workers.

    path: of the model's file · origin: what answers say, whose fingerprint the file has to have · slots: of an engine ·
    threads: how many compute, None for as many as BLAS has there · version: of npgpt2
    """

    path: str
    origin: Origin
    slots: int
    threads: int | None = None
    version: str = __version__


class Report(NamedTuple):
    """What came of a micro-batch: number, status and body of each line; seconds, and tokens that were written, and that
    could have been; and with how many threads, of how many cores, on which machine.
    """

    answers: list[tuple[int, int, dict[str, Any]]]
    seconds: float
    written: int
    saved: int
    threads: int
    cores: int
    host: str


class Problem(NamedTuple):
    """What went wrong instead: with these lines, or unfit, since this worker can't answer for this run."""

    why: str
    unfit: bool


class _Call(NamedTuple):
    """`answer_lines` with its arguments, which pickle calls where it is opened."""

    work: Work
    lines: list[Line]

    def __reduce__(self) -> tuple[Any, ...]:
        return answer_lines, (*self,)


def packed(work: Work, lines: list[Line]) -> bytes:
    """Bytes of which `pickle.loads` makes a `Report` of these lines, or a `Problem`."""
    return pickle.dumps(_Call(work, lines))


# Several tasks of a worker with threads take turns: an engine has all cores that it may have.
_turn = Lock()


def answer_lines(work: Work, lines: list[Line]) -> Report | Problem:
    """Answer lines, or none, which only loads the model.

    Errors are returned, since Dask can lose those that are raised: one with a deep traceback can't be sent.
    """
    if work.version != __version__:
        return Problem(f"has npgpt2 {__version__}, where {work.version} asks", unfit=True)
    with _turn:
        try:
            model = _current(work)
        except Exception as error:
            return Problem(_describe(error), unfit=True)
        try:
            return _answer(model, work, lines)
        except Exception as error:
            why = _describe(error)
        return Problem(why, unfit=not _works(model))  # out here, where the memory that it took is free again


def _answer(model: GPT2, work: Work, lines: list[Line]) -> Report:
    start, written, saved = perf_counter(), 0, 0

    def progress(now: int, not_needed: int) -> None:
        nonlocal written, saved
        written, saved = written + now, saved + not_needed

    found: list[Answer] = list(on_engine(model, work.origin, work.slots)(iter(lines), progress))
    answers = [(line.number, status, body) for line, status, body in found]
    threads = work.threads or count_threads()
    return Report(answers, perf_counter() - start, written, saved, threads, os.cpu_count() or 1, socket.gethostname())


def _works(model: GPT2) -> bool:
    """Whether a token can be had here, so that it's the lines that something is wrong with."""
    try:
        model.generate_tokens([0], length=1)
    except Exception:
        return False
    return True


def _describe(error: Exception) -> str:
    """What OSError and ValueError say is meant to be read by itself."""
    if isinstance(error, OSError | ValueError) and str(error):
        return " ".join(str(error).split())
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]


def _current(work: Work) -> GPT2:
    """The model, loaded once, or again where its file was written to meanwhile."""
    model = _load(work.path, work.origin.model, work.origin.fingerprint, work.threads)
    try:
        if isinstance(model.weights, Weights):
            model.weights.check_unchanged()
    except ValueError:
        _load.cache_clear()
        model = _load(work.path, work.origin.model, work.origin.fingerprint, work.threads)
    return model


@lru_cache(maxsize=1)
def _load(path: str, name: str, fingerprint: str, threads: int | None) -> GPT2:
    """The model: the file of this path, or where there is none, that of its name in this machine's folder of models."""
    try:
        weights = Weights(find_model(path))
    except FileNotFoundError:
        weights = Weights(find_model(name))
    if weights.fingerprint() != fingerprint:
        raise ValueError(f"{weights.path}: is another model here, {weights.fingerprint()}, not {fingerprint}")
    model = GPT2(weights, threads=threads)
    _ = model.tokenizer  # without which no line could be answered
    return model
