"""The run over a cluster: micro-batches are handed to workers that are known by name, and taken back where those are
lost.

Which worker has what is decided here, since only so is it known whom a death is to be blamed on, and what a frozen
worker holds up; Dask would wait five minutes for that. A worker is first asked to load the model, and is given lines
once it has: one micro-batch to work at, and one that waits.
"""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from npgpt2.serving.batch import Answer, Progress, Runner
from npgpt2.serving.cluster.jobs import LOSSES, Job, Jobs
from npgpt2.serving.cluster.worker import Problem, Report, Work, packed
from npgpt2.serving.lines import Line

if TYPE_CHECKING:
    from distributed import Client

# Micro-batches that a worker has: the one it works at, and the next, so that it doesn't wait for it.
AHEAD = 2
# Seconds without a sign of life, after which a worker's lines are given to others; of many workers, each gives such
# signs less often: ten of them each half second, a thousand each six, and ten thousand each fifty.
PATIENCE, PATIENCE_WORKER = 30.0, 0.02
# Seconds between two looks at who is there, and more by this for each worker, about whom the scheduler tells 2 kB.
LOOK, LOOK_WORKER = 0.5, 0.005
# Micro-batches in a row that a worker may fail at, if there are others. A single request that is to blame for all comes
# up less often.
FAILURES = LOSSES + 2
# Seconds after which files are synced, and what doesn't come as an event is looked at.
TICK = 0.25
# Seconds without workers, of which something is said.
QUIET = 2.0

Say: TypeAlias = Callable[[str], object]


class _Seen(NamedTuple):
    """The workers that the scheduler knows, by their addresses, and how many seconds that looks at."""

    workers: Mapping[str, Mapping[str, Any]]
    elapsed: float


class _Gone(NamedTuple):
    """The scheduler doesn't answer."""

    why: str


@dataclass(eq=False)
class _Worker:
    """A worker's process, what it has, and what is known of it.

    process: what another of this address would have differently · seen: when the scheduler last heard of it, by its
    clock, and silent: for how many seconds that hasn't changed · ready: whether it has loaded the model · unfit: why it
    can't answer · failures: how many micro-batches in a row it has failed at · frozen: whether it has been silent, or
    leaving, for too long · leaving: whether it is about to end, or pauses for want of memory · pace: of work, a second
    """

    address: str
    process: object
    seen: float
    silent: float = 0.0
    ready: bool = False
    unfit: str | None = None
    failures: int = 0
    frozen: bool = False
    leaving: bool = False
    pace: float = 0.0
    jobs: list[Job] = field(default_factory=list)


def on_cluster(
    client: Client, work: Work, tokens: int, say: Say = lambda message: None, patience: float = PATIENCE
) -> Runner:
    """What answers lines on all workers of a Dask cluster, whoever of them is there.

    tokens: how many all lines write at most · say: told in a line what happens to workers · patience: seconds without a
    sign of life, after which a worker's lines are given to others. The runner raises ConnectionError where the
    scheduler is gone, and ValueError where none of the workers there can answer.
    """

    def answers(lines: Iterator[Line], progress: Progress) -> Iterator[Answer]:
        run = _Run(client, work, Jobs(lines, tokens, work.slots), say, patience)
        return run.answers(progress)

    return answers


