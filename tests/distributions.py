"""What tests of sampling compare: whole distributions."""

import numpy as np


def probabilities(sampler, logits, written=None):
    """The distribution that a sampler draws from, over the whole vocabulary: what it cuts off has 0. (V,) → (V,)"""
    tokens, probabilities = sampler.candidates(logits, written=written)
    everything = np.zeros(len(logits))
    everything[tokens] = probabilities
    return everything
