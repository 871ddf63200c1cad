"""What is left to do, in micro-batches, and who is to blame where workers die. It knows neither Dask nor engines.

A worker's death is blamed on the micro-batch that it was at. That is cut into parts, which others are given, each alone
on its worker; a single line that was lost with so many workers is answered by an error. So one that kills whoever is
given it is found among others, which only take longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from npgpt2.serving.batch import Answer
from npgpt2.serving.lines import Line
from npgpt2.serving.protocol import Completion, error_body

# How long a micro-batch should take. A scheduler has 0.1 to 1 ms of work with each, so that it can bear a thousand
# workers; a worker's death costs no more than this, and an engine that runs dry at the end of each a few percent.
SECONDS = 10.0
# Lines of one, and tokens with what is said of each: all of it is in a worker's memory at once, and in ours.
LINES, SIZE = 1024, 2**19
# Into how many parts one is cut, and with how many workers a single line may be lost.
PARTS, LOSSES = 4, 3
# Tokens that are read in the time that one takes to be written, in which rows are read one by one.
READ_WORTH = 8


@dataclass(eq=False)
class Job:
    """A micro-batch. suspect: whether a worker was lost that was at these lines, and others perhaps · losses: how many
    were, of a line that is alone
    """

    lines: list[Line]
    suspect: bool = False
    losses: int = 0
    handle: Future[Any] | None = field(default=None, repr=False)

    @property
    def work(self) -> float:
        """What it takes, in tokens that are written."""
        return sum(_work(line.completion) for line in self.lines if line.completion)


def _work(asked: Completion) -> float:
    return asked.most_tokens + sum(map(len, asked.prompts)) / READ_WORTH


class Jobs:
    """Lines, each of which is handed out until it is answered.

    lines: all, the longest first · tokens: how many they write at most · slots: of a worker's engine
    """

    def __init__(self, lines: Iterator[Line], tokens: int, slots: int) -> None:
        self._lines, self._tokens, self._slots = lines, tokens, slots
        self._next = next(lines, None)
        self._returned: deque[Job] = deque()

    @property
    def left(self) -> bool:
        """Whether there is anything that nobody has."""
        return bool(self._returned or self._next)

    @property
    def suspect(self) -> bool:
        """Whether a worker was lost with the next one, which has to be alone on the next worker."""
        return bool(self._returned and self._returned[0].suspect)

    def take(self, pace: float, workers: int) -> Job | None:
        """The next one, or None where there is none, now.

        pace: how much work whoever is given it does in a second · workers: how many there are, so that the last ones
        are small enough for all to end together
        """
        if self._returned:
            return self._returned.popleft()
        lines: list[Line] = []
        sequences = written = size = 0
        work = 0.0
        share = self._tokens / (2 * max(1, workers))
        while (line := self._next) and (asked := line.completion) and len(lines) < LINES and size < SIZE:
            if sequences >= self._slots and (work >= pace * SECONDS or written >= share):
                break
            self._next = next(self._lines, None)
            lines.append(line)
            sequences += asked.sequences
            written += asked.most_tokens
            work += _work(asked)
            size += (asked.most_tokens + sum(map(len, asked.prompts))) * (2 + (asked.logprobs or 0))
        self._tokens -= written
        return Job(lines) if lines else None

    def give_back(self, job: Job) -> None:
        """Whoever had it didn't begin with it, or is nobody to blame it for."""
        if job.suspect:
            self._returned.append(job)
        else:
            self._returned.appendleft(job)

    def shorten(self, job: Job) -> None:
        """It was too long for what was left of its worker's time, whom nobody is to blame for."""
        for part in _parts(job.lines):
            self.give_back(replace(job, lines=part, handle=None))

    def lose(self, job: Job, why: str) -> list[Answer]:
        """Its worker was lost, or failed, while it was at this; returns what became known by it."""
        if len(job.lines) > 1:
            self._returned += [Job(part, suspect=True) for part in _parts(job.lines)]
            return []
        job.suspect, job.losses = True, job.losses + 1
        if job.losses < LOSSES:
            self._returned.append(job)
            return []
        body = error_body(f"given up after {LOSSES} workers died of it, or failed: {why}", type="server_error")
        return [(line, 500, body) for line in job.lines]


def _parts(lines: list[Line]) -> list[list[Line]]:
    size = -(-len(lines) // PARTS)
    return [lines[at : at + size] for at in range(0, len(lines), size)]
