"""Who does jobs that do not know each other: this process, several processes of this machine, or a Ray cluster."""

import contextlib
import os
import pickle
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from foretune.errors import ConfigError, StoreError, reason
from foretune.faults import fault_of_outside
from foretune.report.provenance import usable_cores
from foretune.settings.commands import EngineName, check_engine

Common = TypeVar("Common")
Job = TypeVar("Job")
Done = TypeVar("Done")
Tell = Callable[..., None]
Do = Callable[[Common, Job, Tell | None], Done]
_COMMON = "common.pt"
_LAST_WAIT = 10.0  # seconds for processes that were ended
_NO_RAY = "--engine ray needs Ray: pip install 'foretune[ray]'"


@dataclass(frozen=True)
class Work(Generic[Common, Job, Done]):
    """What is done with every job.

    Attributes:
        do: Function of a module, so that other processes find it: takes what all jobs have in common, a job, and whom
            to tell what is done now (None where the work is out of sight), and gives what came of it.
        common: What all jobs have in common, a model for instance: it goes to each process once, on Ray to each
            machine. None takes nothing along.
        noun: What a job is, for messages.
        on_gpu: Whether each takes a GPU of a cluster that has some.
    """

    do: Do[Common, Job, Done]
    common: Common
    noun: str
    on_gpu: bool = True


class Engine(Protocol):
    """Does jobs, in any order."""

    def __call__(
        self, work: Work[Common, Job, Done], jobs: Iterable[Job], on_status: Tell
    ) -> Generator[Done, None, None]:
        """Do the jobs.

        Args:
            work: What is done with every job.
            jobs: Jobs, each taken when it is begun or handed over.
            on_status: Handed to the work, where the engine sees it.

        Yields:
            What came of a job, as soon as it has ended. What a job raises is raised here.
        """
        ...


def serial(work: Work[Common, Job, Done], jobs: Iterable[Job], on_status: Tell) -> Generator[Done, None, None]:
    """Do the jobs in this process, one after the other.

    Args:
        work: What is done with every job.
        jobs: Jobs, each taken when the one before has ended.
        on_status: Handed to the work.

    Yields:
        What came of each job.
    """
    for job in jobs:
        yield work.do(work.common, job, on_status)


