"""One thread that steps one engine, for all requests that have come: `Loop`, and a `Job` for each request.

Requests wait here, not in the engine: a text is submitted when there is a slot for it, so that what waits takes no more
than its prompt, and of several that want more slots than there are, the one that has the fewest gets the next.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import Empty, SimpleQueue
from threading import Condition, Thread
from time import monotonic

from npgpt2.engine import Engine, Event, Request
from npgpt2.engine.engine import Model
from npgpt2.engine.request import FinishReason
from npgpt2.serving.choices import FINISH
from npgpt2.serving.protocol import Completion
from npgpt2.serving.server.metrics import Metrics

# What a step brought for a request: events, with the numbers of its texts.
Batch = list[tuple[int, Event]]


class Full(Exception):
    """There is no room for another request to wait."""


class Stopped(Exception):
    """Nothing will be answered any more; status: whose fault that is, as HTTP has it."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.status = status

    def again(self) -> Stopped:
        """The same, to be raised once more: one that is raised keeps what it has been raised from."""
        return Stopped(str(self), self.status)


class Gone(Exception):
    """Whoever asked doesn't wait for the answer any more."""


class Job:
    """A request while it waits and runs.

    completion: what is asked for · gone: says whether whoever asked has gone away · requests: what the engine was asked
    for so far, in the order of the completion's texts · written: how many tokens were generated · error: why it ended
    before it was done · reason: of its text that ended last · first: seconds to its first token, once there is one
    """

    def __init__(self, completion: Completion, gone: Callable[[], bool]) -> None:
        # As Python's lists, the ids of a prompt take nine times as much.
        self.completion = replace(completion, prompts=[array("I", prompt) for prompt in completion.prompts])
        self.gone = gone
        self.requests: list[Request] = []
        self.written = 0
        self.error: Exception | None = None
        self.reason: FinishReason = "cancelled"
        self.first: float | None = None
        self.arrived = monotonic()
        self._submissions = self.completion.submissions()
        self._running: dict[Request, int] = {}  # which of the texts each is
        self._unsubmitted = self.completion.sequences
        self._events: SimpleQueue[Batch | None] = SimpleQueue()
        self._last: dict[Request, float] = {}  # when each had its last token

    # ---- For whoever waits

    def cancel(self) -> None:
        """Say that nobody waits any more."""
        self.gone = lambda: True

    def events(self, patience: float) -> Iterator[Batch]:
        """What steps brought, as it comes, each with the number of the text that it is of; nothing where there was none
        for so many seconds. Raises `error` in the end, if there is one.
        """
        while True:
            try:
                batch = self._events.get(timeout=patience)
            except Empty:
                yield []
                continue
            if batch is None:
                break
            yield batch
        if self.error:
            raise self.error

    # ---- For the loop

    @property
    def running(self) -> int:
        """How many of its texts the engine has been asked for, and has not ended."""
        return len(self._running)

    @property
    def begun(self) -> bool:
        return bool(self.requests)

    @property
    def wants_more(self) -> bool:
        """Whether it has texts that the engine hasn't been asked for."""
        return self._unsubmitted > 0

    @property
    def done(self) -> bool:
        return not self._running and not self._unsubmitted

    def submit(self, engine: Engine) -> Request:
        """Ask the engine for the next text."""
        prompt, settings = next(self._submissions)
        self._unsubmitted -= 1
        request = engine.submit(prompt, **settings)
        self._running[request] = len(self.requests)
        self.requests.append(request)
        return request

    def take(self, events: list[Event], metrics: Metrics) -> None:
        """Pass on what a step brought for its texts."""
        now, before = monotonic(), self.written
        batch: Batch = []
        for event in events:
            request = event.request
            batch.append((self._running[request], event))
            if event.token is not None:
                self.written += self.completion.max_tokens > 0  # where it is 0, the one token is left out again
                if request in self._last:
                    metrics.observe("between_tokens", now - self._last[request])
                elif request.reused:
                    metrics.count("prefix_hits")
                    metrics.count("prefix_hit_tokens", request.reused)
                if self.first is None:
                    self.first = now - self.arrived
                    metrics.observe("to_first_token", self.first)
                self._last[request] = now
            if event.finish_reason:
                del self._running[request]
                self._last.pop(request, None)
                self.error, self.reason = self.error or request.error, event.finish_reason
        metrics.count("generated_tokens", self.written - before)
        if self.completion.stream:  # whoever waits for the whole of it needn't be woken
            self._events.put(batch)

    def end(self, engine: Engine, error: Exception | None) -> None:
        """Say that no more comes; what still runs is cancelled."""
        for request in self._running:
            engine.cancel(request)
        self.error = self.error or error
        self._running, self._unsubmitted = {}, 0
        self._events.put(None)


