"""The run over a file of requests: all lines are checked, then those without an answer are given one.

What answers is a `Runner`: it takes lines as it has room for them, and gives answers back as they come. `on_engine` is
one on this machine.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain, islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from npgpt2.engine import Engine, Request
from npgpt2.engine.engine import Model
from npgpt2.serving.answers import Answers
from npgpt2.serving.choices import Origin, answer
from npgpt2.serving.lines import Line, Requests, salted
from npgpt2.serving.protocol import BadRequest, Completion, error_body

# How many lines are looked at ahead, so that long ones begin before short ones, and how many tokens those may have.
WINDOW, WINDOW_TOKENS = 1024, 2**20
# What `check` finds of a line.
EMPTY, GOOD, BAD = 0, 1, 2

# Called with how many tokens were written, and how many will not be, of those that could have been.
Progress: TypeAlias = Callable[[int, int], object]
Answer: TypeAlias = tuple[Line, int, dict[str, Any]]
Runner: TypeAlias = Callable[[Iterator[Line], Progress], Iterator[Answer]]


class Plan(NamedTuple):
    """What a file of requests asks for, 21 bytes a line.

    marks: (N,) uint64, see `Line` · tokens: (N,) uint32, how many it takes at most · kinds: (N,) uint8, EMPTY, GOOD or
    BAD · first: (N,) int64, the line whose `custom_id` it has again, counted from 0, which is itself where it is new
    """

    marks: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.uint32]
    kinds: npt.NDArray[np.uint8]
    first: npt.NDArray[np.int64]

    @property
    def bad(self) -> int:
        """How many lines can't be answered."""
        return int((self.kinds == BAD).sum())

    @property
    def lines(self) -> int:
        """How many lines there are."""
        return int((self.kinds != EMPTY).sum())

    def read_again(self, requests: Requests) -> Iterator[Line]:
        """The lines that were checked, found wrong where one before has their `custom_id`; what was added behind them
        since is for the next run. ValueError where one isn't there any more.
        """
        number = 0
        for number, line in enumerate(islice(requests.lines(), len(self.marks)), 1):
            if (first := int(self.first[number - 1]) + 1) < number and not line.problem:
                line = line._replace(mark=salted(line.mark, number), completion=None, problem=_repeated(first))
            if line.mark != self.marks[number - 1]:
                raise ValueError(f"{requests.path}: line {number} was changed after it was checked; run again")
            yield line
        if number < len(self.marks):
            raise ValueError(f"{requests.path}: line {number + 1} was taken away after it was checked; run again")


def _repeated(first: int) -> BadRequest:
    return BadRequest(f"custom_id is that of line {first}", "custom_id")


def check(
    requests: Requests,
    report: Callable[[int, BadRequest], object] = lambda number, problem: None,
    progress: Callable[[int], object] = lambda bytes: None,
) -> Plan:
    """Look at every line. report: called with the number of each that is wrong, and with what is"""
    marks, keys, tokens, kinds = array("Q"), array("Q"), array("I"), bytearray()
    for line in requests.lines(progress):
        marks.append(line.mark)
        keys.append(line.mark if line.custom_id is None else line.key)
        tokens.append(line.completion.most_tokens if line.completion else 0)
        kinds.append(BAD if line.problem else GOOD if line.completion else EMPTY)
        if line.problem:
            report(line.number, line.problem)
    if not any(kinds):
        raise ValueError(f"{requests.path}: has no requests")
    _, first, which = np.unique(np.frombuffer(keys, np.uint64), return_index=True, return_inverse=True)
    plan = Plan(
        np.frombuffer(marks, np.uint64).copy(),
        np.frombuffer(tokens, np.uint32).copy(),
        np.frombuffer(kinds, np.uint8).copy(),
        first[which].astype(np.int64),
    )
    for at in np.flatnonzero((plan.first < np.arange(len(kinds))) & (plan.kinds == GOOD)).tolist():
        report(at + 1, _repeated(int(plan.first[at]) + 1))
        plan.marks[at] = salted(int(plan.marks[at]), at + 1)
        plan.kinds[at], plan.tokens[at] = BAD, 0
    return plan