@dataclass(frozen=True)
class Processes:
    """Do the jobs in several processes of this machine, which share its cores.

    Attributes:
        workers: Number of processes.
    """

    workers: int

    def __call__(
        self, work: Work[Common, Job, Done], jobs: Iterable[Job], on_status: Tell
    ) -> Generator[Done, None, None]:
        """Do the jobs.

        Args:
            work: What is done with every job; what they have in common goes through a file of the temporary folder.
            jobs: Jobs.
            on_status: Not called: the work is out of sight.

        Yields:
            What came of a job, as soon as it has ended.

        Raises:
            ConfigError: If what the jobs have in common does not go into other processes.
            StoreError: If a process died, as for lack of memory.
        """
        threads = max(1, usable_cores() // self.workers)
        with _written_down(work) as folder:
            executor = ProcessPoolExecutor(self.workers, get_context("spawn"), _start_worker, (threads, folder))
            try:
                futures = [executor.submit(_in_worker, work.do, folder, work.noun, job) for job in jobs]
                for future in as_completed(futures):
                    yield _given(future.result())
            except BrokenProcessPool as error:
                raise StoreError(
                    f"a worker process died, perhaps for lack of memory: finished {work.noun}s are kept, "
                    "lower --workers"
                ) from error
            finally:
                processes = list((executor._processes or {}).values())  # no public way to stop running work
                executor.shutdown(wait=False, cancel_futures=True)
                for process in processes:
                    process.terminate()
                for process in processes:
                    process.join(_LAST_WAIT)


@contextlib.contextmanager
def _written_down(work: Work[Common, Job, Done]) -> Iterator[Path | None]:
    """A folder for the workers, with what all jobs have in common; None where that is nothing."""
    if work.common is None:
        yield None
        return
    import torch

    with tempfile.TemporaryDirectory(prefix="foretune-", ignore_cleanup_errors=True) as name:
        with _handed_over(work.noun):
            torch.save(work.common, Path(name) / _COMMON)
        yield Path(name)


@contextlib.contextmanager
def _handed_over(noun: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if fault_of_outside(error) is not None:
            raise
        raise ConfigError(
            f"what the {noun}s need does not go into other processes ({reason(error)}): leave out --workers "
            "and --engine"
        ) from error


@cache
def _read_common(folder: Path, noun: str) -> Any:
    import torch

    with _handed_over(noun):
        return torch.load(folder / _COMMON, weights_only=False, mmap=True)  # of our own process; pages are shared


def _start_worker(threads: int, folder: Path | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    if folder is not None:
        tempfile.tempdir = str(folder)  # a worker that is ended leaves nothing behind
    import torch

    torch.set_num_threads(threads)


def _end_with_parent(folder: Path | None) -> None:
    """A parent that was killed cannot end its workers, and they would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


@dataclass(frozen=True)
class _Failure:
    """What a job raised in another process, and where."""

    error: Exception
    trace: str


class _Elsewhere(Exception):
    """Traceback of another process."""


def _attempt(call: Callable[[], Done]) -> Done | _Failure:
    try:
        return call()
    except Exception as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # its arguments are not those of its making
            return _Failure(RuntimeError(f"{type(error).__name__}: {reason(error)}"), trace)
        return _Failure(error, trace)


def _given(done: Done | _Failure) -> Done:
    if isinstance(done, _Failure):
        raise done.error from _Elsewhere(f"in another process:\n{done.trace}")
    return done


def _in_worker(do: Do[Any, Job, Done], folder: Path | None, noun: str, job: Job) -> Done | _Failure:
    return _attempt(lambda: do(None if folder is None else _read_common(folder, noun), job, None))


def _on_machine(do: Do[Common, Job, Done], common: Common, job: Job) -> Done | _Failure:
    return _attempt(lambda: do(common, job, None))


def on_ray(work: Work[Common, Job, Done], jobs: Iterable[Job], on_status: Tell) -> Generator[Done, None, None]:
    """Do the jobs on a Ray cluster; without one Ray runs on this machine.

    Args:
        work: What is done with every job; what they have in common goes through Ray's object store.
        jobs: Jobs.
        on_status: Not called: the work is out of sight.

    Yields:
        What came of a job, as soon as it has ended.

    Raises:
        ConfigError: If Ray is not installed, or what the jobs have in common does not go into other processes.
        StoreError: If a job's process died.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(_NO_RAY) from error

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    waiting: list[Any] = []
    try:
        gpus = 1 if work.on_gpu and ray.cluster_resources().get("GPU", 0) else 0
        with _handed_over(work.noun):
            common = ray.put(work.common)
        remote = ray.remote(num_gpus=gpus, max_retries=2)(_on_machine)
        waiting += [remote.remote(work.do, common, job) for job in jobs]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            for reference in done:
                try:
                    given = ray.get(reference)
                except ray.exceptions.RayError as error:
                    what = " ".join(str(error).split())[:200]
                    raise StoreError(f"Ray lost a {work.noun}: {what}") from error
                yield _given(given)
    finally:
        with contextlib.suppress(Exception):
            for reference in waiting:  # nobody waits for them any more
                ray.cancel(reference)
            if started:
                ray.shutdown()


def fitted(engine: Engine, n_jobs: int) -> Engine:
    """Take no more processes than there are jobs, so that each has more cores; one job stays in this process.

    Args:
        engine: Who does them.
        n_jobs: How many there are.

    Returns:
        The engine for so many; Ray as it is.
    """
    if not isinstance(engine, Processes) or n_jobs >= engine.workers:
        return engine
    return Processes(n_jobs) if n_jobs > 1 else serial


def choose_engine(name: EngineName, workers: int) -> Engine:
    """Choose who does the jobs.

    Args:
        name: `local` or `ray`.
        workers: Processes on this machine.

    Returns:
        The engine.

    Raises:
        ConfigError: If the choice makes no sense, or Ray is not installed.
    """
    check_engine(name, workers)
    if name == "ray":
        if find_spec("ray") is None:
            raise ConfigError(_NO_RAY)
        return on_ray
    return serial if workers == 1 else Processes(workers)
