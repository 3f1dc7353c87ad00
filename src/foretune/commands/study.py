"""`foretune study` and `foretune study report`."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from foretune.settings.commands import EngineName
from foretune.settings.ranges import LARGEST, Range

if TYPE_CHECKING:
    from rich.console import Console

    from foretune.evaluation.correlations import StudyReport
    from foretune.evaluation.held_out import HeldOutForecasts

study = App(name="study", help="Score and fine-tune a grid of configurations, and compare forecasts with outcomes.")


@study.default
def run_study(
    grid: Path,
    /,
    *,
    output: Path,
    workers: Annotated[int, Parameter(group="Run")] = 1,
    engine: Annotated[EngineName, Parameter(group="Run")] = "local",
    plan: Annotated[bool, Parameter(group="Run")] = False,
) -> int:
    """Score and fine-tune a grid of configurations; what is finished is kept, and the same command goes on.

    Example: foretune study grid.yaml --output study && foretune study report study

    Args:
        grid: YAML file with models, datasets, placements, ranks, seeds, score and train (docs/study.md).
        output: Folder of the results; may hold those of an earlier run.
        workers: Processes on this machine, which share its cores.
        engine: `local`, or `ray` for a Ray cluster whose machines share the folder.
        plan: Only list the cells and which of them are finished.

    Returns:
        Exit code: 1 if a cell failed by a fault of foretune or a library.
    """
    from foretune.report.terminal import console
    from foretune.study.grid import read_grid
    from foretune.study.runs import list_cells, run_cells

    cells = read_grid(grid)
    log = console(stderr=True)
    if plan:
        list_cells(cells, output).show(console())
        return 0
    code = run_cells(cells, output, workers=workers, engine_name=engine, log=log).settle(log)
    if code:
        return code
    log.print(f"all {len(cells)} cells are in {output}; next: foretune study report {quote(str(output))}")
    return 0


@study.command(name="outlook")
def outlook_study(
    grid: Path,
    /,
    *,
    output: Path,
    samples: Annotated[int, Parameter(group="Run")] = 512,
    eval_samples: Annotated[int, Parameter(group="Run")] = 256,
    comparisons: Annotated[bool, Parameter(group="Run")] = False,
) -> None:
    """Simulate the runs of a grid from a few labelled samples, without training: one pass for all placements.

    Example: foretune study outlook grid.yaml --output study && foretune study report study

    Args:
        grid: YAML file of the study.
        output: Folder of the study; its cells need not be finished.
        samples: Labelled training samples, at most: all rows that train where these are fewer.
        eval_samples: Labelled rows to predict, at most, of the evaluation split or of the rows held out.
        comparisons: Also simulate with A fixed, at the random head, with permuted labels and with a random backbone.
    """
    from foretune.evaluation.simulations import SimulationSettings, simulate_cells
    from foretune.report.store import check_writable
    from foretune.report.terminal import console, progress
    from foretune.study.grid import read_grid

    Range(4, LARGEST).check("samples", samples)
    Range(1, LARGEST).check("eval_samples", eval_samples)
    cells = read_grid(grid)
    check_writable(output)
    log = console(stderr=True)
    with progress(log, "data sets and seeds", None) as update:
        made = simulate_cells(
            cells,
            output,
            SimulationSettings(samples, eval_samples, comparisons),
            on_progress=lambda what, done, total: update(completed=done, total=total, note=what),
        )
    log.print(
        f"{made} runs simulated, {len(cells) - made} were there; next: foretune study report {quote(str(output))}"
    )


@study.command(name="report")
def report_study(
    folder: Path,
    /,
    *,
    output: Path | None = None,
    grid: Path | None = None,
    ledger: Path | None = None,
    coefficient: Literal["spearman", "kendall", "pearson"] = "spearman",
    resamples: int = 2000,
    own_only: bool = False,
) -> None:
    """Compare what was known before training with what came of it: correlations, regrets, scatter plots.

    Args:
        folder: Folder of a study, or of the `cells.csv` of a report.
        output: Folder for CSV, Markdown, LaTeX, PNG, SVG and PDF; by default `report` in the study's folder.
        grid: YAML file of the study, if the folder holds cells of several.
        ledger: CSV file that the held-out forecasts are added to, for foretune ledger FILE; each line once.
        coefficient: Which one to print; all are written.
        resamples: Draws of the bootstrap.
        own_only: Fit calibration.json on this study's runs alone, not on those that come with foretune as well.

    Raises:
        StoreError: If no kind of task has two cells that did not diverge.
    """
    from rich.text import Text

    from foretune.errors import StoreError
    from foretune.evaluation.correlations import summarise
    from foretune.evaluation.held_out import forecast_held_out
    from foretune.evaluation.quality import save_reports
    from foretune.evaluation.records import by_kind, read_records
    from foretune.evaluation.study_calibration import study_calibration
    from foretune.forecasting.calibration import CALIBRATION
    from foretune.ledger.files import read_ledger
    from foretune.report.terminal import console
    from foretune.study.grid import read_grid

    Range(100, 100_000).check("resamples", resamples)
    log, screen = console(stderr=True), console()
    if ledger is not None:  # before the work
        read_ledger(ledger, on_note=lambda note: log.print(note, style="yellow", soft_wrap=True))
    parts = by_kind(read_records(folder, None if grid is None else read_grid(grid)))
    reports = []
    for kind, records in parts.items():
        held_out = forecast_held_out(records)
        try:
            with log.status("resampling"):
                reports.append((summarise(held_out.records, resamples=resamples), held_out))
        except StoreError as error:
            if len(parts) == 1:
                raise
            log.print(f"{kind} is left out: {error}", style="yellow", markup=False)
    if not reports:
        raise StoreError(f"no kind of task in study {str(folder)!r} has 2 cells that did not diverge: run more of it")
    out = folder / "report" if output is None else output
    source = out.absolute().parent.name
    fitted = {
        report.kind: study_calibration(held_out.records, source, own_only=own_only) for report, held_out in reports
    }
    found = {kind: one for kind, one in fitted.items() if one is not None}
    save_reports(reports, out, calibrations={kind: one.calibration for kind, one in found.items()})
    for report, held_out in reports:
        if len(parts) > 1:
            screen.rule(report.kind)
        _show(report, held_out, coefficient, screen)
    log.print(f"saved to {out}")
    for kind, one in found.items():
        where = CALIBRATION if len(parts) == 1 else f"{kind}/{CALIBRATION}"
        log.print(Text(f"{where}: {one.words}; for --calibration of forecast and rank"), soft_wrap=True)
    if ledger is not None:
        _add_to(ledger, [held_out for _, held_out in reports], log)


def _add_to(ledger: Path, parts: Sequence["HeldOutForecasts"], log: "Console") -> None:
    from rich.text import Text

    from foretune.evaluation.held_out_entries import held_out_entries
    from foretune.ledger.files import append
    from foretune.report.provenance import now

    made = now()
    entries = [entry for held_out in parts for entry in held_out_entries(held_out, made)]
    added = append(entries, ledger)
    there = f", {len(entries) - added} were there" if added < len(entries) else ""
    words = f"{added} held-out forecasts added to the ledger {ledger}{there}"
    log.print(Text(words if entries else f"no held-out forecasts for the ledger {ledger}"), soft_wrap=True)


def _show(report: "StudyReport", held_out: "HeldOutForecasts", coefficient: str, screen: "Console") -> None:
    from rich.text import Text

    from foretune.evaluation.choice import choice_table
    from foretune.evaluation.correlations import correlation_table, notes, regret_table
    from foretune.evaluation.held_out import why_no_forecast
    from foretune.evaluation.quality import area_table, quality_table, rivals_table
    from foretune.evaluation.rates import rates_table
    from foretune.evaluation.statistics import SCOPES
    from foretune.evaluation.strata import strata_table
    from foretune.evaluation.troubles import trouble_table

    for scope in SCOPES:
        table = correlation_table(report, coefficient, scope)
        if table.rows:
            table.show(screen)
            screen.print()
    regret_table(report).show(screen)
    if held_out.forecasts:
        tables = (
            quality_table(held_out),
            strata_table(held_out),
            choice_table(held_out),
            rates_table(held_out),
            trouble_table(held_out),
            rivals_table(report),
            area_table(held_out.records),
        )
        for table in (table for table in tables if table.rows):
            screen.print()
            table.show(screen)
    why = why_no_forecast(held_out)
    for note in (*notes(report), *([] if why is None else [why])):
        screen.print(Text(f"• {note}"), style="yellow")