class Loop:
    """The thread, and the requests that it works on.

    slots: how many texts are continued at once · queue: how many requests wait at most while all slots are taken ·
    error: by which the thread died, if it has · died: what is called then
    """

    def __init__(self, model: Model, slots: int, queue: int, metrics: Metrics) -> None:
        self.error: BaseException | None = None
        self.died: Callable[[], object] = lambda: None
        self._engine = Engine(model, slots)
        self._queue, self._metrics = queue, metrics
        self._jobs: dict[Job, None] = {}  # in the order in which they came
        self._job_of: dict[Request, Job] = {}
        self._thread: Thread | None = None
        self._changed = Condition()  # held where the jobs or what follows are looked at or changed
        self._stopping: Stopped | None = None

    def start(self) -> None:
        """Start the thread, if that hasn't been done."""
        with self._changed:
            if self._thread is None and not self._stopping:
                self._thread = Thread(target=self._run, name="npgpt2 engine", daemon=True)
                self._thread.start()

    def submit(self, completion: Completion, gone: Callable[[], bool]) -> Job:
        """Have a request answered; `Full` where too many wait, `Stopped` where none will be answered."""
        self.start()
        job = Job(completion, gone)
        with self._changed:
            if self._stopping or self._thread is None or not self._thread.is_alive():  # which a fork leaves behind
                raise (self._stopping or Stopped("the engine's thread isn't running")).again()
            free = self._engine.slots - self._engine.running - self._engine.waiting
            if self.waiting >= self._queue + max(0, free):
                raise Full
            self._jobs[job] = None
            self._changed.notify_all()
        return job

    def end_all(self, error: Stopped) -> None:
        """End all requests with an error, and take no others; the thread ends."""
        with self._changed:
            self._stopping = self._stopping or error
            self._changed.notify_all()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread to end."""
        if self._thread is not None:
            self._thread.join(timeout)

    # ---- How many there are just now

    @property
    def running(self) -> int:
        """Requests of which a text has begun."""
        return sum(job.begun for job in [*self._jobs])

    @property
    def waiting(self) -> int:
        """Requests of which none has."""
        return sum(not job.begun for job in [*self._jobs])

    @property
    def slots_used(self) -> int:
        """Texts that are being read or continued."""
        return self._engine.running

    # ---- The thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._end_gone()
                self._feed()
                self._pass_on(self._engine.step())
        except BaseException as error:  # whatever it is, nobody may wait for what won't come
            self.error = error
        with self._changed:
            self._stopping = self._stopping or Stopped(f"the engine failed: {self.error!r}")
        for job in [*self._jobs]:
            self._end(job, self._stopping.again())
        if self.error:
            self.died()

    def _wait(self) -> bool:
        """Wait until there is something to do; False where there won't be."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._stopping or self._engine.busy)
            return not self._stopping

    def _end_gone(self) -> None:
        for job in [*self._jobs]:
            if job.gone():
                self._end(job, Gone())

    def _feed(self) -> None:
        """Ask the engine for as many texts as there are slots for."""
        while self._engine.running + self._engine.waiting < self._engine.slots:
            wanting = [job for job in [*self._jobs] if job.wants_more]
            if not wanting:
                return
            job = min(wanting, key=lambda job: job.running)
            if not job.begun:
                self._metrics.count("prompt_tokens", sum(map(len, job.completion.prompts)))
            try:
                self._job_of[job.submit(self._engine)] = job
            except Exception as error:  # which concerns this one alone
                self._end(job, error)

    def _pass_on(self, events: list[Event]) -> None:
        of: dict[Job, list[Event]] = {}
        for event in events:
            job = self._job_of.get(event.request)
            if job is not None:
                of.setdefault(job, []).append(event)
            if event.finish_reason:
                self._job_of.pop(event.request, None)
        for job, its in of.items():
            if job in self._jobs:
                job.take(its, self._metrics)
                if job.error or job.done:
                    self._end(job, None)

    def _end(self, job: Job, error: Exception | None) -> None:
        with self._changed:
            del self._jobs[job]
        job.end(self._engine, error)
        reason = "cancelled" if isinstance(job.error, Gone) else "error" if job.error else FINISH[job.reason]
        self._metrics.count("requests_finished", reason=reason)
