"""When this process can be forked: not while another thread is in the middle of something that has to be whole.

A forked process goes on with the thread that forked, and all else as it was: a lock that another thread had, such as
those of BLAS and of imports, is never let go of there, and what was half done stays so. So a fork waits for the passes,
steps and imports that others have begun, and they wait, before they begin, for a fork.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident

# Seconds that a fork waits at most.
PATIENCE = 60

_changing = Condition()
# What is going on that has to be whole, by thread and kind; and how many threads are about to fork.
_going_on: set[tuple[int, str]] = set()
_forking = 0


@contextmanager
def whole(kind: str) -> Iterator[None]:
    """Meanwhile, other threads that fork wait. kind: by which what contains another is told from it.

    >>> with whole("step"), whole("pass"):
    ...     pass
    """
    me = (get_ident(), kind)
    try:
        with _changing:
            if not any(thread == get_ident() for thread, _ in _going_on):
                _changing.wait_for(lambda: not _forking)
            _going_on.add(me)
        yield
    finally:
        with _changing:
            _going_on.discard(me)
            _changing.notify_all()


def _before() -> None:
    """Wait for what others have begun. The lock isn't kept, so that a fork that fails leaves nothing held."""
    global _forking
    with _changing:
        _forking += 1
        _changing.wait_for(lambda: all(thread == get_ident() for thread, _ in _going_on), PATIENCE)


def _after_in_parent() -> None:
    global _forking
    with _changing:
        _forking -= 1
        _changing.notify_all()


def _after_in_child() -> None:
    global _changing, _forking
    _changing, _forking = Condition(), 0
    _going_on.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
