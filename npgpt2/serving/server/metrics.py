"""What `/metrics` tells, in Prometheus's text format: counters, gauges and histograms."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from threading import Lock

TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds of a histogram's buckets, in seconds.
FIRST_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
# What is counted, by what is said of it; the first label of each is the reason why requests ended.
COUNTERS = {
    "requests_finished": "Requests for completions that ended, by reason.",
    "prompt_tokens": "Tokens of prompts.",
    "generated_tokens": "Tokens that were generated.",
    "prefix_hits": "Prompts of which some tokens had been read before.",
    "prefix_hit_tokens": "Tokens of prompts that had been read before.",
}
REASONS = ("stop", "length", "cancelled", "error")


class Histogram:
    """How often something took how long. bounds: upper bounds of the buckets, in seconds

    >>> times = Histogram((0.1, 1.0))
    >>> for seconds in (0.1, 0.5, 7):
    ...     times.observe(seconds)
    >>> [*times.lines("t")][:3]
    ['t_bucket{le="0.1"} 1', 't_bucket{le="1.0"} 2', 't_bucket{le="+Inf"} 3']
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What is counted from a server's start on, by any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: defaultdict[tuple[str, str], int] = defaultdict(int)
        for reason in REASONS:  # so that they are there from the beginning
            self._counts["requests_finished", reason] = 0
        self._times = {
            "time_to_first_token_seconds": Histogram(FIRST_BOUNDS),
            "time_between_tokens_seconds": Histogram(BETWEEN_BOUNDS),
        }
        self._said = {
            "time_to_first_token_seconds": "From a request's arrival to its first token.",
            "time_between_tokens_seconds": "From one token of a text to the next.",
        }

    def count(self, name: str, number: int = 1, reason: str = "") -> None:
        """Add to one of `COUNTERS`."""
        with self._lock:
            self._counts[name, reason] += number

    def observe(self, name: str, seconds: float) -> None:
        """Take note of a time, `to_first_token` or `between_tokens`."""
        with self._lock:
            self._times[f"time_{name}_seconds"].observe(seconds)

    def render(self, gauges: dict[str, tuple[str, Callable[[], int]]]) -> str:
        """All of it as text. gauges: what else there is just now, by name: what to say of it, and how many it is"""
        lines: list[str] = []

        def begin(name: str, kind: str, said: str) -> str:
            lines.extend((f"# HELP npgpt2_{name} {said}", f"# TYPE npgpt2_{name} {kind}"))
            return f"npgpt2_{name}"

        for name, (said, value) in gauges.items():
            lines.append(f"{begin(name, 'gauge', said)} {value()}")
        with self._lock:
            for name, said in COUNTERS.items():
                full = begin(f"{name}_total", "counter", said)
                labelled = {reason: count for (counted, reason), count in self._counts.items() if counted == name}
                for reason, count in (labelled or {"": 0}).items():
                    lines.append(f'{full}{{reason="{reason}"}} {count}' if reason else f"{full} {count}")
            for name, histogram in self._times.items():
                lines.extend(histogram.lines(begin(name, "histogram", self._said[name])))
        return "\n".join(lines) + "\n"
