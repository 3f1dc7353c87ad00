"""The same kernel by foretune and by others: seconds in plain passes, memory, error, measured in one process.

Rounds alternate, and a plain pass goes before every call, so that a drift of the machine's speed hits both: a ratio is
the median over rounds of times taken next to each other. Memory is that of a fresh process each. What is not installed
or fails is a row with its error. Cases that stand in the file of results are not measured again: it can be stopped and
started again at any time. With `--again` the old rows of a case stand until its new ones are there.

    python benchmarks/peers.py [--quick] [--results benchmarks/results/peers.jsonl] [--beside 1] [--again]
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from contestants import ALL, Contestant, Run
from contestants.problem import Problem, build, gram, margin

HERE = Path(__file__).parent
CHECKED = 4  # samples whose kernel is computed in float64


@dataclass(frozen=True)
class Case:
    """One setting.

    Attributes:
        model: One of `contestants.problem.MODELS`.
        placement: One of `contestants.problem.PLACEMENTS`.
        n: Samples.
        tokens: Tokens of each.
        beside: Busy processes that run beside it.
    """

    model: str
    placement: str
    n: int
    tokens: int
    beside: int = 0


QUICK = [
    Case("minilm", "some", 32, 64),
    Case("minilm", "all", 32, 16),
    Case("minilm", "all", 32, 128),
    Case("encoder", "all", 8, 128),
    Case("llama", "all", 8, 64),
]
FULL = [
    *QUICK,
    Case("encoder", "some", 32, 128),
    Case("encoder", "all", 32, 128),
    Case("encoder", "all", 32, 128, beside=1),
    Case("minilm", "all", 32, 32),
    *(
        Case(model, placement, n, tokens)
        for model in ("minilm", "encoder")
        for placement in ("some", "all")
        for n, tokens in ((32, 64), (32, 512), (256, 64), (256, 128))
    ),
    Case("llama", "some", 32, 128),
    Case("llama", "all", 32, 128),
]


def reference(problem: Problem) -> torch.Tensor:
    """The kernel of the first samples in float64, sample by sample."""
    double = problem.placed.double()
    try:
        trained = list(problem.trained.values())
        rows = []
        for i in range(min(CHECKED, problem.n)):
            logits = double(**{name: tensor[i : i + 1] for name, tensor in problem.inputs.items()}).logits
            rows.append(torch.autograd.grad(margin(logits).sum(), trained))
        return gram([torch.stack(column) for column in zip(*rows, strict=True)])
    finally:
        problem.placed.float()


def error(kernel: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference in that of the exact kernel, on the samples that both have."""
    n = min(len(kernel), len(exact))
    return float((kernel[:n, :n] - exact[:n, :n]).norm() / exact[:n, :n].norm())


def timed(run: Run) -> tuple[float, float, torch.Tensor | None]:
    """Seconds by the clock and of the processor, and what came out."""
    start, busy = time.perf_counter(), time.process_time()
    kernel = run()
    return time.perf_counter() - start, time.process_time() - busy, kernel


def asked(contestant: Contestant, case: Case) -> int:
    """Samples that a contestant is asked for."""
    return min(case.n, contestant.samples or case.n)


def short(failure: BaseException) -> str:
    """An error in one line."""
    return f"{type(failure).__name__}: {(str(failure).strip() or '-').splitlines()[0][:140]}"


