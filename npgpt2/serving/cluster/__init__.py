"""Micro-batches of requests for a Dask cluster, whose workers may die, freeze, come and go. Nothing else knows Dask.

`connect` finds a cluster, or makes one; `on_cluster` is a `Runner` that hands lines to its workers. What is left to do,
and what is to blame for a death, is in `jobs`; `worker` is what runs where the model is.
"""

from npgpt2.serving.cluster.client import connect
from npgpt2.serving.cluster.runner import on_cluster
from npgpt2.serving.cluster.worker import Work

__all__ = ["Work", "connect", "on_cluster"]
