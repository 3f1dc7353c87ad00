"""Who runs the cells: this process, several processes, or a Ray cluster."""

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

from foretune.errors import ConfigError, ForetuneError, StoreError, reason
from foretune.faults import disk_is_full, fault_of_outside
from foretune.report.provenance import usable_cores
from foretune.report.store import write_text
from foretune.settings.commands import EngineName
from foretune.settings.ranges import Range
from foretune.study.cell import OnStatus, run_cell
from foretune.study.grid import Cell

MOST_WORKERS = 1024


@dataclass(frozen=True)
class Job:
    """A cell to run.

    Attributes:
        cell: Cell.
        key: Its key.
        store: Folder of the study.
    """

    cell: Cell
    key: str
    store: Path


@dataclass(frozen=True)
class JobReport:
    """How a job ended.

    Attributes:
        key: Key of the cell.
        seconds: Time that it took.
        error: What went wrong, in one line; None if nothing did.
        fatal: Whether the next job will fail the same way, as on a full disk.
        fault: Whether it was no input that foretune refuses, but a fault of foretune or a library.
    """

    key: str
    seconds: float
    error: str | None = None
    fatal: bool = False
    fault: bool = False


class Engine(Protocol):
    """Runs jobs, in any order."""

    def __call__(self, jobs: Sequence[Job], on_status: OnStatus) -> Iterator[JobReport]:
        """Run the jobs.

        Args:
            jobs: Jobs.
            on_status: Called with the key and a word on what is done now, where the engine knows.

        Yields:
            A report as soon as a job has ended.
        """
        ...


def run_job(job: Job, on_status: OnStatus | None = None) -> JobReport:
    """Run one job; what goes wrong is reported, so that the others go on.

    Args:
        job: Job.
        on_status: Called with a word on what is done now.

    Returns:
        How it ended.
    """
    start = time.perf_counter()
    error, fatal, fault = None, False, False
    try:
        run_cell(job.cell, job.key, job.store, on_status=on_status)
    except StoreError as failure:
        error, fatal = str(failure), True
    except ForetuneError as failure:
        error = str(failure)
    except Exception as failure:  # a fault in one cell must not take the others with it
        error, fatal = fault_of_outside(failure), disk_is_full(failure)
        if error is None:
            error, fault = f"{type(failure).__name__}: {reason(failure)}; see {_write_traceback(job)}", True
    message = None if error is None else " ".join(error.split())
    return JobReport(job.key, time.perf_counter() - start, message, fatal, fault)


def _write_traceback(job: Job) -> Path:
    path = job.store / "failed" / f"{job.key}.txt"
    with contextlib.suppress(OSError, StoreError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, traceback.format_exc())
    return path


def serial(jobs: Sequence[Job], on_status: OnStatus) -> Iterator[JobReport]:
    """Run the jobs in this process, one after the other.

    Args:
        jobs: Jobs.
        on_status: Called with a word on what is done now.

    Yields:
        A report for each job.
    """
    for job in jobs:
        yield run_job(job, on_status)


@dataclass(frozen=True)
class Processes:
    """Run the jobs in several processes of this machine, which share its cores.

    Attributes:
        workers: Number of processes.
    """

    workers: int

    def __call__(self, jobs: Sequence[Job], on_status: OnStatus) -> Iterator[JobReport]:
        """Run the jobs.

        Args:
            jobs: Jobs.
            on_status: Not called: the work is out of sight.

        Yields:
            A report as soon as a job has ended.

        Raises:
            StoreError: If a process died, as for lack of memory.
        """
        threads = max(1, usable_cores() // self.workers)
        executor = ProcessPoolExecutor(self.workers, get_context("spawn"), _start_worker, (threads,))
        try:
            futures = [executor.submit(run_job, job) for job in jobs]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise StoreError(
                "a worker process died, perhaps for lack of memory: finished cells are kept, lower --workers"
            ) from error
        finally:
            processes = list((executor._processes or {}).values())  # no public way to stop running work
            executor.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers, and they would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def on_ray(jobs: Sequence[Job], on_status: OnStatus) -> Iterator[JobReport]:
    """Run the jobs on a Ray cluster whose machines share the study's folder; without one Ray runs on this machine.

    Args:
        jobs: Jobs.
        on_status: Not called: the work is out of sight.

    Yields:
        A report as soon as a job has ended.

    Raises:
        ConfigError: If Ray is not installed.
        StoreError: If a cell's process died.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine ray needs Ray: pip install 'foretune[ray]'") from error

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        remote = ray.remote(num_gpus=gpus, max_retries=2)(run_job)
        waiting = [remote.remote(job) for job in jobs]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            for reference in done:
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as error:
                    raise StoreError(f"Ray lost a cell: {' '.join(str(error).split())[:200]}") from error
    finally:
        if started:
            with contextlib.suppress(Exception):
                ray.shutdown()


def choose_engine(name: EngineName, workers: int) -> Engine:
    """Choose who runs the cells.

    Args:
        name: `local` or `ray`.
        workers: Processes on this machine.

    Returns:
        The engine.

    Raises:
        ConfigError: If the choice makes no sense.
    """
    Range(1, MOST_WORKERS).check("workers", workers)
    if name == "ray":
        if workers > 1:
            raise ConfigError(f"workers = {workers}: with --engine ray the cluster decides")
        return on_ray
    return serial if workers == 1 else Processes(workers)
