"""What the tests measure: memory, which repeats exactly, where time doesn't, and distributions."""

import tracemalloc

import numpy as np


def allocated_peak(work):
    """The most bytes that a second run of `work` holds at once; what a first one leaves in caches isn't counted."""
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def probabilities(sampler, logits):
    """The distribution that a sampler draws from, over the whole vocabulary: what it cuts off has 0. (V,) → (V,)"""
    tokens, probabilities = sampler.candidates(logits)
    everything = np.zeros(len(logits))
    everything[tokens] = probabilities
    return everything