def unanswered(plan: Plan, requests: Requests, answers: Answers) -> tuple[npt.NDArray[np.bool_], int]:
    """Which lines have no answer yet, (N,), and how many of the answers are errors. Cuts off what was torn.

    ValueError where there are answers to other requests, or of another model; then nothing is changed.
    """
    found = answers.find()
    known = np.isin(found.marks, plan.marks[plan.kinds != EMPTY])
    if not known.all():
        what = f"line {int(np.argmin(known)) + 1} answers none of the requests in {requests.path}"
        if found.fingerprint not in (None, requests.fingerprint):
            what = "was written by another model"
        raise ValueError(f"{answers.path}: {what}; give another file with -o")
    if len(np.unique(found.marks)) != len(found.marks):
        raise ValueError(f"{answers.path}: answers a request twice; give another file with -o")
    answers.cut(found.end)
    return (plan.kinds != EMPTY) & ~np.isin(plan.marks, found.marks), found.errors


def run(
    plan: Plan, wanted: npt.NDArray[np.bool_], requests: Requests, answers: Answers, runner: Runner, progress: Progress
) -> int:
    """Have lines answered; returns how many of the answers are errors.

    wanted: which, (N,) · runner: who answers those that are in order; the others' errors are written as they are met
    """
    errors = 0

    def good() -> Iterator[Line]:
        nonlocal errors
        for line in plan.read_again(requests):
            if not wanted[line.number - 1]:
                continue
            if line.problem:
                answers.write(line, 400, error_body(str(line.problem), line.problem.param))
                errors += 1
            else:
                yield line

    def note(written: int, saved: int) -> None:
        answers.sync()
        progress(written, saved)

    for line, status, body in runner(longest_first(good()), note):
        answers.write(line, status, body)
        errors += status != 200
    return errors


def longest_first(lines: Iterable[Line]) -> Iterator[Line]:
    """Lines in another order, so that what runs at the end is short; of those as long as each other, the first comes
    first, since neighbours often begin alike.
    """
    ahead: list[tuple[int, int, Line]] = []
    tokens = 0
    for line in chain(lines, [None]):
        if line and line.completion:
            heappush(ahead, (-line.completion.max_tokens, line.number, line))
            tokens += _size(line)
        while ahead and (line is None or len(ahead) >= WINDOW or tokens >= WINDOW_TOKENS):
            longest = heappop(ahead)[2]
            tokens -= _size(longest)
            yield longest


def _size(line: Line) -> int:
    return sum(map(len, line.completion.prompts)) if line.completion else 0


@dataclass
class _Running:
    """A line, what an engine was asked for to answer it, and how many of its texts haven't ended."""

    line: Line
    completion: Completion
    requests: list[Request]
    left: int


def on_engine(model: Model, origin: Origin, slots: int) -> Runner:
    """What answers lines on this machine, on an engine whose slots are never without work."""

    def submit(engine: Engine, lines: Iterator[Line]) -> Iterator[_Running]:
        """Ask for a text more each time; yields the line that it is for."""
        for line in lines:
            if line.completion:
                running = _Running(line, line.completion, [], line.completion.sequences)
                for prompt, settings in line.completion.submissions():
                    running.requests.append(engine.submit(prompt, **settings))
                    yield running

    def answers(lines: Iterator[Line], progress: Progress) -> Iterator[Answer]:
        engine = Engine(model, slots)
        submitted = submit(engine, lines)
        running_of: dict[Request, _Running] = {}
        while True:
            while engine.running + engine.waiting < 2 * slots and (running := next(submitted, None)):
                running_of[running.requests[-1]] = running
            if not engine.busy:
                return
            events, saved, done = engine.step(), 0, []
            for event in events:
                if event.finish_reason:
                    running = running_of.pop(event.request)
                    running.left -= 1
                    if not running.left:
                        done.append(running)
                    saved += event.request.limits.length - len(event.request.tokens)
            progress(sum(event.token is not None for event in events), saved)
            for running in done:
                yield _answer(running, model, origin)

    return answers


def _answer(running: _Running, model: Model, origin: Origin) -> Answer:
    """A line's answer, or the error by which one of its texts ended."""
    for request in running.requests:
        if request.error:
            return running.line, 500, error_body(str(request.error), type="server_error")
    id = f"{running.line.mark:016x}"
    return running.line, 200, answer(running.completion, running.requests, model.tokenizer, origin, id)
