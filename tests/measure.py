"""What the tests measure: memory, which repeats exactly, where time doesn't."""

import tracemalloc


def allocated_peak(work):
    """The most bytes that a second run of `work` holds at once; what a first one leaves in caches isn't counted."""
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
