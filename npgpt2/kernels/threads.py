"""Threads: how many there are, and how kernels share their work among them.

NumPy hands products of matrices to a library, BLAS, which divides each among threads of its own. For a pass of a single
row that is best, since each product is over before threads of Python's would have met, and on some processors for a few
rows too. A pass of more is divided here, while BLAS keeps to one thread in each part: what is done between the products
is then divided as well. NumPy lets go of Python's lock while it computes, so that this is worth it.

It takes OpenBLAS, which most of NumPy's own builds contain, and whose number of threads can be changed. With another
BLAS, as Accelerate in the builds for macOS from 14 on, the products are all that is divided, by itself.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread, get_ident, local
from typing import TypeAlias

import numpy as np

from npgpt2.forks import whole

Work = Callable[[int, int], object]
Ended = list[BaseException | None]
Tasks: TypeAlias = "SimpleQueue[tuple[Work, int, int, Ended, SimpleQueue[None]]]"

# Multiplications that are worth a thread of their own: fewer are over before it has begun (`tools/tune.py threads`).
THREAD_WORTH = 2**20

# The program's threads that are in a pass, and what BLAS had before the first of them came, which the last sets again
# if nobody else has set another number meanwhile than the pass that was last to begin.
_passing: set[int] = set()
_blas_had, _blas_got = 1, 1
# One pass at a time has our threads; another, meanwhile, does its parts one by one.
_owner: int | None = None
_changing = Lock()
# The threads that work beside the one that owns them, by their queues.
_queues: list[Tasks] = []


class _Mode(local):
    """What `sharing` has set for the thread that asks: into how many parts work is cut, and who does them."""

    cuts = has_threads = False
    threads = 1


_mode = _Mode()


class OpenBLAS:
    """The OpenBLAS that NumPy computes with; AttributeError or OSError where it is another library, or isn't found.

    threads: how many it used when it was found · kernels: the processors that its kernels are made for
    """

    def __init__(self) -> None:
        module = np.linalg._umath_linalg.__file__  # type: ignore[attr-defined, unused-ignore]
        library = ctypes.CDLL(str(library_path(Path(module))))
        # What they are called depends on who built it: NumPy 2, for Windows on ARM too, NumPy 1.26, or a distribution.
        names = ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}")
        name = next((name for name in names if hasattr(library, name.format("get_num_threads"))), names[0])
        self.get_threads: Callable[[], int] = getattr(library, name.format("get_num_threads"))
        self.set_threads: Callable[[int], object] = getattr(library, name.format("set_num_threads"))
        if getattr(library, name.format("get_parallel"))() == 2:
            raise OSError("with OpenMP, each thread has its own number")
        corename = getattr(library, name.format("get_corename"))
        corename.restype = ctypes.c_char_p
        self.threads, self.kernels = self.get_threads(), corename().decode()


def library_path(module: Path) -> Path:
    """Where the functions of BLAS are found, of a module of NumPy's, in its folder `linalg`, that is linked with it.

    In most systems they are found in whatever is linked with them. In Windows each library has its own alone, and
    NumPy's builds have theirs in a folder beside the package.
    """
    return next((module.parents[2] / "numpy.libs").glob("*openblas*.dll"), module)


@cache
def openblas() -> OpenBLAS | None:
    """The OpenBLAS that NumPy computes with, or None."""
    try:
        return OpenBLAS()
    except (AttributeError, OSError):  # nothing is lost but speed
        return None


def count_threads() -> int:
    """How many threads work is divided among: as many as OpenBLAS uses, which is as many as there are cores, or as
    $OPENBLAS_NUM_THREADS or $OMP_NUM_THREADS said when the program began; with another BLAS, one.

    >>> count_threads() >= 1
    True
    """
    blas = openblas()
    return blas.threads if blas else 1


@contextmanager
def sharing(threads: int | None = None, divided: bool = True) -> Iterator[None]:
    """Meanwhile, what this thread computes takes so many threads, by default `count_threads`.

    divided: whether kernels cut their work into parts, for threads of ours, while BLAS keeps to one; otherwise BLAS
    divides each product among threads of its own. Where BLAS is no OpenBLAS, it alone decides.
    """
    with whole("pass"):  # since a process that is forked while a thread is within BLAS hangs at its next product
        blas = openblas()
        if blas is None or _mode.cuts or not (divided or threads):
            yield
            return
        try:
            _begin(blas, threads or blas.threads, divided)
            yield
        finally:
            _mode.cuts = False  # first, so that wherever Ctrl-C comes in, the next pass sets all to rights
            _end(blas)


def _begin(blas: OpenBLAS, threads: int, divided: bool) -> None:
    global _owner, _blas_had, _blas_got
    with _changing:
        if not _passing:
            _blas_had = blas.get_threads()
        _passing.add(get_ident())
        _blas_got = 1 if divided else threads
        blas.set_threads(_blas_got)
        if divided and _owner is None and not sys.is_finalizing():
            _owner = get_ident()
        _mode.cuts, _mode.threads, _mode.has_threads = divided, threads, _owner == get_ident()


def _end(blas: OpenBLAS) -> None:
    global _owner
    with _changing:
        _mode.has_threads = False
        if _owner == get_ident():
            _owner = None
        if _passing == {get_ident()} and blas.get_threads() == _blas_got:
            blas.set_threads(_blas_had)
        _passing.discard(get_ident())


def is_sharing() -> bool:
    """Whether the calling thread is in a pass that `sharing` divides."""
    return _mode.cuts


def share(n: int, work: Work, least: int = 1, step: int = 1) -> None:
    """Call work(start, stop) for the parts of range(n), at once where `sharing` says so; what it raises is raised.

    least: how many are worth a thread. The caller does so many more than each of the others, who begin later and have
    to say that they have ended; these can get down to half of it · step: parts begin at multiples of this, and can be
    empty. The parts don't depend on what else is going on, so that results don't either, to the last bit.

    >>> squares = [0] * 4
    >>> def work(start, stop):
    ...     squares[start:stop] = [i * i for i in range(start, stop)]
    >>> with sharing():
    ...     share(4, work)
    >>> squares
    [0, 1, 4, 9]
    """
    count = min(_mode.threads, n // max(least, step)) if _mode.cuts else 1
    if count <= 1:
        work(0, n)
        return
    starts = (least + (n - least) * part // count for part in range(1, count))
    first, *others = pairwise([0, *(start // step * step for start in starts), n])
    workers = _workers(count - 1) if _mode.has_threads else []
    ended: Ended = []  # what became of the parts of others, once each has ended
    done: SimpleQueue[None] = SimpleQueue()
    sent = 0
    try:
        for tasks, (start, stop) in zip(workers, others, strict=False):
            tasks.put((work, start, stop, ended, done))
            sent += 1
        for start, stop in (first, *others[sent:]):
            work(start, stop)
    finally:
        _wait(ended, done, sent)
    try:
        for error in filter(None, ended):
            raise error
    finally:
        ended.clear()  # since the tracebacks in it lead here, and would keep the arrays until they are collected


def _wait(ended: Ended, done: SimpleQueue[None], parts: int) -> None:
    """Wait until so many parts have ended; Ctrl-C takes effect then, since they write to arrays."""
    interrupt = None
    while len(ended) < parts:  # and not: so many gets, since Ctrl-C can come between a get and what is done with it
        try:
            done.get()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _workers(number: int) -> list[Tasks]:
    """So many of our threads; only whoever owns them asks."""
    with suppress(RuntimeError):  # where the system refuses more threads, those that there are do
        while len(_queues) < number:
            tasks: Tasks = SimpleQueue()
            Thread(target=_serve, args=(tasks,), name="npgpt2", daemon=True).start()
            _queues.append(tasks)
    return _queues[:number]


@np.errstate(over="ignore", invalid="ignore")  # as `passes.sharing_work` has it, for its own thread
def _serve(tasks: Tasks) -> None:
    _mode.cuts = True  # it only ever does parts, in which BLAS keeps to one thread
    while True:
        work, start, stop, ended, done = tasks.get()
        try:
            work(start, stop)
            ended.append(None)
        except BaseException as error:
            ended.append(error)
        done.put(None)
        del work, ended  # and with them the arrays


def _begin_anew() -> None:
    """After a fork: the new process has neither the threads nor the passes of the old one."""
    global _changing, _owner
    if _passing and (blas := openblas()):
        blas.set_threads(_blas_had)
    _passing.clear()
    _changing, _owner = Lock(), None
    _mode.cuts = _mode.has_threads = False
    _queues.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
