"""A cluster that is there, or one of this machine's own: all that touches Dask but for its tasks."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, NamedTuple

from npgpt2.files import parse_json_object, read_bounded

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local"
# Seconds to wait for a scheduler's first answer; and when all is over, until workers here are killed, and at most.
CONNECT, GRACE, CLOSE = 10.0, 0.5, 5.0
# What tells BLAS how many threads to have, before it is loaded; Dask sets them to 1 for its workers.
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
# What a worker here does first: Ctrl-C goes to all processes of a terminal, and this one ends the others.
IGNORE_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


class Cluster(NamedTuple):
    """A client of a cluster, and how many threads each worker computes with; None for as many as it has by itself."""

    client: Client
    threads: int | None


@contextmanager
def connect(where: str, workers: int | None = None, threads: int | None = None) -> Iterator[Cluster]:
    """A Dask cluster, for as long as the block runs.

    where: a scheduler's address, the path of its scheduler file, or "local", which makes a cluster on this machine, of
    so many workers, each with so many threads: by default one for each core, and all the cores together. ValueError
    where Dask isn't installed, or the address is none; OSError where there is no scheduler.
    """
    try:
        from dask.system import CPU_COUNT
        from distributed import Client, TimeoutError
    except ImportError:
        raise ValueError("--dask needs Dask's distributed: pip install npgpt2[dask]") from None
    with ExitStack() as stack:
        stack.enter_context(_silence())
        if where == LOCAL:
            workers = workers or CPU_COUNT
            threads = threads or max(1, CPU_COUNT // workers)
            stack.enter_context(_keeping_environment())
            address = stack.enter_context(_local(workers, threads))
        else:
            address = _address(where)
        try:
            asyncio.run(asyncio.wait_for(_check_scheduler(address), CONNECT))
            client = Client(address, timeout=CONNECT, set_as_default=False)
        except (OSError, TypeError, ValueError, MemoryError, TimeoutError) as error:  # of a size that is none, too
            at = "there" if address == where else f"at {address}, which is in it"
            why = f" ({error})" if str(error) else ""
            raise ConnectionError(f"{where}: no Dask scheduler answers {at}{why}") from None
        try:
            yield Cluster(client, threads)
        finally:
            with suppress(TimeoutError):  # of a scheduler that doesn't answer
                client.close(timeout=CLOSE)


@contextmanager
def _local(workers: int, threads: int) -> Iterator[str]:
    """A cluster of this machine's own, by its scheduler's address."""
    from dask import config
    from distributed import LocalCluster, TimeoutError

    preload, before = (config.get(f"distributed.{name}") for name in ("worker.preload", "nanny.pre-spawn-environ"))
    # Before a worker begins, since by the time that it is told of others it has loaded NumPy.
    environment = {**before, **dict.fromkeys(THREADS, threads)}
    try:
        with config.set({"distributed.nanny.pre-spawn-environ": environment}):
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=0,  # none, since a mapped model counts for each, though they share it
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                silence_logs=logging.CRITICAL,
                preload=[*([preload] if isinstance(preload, str) else preload), IGNORE_INTERRUPTS],
            )
    except RuntimeError as error:
        raise OSError(f"no Dask cluster can be started on this machine: {error}") from None
    try:
        yield cluster.scheduler_address
    finally:
        # Who is frozen doesn't end by being asked to; who is killed before that is started anew.
        killing = Timer(GRACE, _kill, [[nanny.pid for nanny in cluster.workers.values()]])
        killing.start()
        with suppress(TimeoutError):
            cluster.close(timeout=CLOSE)
        killing.cancel()


@contextmanager
def _keeping_environment() -> Iterator[None]:
    """What Dask sets in this process, for the workers that it starts, isn't there any more afterwards."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _kill(processes: list[int | None]) -> None:
    for process in filter(None, processes):
        with suppress(OSError):  # it has ended by itself
            os.kill(process, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


async def _check_scheduler(address: str) -> None:
    """Raise OSError where something else is at this address; a client would wait for it forever."""
    from distributed import Security, rpc

    async with rpc(address, connection_args=Security().get_connection_args("client")) as there:
        said = await there.identity()
    if said.get("type") != "Scheduler":
        raise ConnectionError(f"it is a {said.get('type')}")


def _address(where: str) -> str:
    """A scheduler's address, as it is, or as its file says, of which only that is read."""
    if "://" in where:
        return where
    if not where.endswith(".json") and not os.path.exists(where):
        expected = "an address such as tcp://host:8786, a scheduler file, or local is expected"
        raise ValueError(f"--dask is {where!r}, where {expected}")
    address = parse_json_object(read_bounded(Path(where)), where).get("address")
    if not isinstance(address, str) or "://" not in address:
        raise ValueError(f"{where}: names no scheduler's address; is it what dask scheduler --scheduler-file wrote?")
    return address


@contextmanager
def _silence() -> Iterator[None]:
    """Dask's own messages, whole tracebacks, are left out meanwhile: what matters of them is said in a line."""
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in ("distributed", "tornado")]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