def measure(case: Case, rounds: int, limit: float) -> list[dict[str, object]]:
    """All contestants of one case; one whose first call takes longer than `limit` seconds is measured by it alone."""
    problem = build(case.model, case.placement, case.n, case.tokens)
    exact = reference(problem)
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, object]] = {}
    taken: dict[str, list[tuple[float, float]]] = {}
    units: dict[int, Run] = {}
    for name, contestant in ALL.items():
        n = asked(contestant, case)
        rows[name] = {**asdict(case), "contestant": name, "asked": n, "threads": torch.get_num_threads()}
        rows[name]["version"] = version(contestant)
        problem.use_attention(contestant.attention)
        try:
            run = contestant.prepare(problem.first(n))
            seconds, busy, kernel = timed(run)
        except Exception as failure:  # whatever it is, it is its row
            rows[name]["failed"] = short(failure)
            print(f"  {name}: {short(failure)}", file=sys.stderr, flush=True)
            continue
        print(f"  {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
        if kernel is not None:
            rows[name]["error"] = error(kernel, exact)
        if n not in units:
            problem.use_attention("sdpa")
            units[n] = ALL["plain"].prepare(problem.first(n))
            units[n]()
        if seconds < limit:
            runs[name] = run
        else:
            taken[name] = [(seconds, busy)]
            problem.use_attention("sdpa")
            rows[name] |= {"once": True, "unit": [timed(units[n])[:2]]}
    beside: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            if "failed" in rows[name]:
                continue
            problem.use_attention("sdpa")
            unit = timed(units[asked(ALL[name], case)])[:2]
            problem.use_attention(ALL[name].attention)
            try:
                taken.setdefault(name, []).append(timed(run)[:2])
            except Exception as failure:  # as for lack of memory, which the others hold too
                rows[name]["failed"] = short(failure)
                del taken[name]
                continue
            beside.setdefault(name, []).append(unit)
    for name, seconds in taken.items():
        units_of = rows[name].pop("unit", None) or beside[name]
        for place, kind in enumerate(("wall", "cpu")):
            ratios = [one[place] / unit[place] for one, unit in zip(seconds, units_of, strict=True)]
            rows[name][kind] = {
                "seconds": statistics.median(one[place] for one in seconds),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
    return list(rows.values())


def version(contestant: Contestant) -> str:
    """Version of the package that a contestant comes in."""
    package = contestant.package or ("foretune" if contestant.label.startswith("foretune") else "torch")
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def peak(model: str, placement: str, n: int, tokens: int, name: str) -> dict[str, float]:
    """Memory of one call, in a process of its own: its peak, and how far that lies above the loaded model."""
    problem = build(model, placement, n, tokens)
    problem.use_attention(ALL[name].attention)
    run = ALL[name].prepare(problem)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    run()
    found = {"peak": _status("VmHWM"), "above": _status("VmHWM") - before}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def _status(field: str) -> float:
    """A line of Linux' own account of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def in_fresh_process(case: Case, name: str, n: int) -> dict[str, float] | None:
    """`peak`, or None where there is no such account or it fails."""
    parts = [case.model, case.placement, str(n), str(case.tokens), name]
    command = [sys.executable, __file__, "--peak", *parts, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def with_memory(case: Case, rows: list[dict[str, object]]) -> None:
    """Add the peak memory of all that ran, in itself and in that of the plain pass of as many samples."""
    units: dict[int, dict[str, float] | None] = {}
    for row in rows:
        if "failed" in row:
            continue
        n = int(str(row["asked"]))
        if n not in units:
            units[n] = in_fresh_process(case, "plain", n)
        found = units[n] if row["contestant"] == "plain" else in_fresh_process(case, str(row["contestant"]), n)
        unit = units[n]
        if found and unit:
            ratios = {"ratio": found["peak"] / unit["peak"], "ratio_above": found["above"] / unit["above"]}
            row["memory"] = found | ratios


def spin() -> None:
    """Keep one core busy."""
    while True:
        pass


def main() -> None:
    """Measure the cases that are not there yet, and add each to the file as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small cases: minutes")
    parser.add_argument("--case", help="model,placement,samples,tokens[,busy processes]")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "peers.jsonl")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds from which one call has to do")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.peak:
        model, placement, n, tokens, name = options.peak
        print(json.dumps(peak(model, placement, int(n), int(tokens), name)))
        return
    cases = QUICK if options.quick else FULL
    if options.case:
        model, placement, *numbers = options.case.split(",")
        cases = [Case(model, placement, *map(int, numbers))]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    text = options.results.read_text() if options.results.exists() else ""
    rows_there = [json.loads(line) for line in text.splitlines()]
    done = set() if options.again else {_case(row) for row in rows_there}
    for case in cases:
        if case in done:
            continue
        print(case, file=sys.stderr, flush=True)
        busy = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(case.beside)]
        for process in busy:
            process.start()
        try:
            rows = measure(case, options.rounds, options.limit)
        finally:
            for process in busy:
                process.kill()
        if (case.n, case.tokens, case.beside) == (32, 128, 0):
            with_memory(case, rows)
        facts = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        facts |= {"load": os.getloadavg()[0], "at": time.strftime("%Y-%m-%d %H:%M")}
        rows_there = replaced(rows_there, [row | facts for row in rows])
        written = options.results.with_suffix(".new")
        written.write_text("".join(json.dumps(row) + "\n" for row in rows_there))
        written.replace(options.results)  # whole or not at all
        done.add(case)


def replaced(there: list[dict[str, object]], rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """What is there, with the rows of one case in place of older ones of that case."""
    return [row for row in there if _case(row) != _case(rows[0])] + rows


def _case(row: dict[str, object]) -> Case:
    return Case(**{field: row[field] for field in Case.__dataclass_fields__})


if __name__ == "__main__":
    main()
