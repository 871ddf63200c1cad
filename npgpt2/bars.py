"""Progress bars that a forked process can go on drawing.

tqdm's own have one lock, which a process that is forked while another thread draws inherits taken.
"""

from __future__ import annotations

import os
from threading import RLock

from tqdm import tqdm


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar as tqdm draws it, under a lock of ours."""


def _begin_anew() -> None:
    """At first, and after a fork: nobody draws, and no thread of tqdm's watches over bars."""
    Bar.set_lock(RLock())
    Bar.monitor = None


_begin_anew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
