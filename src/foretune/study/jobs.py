"""A cell as a job: what runs it, wherever that is, and how it ended."""

import contextlib
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from foretune.engines import Work
from foretune.errors import ForetuneError, StoreError, reason
from foretune.faults import disk_is_full, fault_of_outside
from foretune.report.store import write_text
from foretune.study.cell import OnStatus, run_cell
from foretune.study.grid import Cell


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


def _run(_: None, job: Job, on_status: OnStatus | None) -> JobReport:
    return run_job(job, on_status)


CELL_WORK: Work[None, Job, JobReport] = Work(_run, None, "cell")