class _Run:
    """A run while it goes on. What comes from the client's thread comes as an event."""

    def __init__(self, client: Client, work: Work, jobs: Jobs, say: Say, patience: float) -> None:
        self._client, self._work, self._jobs, self._say, self._patience = client, work, jobs, say, patience
        self._address = client.scheduler.address
        self._workers: dict[str, _Worker] = {}
        self._events: SimpleQueue[_Seen | _Gone | tuple[_Worker, Job, object]] = SimpleQueue()
        name = os.urandom(4).hex()
        self._keys = (f"npgpt2-{name}-{number}" for number in count())
        self._kinds: set[tuple[int, int]] = set()  # of threads and cores, that were told of
        self._lost_loading = 0
        self._nobody_since: float | None = monotonic()
        self._demand: Any = None

    def answers(self, progress: Progress) -> Iterator[Answer]:
        """Answer all lines."""
        watching = self._start(self._watch())
        try:
            while self._jobs.left or any(job.lines for worker in self._workers.values() for job in worker.jobs):
                ended = watching.done()  # having said why, or else by an error of its own
                self._hand_out()
                yield from self._wait(progress)
                if ended:
                    watching.result()
                self._look_for_nobody()
        finally:
            watching.cancel()
            for worker in self._workers.values():
                self._take_back(worker)
            self._demand = None

    def _wait(self, progress: Progress) -> list[Answer]:
        """Note what has happened, or that nothing did."""
        found: list[Answer] = []
        timeout: float | None = TICK
        while True:
            try:
                event = self._events.get(timeout=timeout)
            except Empty:
                break
            timeout = 0.0
            if isinstance(event, _Seen):
                found += self._see(event)
            elif isinstance(event, _Gone):
                raise self._scheduler_gone(event.why)
            else:
                found += self._finish(*event, progress)
        if self._client.status != "running":
            raise self._scheduler_gone("is gone")
        progress(0, 0)
        return found

    def _scheduler_gone(self, why: str) -> ConnectionError:
        return ConnectionError(f"{self._address}: the scheduler {why}; run again to go on")

    # ---- In the client's thread

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._client.loop.asyncio_loop)

    async def _watch(self) -> None:
        """Look at who is there, again and again."""
        last = monotonic()
        while True:
            asked = asyncio.ensure_future(self._client.scheduler.identity())
            await asyncio.wait({asked}, timeout=self._patience)
            if not asked.done() or asked.exception():
                asked.cancel()
                self._events.put(_Gone("doesn't answer"))
                return
            workers = asked.result()["workers"]
            pause = LOOK + LOOK_WORKER * len(workers)
            # Of no more than this, since it may be us who were stopped for a while.
            now, elapsed = monotonic(), min(monotonic() - last, 2 * pause)
            self._events.put(_Seen(workers, elapsed))
            last = now
            await asyncio.sleep(pause)

    async def _follow(self, worker: _Worker, job: Job) -> None:
        """Have a worker do a micro-batch. Cancelled, this forgets about it, and so does the scheduler."""
        data, key, future = packed(self._work, job.lines), next(self._keys), None
        outcome: object
        try:
            future = self._client.submit(
                pickle.loads, data, key=key, workers=[worker.address], allow_other_workers=False, pure=False
            )
            outcome = await future
        except Exception as error:  # whatever it is, it is this micro-batch's outcome
            outcome = error
        finally:
            if future:
                future.release()
        self._events.put((worker, job, outcome))

    # ---- Who is there

    def _see(self, seen: _Seen) -> list[Answer]:
        found: list[Answer] = []
        for address, worker in [*self._workers.items()]:
            info = seen.workers.get(address)
            if info is None or info["local_directory"] != worker.process:
                del self._workers[address]
                found += self._lose(worker, "it ended" if worker.leaving else "it died")
        patience = max(self._patience, PATIENCE_WORKER * len(seen.workers))
        for address, info in seen.workers.items():
            worker = self._workers.setdefault(address, _Worker(address, info["local_directory"], info["last_seen"]))
            worker.leaving = info["status"] != "running"
            worker.silent += seen.elapsed
            if info["last_seen"] != worker.seen and not worker.leaving:
                worker.silent, worker.frozen = 0.0, False
            elif worker.silent >= patience and not worker.frozen:
                worker.frozen = True
                sign = f"has been {info['status']}" if worker.leaving else "gave no sign of life"
                found += self._lose(worker, f"it {sign} for {patience:g} s")
            worker.seen = info["last_seen"]
        return found

    def _lose(self, worker: _Worker, why: str) -> list[Answer]:
        """Give what a worker has to others."""
        if not (jobs := self._take_back(worker)):
            return []
        if not any(job.lines for job in jobs):
            self._say(f"worker {worker.address}: {why} while it loaded the model")
            self._lost_loading += not worker.frozen
            return []
        self._say(f"worker {worker.address}: {why}; others are given its requests")
        for job in reversed(jobs[1:]):
            self._jobs.give_back(job)
        if worker.leaving:
            self._jobs.shorten(jobs[0])
            return []
        return self._jobs.lose(jobs[0], why)

    def _take_back(self, worker: _Worker) -> list[Job]:
        jobs, worker.jobs = worker.jobs, []
        for job in jobs:
            if job.handle:
                job.handle.cancel()
        return jobs

    def _look_for_nobody(self) -> None:
        """Say so where there is nobody who could answer; ValueError where none of those there ever will."""
        workers = self._workers.values()
        if any(not worker.unfit and not worker.frozen for worker in workers):
            self._nobody_since = self._demand = None
            if self._lost_loading >= max(LOSSES, len(workers)):
                raise ValueError(f"{self._address}: {self._lost_loading} workers were lost while they loaded the model")
            return
        if self._nobody_since is None:
            self._nobody_since = monotonic()
        elif self._demand is None and monotonic() - self._nobody_since >= QUIET:
            if workers and all(worker.unfit for worker in workers):
                worker = next(iter(workers))
                raise ValueError(f"{self._address}: no worker there can answer; {worker.address}: {worker.unfit}")
            self._say(f"{self._address}: no workers{' that are alive' if workers else ''}; waiting for one")
            # A cluster that starts workers where there is something to do has to see something.
            self._demand = self._client.submit(int, key=next(self._keys), pure=False)

    # ---- What they do

    def _hand_out(self) -> None:
        """Give each worker what it has room for; those that are new load the model first."""
        for worker in self._workers.values():
            if not (worker.ready or worker.unfit or worker.frozen or worker.leaving or worker.jobs):
                self._give(worker, Job([]))
        usable = self._usable
        for had in range(AHEAD):
            for worker in usable:
                if len(worker.jobs) != had or (had and (self._jobs.suspect or worker.jobs[0].suspect)):
                    continue
                job = self._jobs.take(worker.pace, len(usable)) or (None if had else self._second(usable))
                if job is None:
                    return
                self._give(worker, job)

    @property
    def _usable(self) -> list[_Worker]:
        """Those that can be given lines."""
        return [w for w in self._workers.values() if w.ready and not (w.unfit or w.frozen or w.leaving)]

    def _second(self, usable: list[_Worker]) -> Job | None:
        """What waits behind something that takes longer than all that others had, who have nothing any more."""
        busiest = max(usable, key=lambda worker: len(worker.jobs))
        if len(busiest.jobs) < AHEAD:
            return None
        job = busiest.jobs.pop()
        if job.handle:
            job.handle.cancel()
        return job

    def _give(self, worker: _Worker, job: Job) -> None:
        worker.jobs.append(job)
        job.handle = self._start(self._follow(worker, job))

    def _finish(self, worker: _Worker, job: Job, outcome: object, progress: Progress) -> list[Answer]:
        """Note what came of a micro-batch."""
        if job not in worker.jobs:  # others were given it meanwhile
            return []
        worker.jobs.remove(job)
        if isinstance(outcome, Report):
            self._tell_threads(worker, outcome)
            worker.ready, self._lost_loading = True, 0
            if not job.lines:
                return []
            worker.failures = 0
            worker.pace = job.work / max(outcome.seconds, 1e-3)
            progress(outcome.written, outcome.saved)
            lines = {line.number: line for line in job.lines}
            return [(lines[number], status, body) for number, status, body in outcome.answers]
        if isinstance(outcome, ImportError | AttributeError):
            outcome = Problem(f"hasn't got npgpt2 {self._work.version} ({outcome})", unfit=True)
        worker.failures += 1
        too_often = worker.failures >= FAILURES
        if not isinstance(outcome, Problem):
            outcome = Problem(f"{type(outcome).__name__}: {outcome}", unfit=too_often or not job.lines)
        others = any(other is not worker for other in self._usable)
        if not outcome.unfit and not (too_often and others):  # the last one may have nothing but bad lines left
            self._say(f"worker {worker.address}: {outcome.why}; its requests are tried again")
            return self._jobs.lose(job, outcome.why)
        worker.unfit = outcome.why
        self._say(f"worker {worker.address}: {worker.unfit}")
        for other in [job, *self._take_back(worker)]:
            if other.lines:
                self._jobs.give_back(other)
        return []

    def _tell_threads(self, worker: _Worker, report: Report) -> None:
        kind = report.threads, report.cores
        if kind not in self._kinds:
            self._kinds.add(kind)
            threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
            self._say(
                f"worker {worker.address}: computes with {threads}, on {report.host}, which has {report.cores} cores"
            )
