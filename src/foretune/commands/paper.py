"""`foretune paper`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from foretune.errors import ConfigError
from foretune.settings.commands import EngineName, PaperSettings

if TYPE_CHECKING:
    from foretune.evaluation.records import Record

Item = Literal["table1", "table2", "table3", "figure1"]


def paper(
    *items: Item,
    output: Annotated[Path, Parameter(group="Run")],
    settings: Annotated[PaperSettings | None, Parameter(name="*", group=Group("Experiment"))] = None,
    workers: Annotated[int, Parameter(group="Run")] = 1,
    engine: Annotated[EngineName, Parameter(group="Run")] = "local",
) -> int:
    """Make tables and figure of the paper again, beside the printed numbers.

    Example: foretune paper table1 --model ./MiniLM --data-dir ./data --max-train 1000 --output paper

    The cells that an item needs are scored and fine-tuned, and kept in OUTPUT/study for the other items; a run that
    was cut off goes on. What is not as in the paper is said in the captions.

    Args:
        items: table1, table2, table3, figure1: one or several.
        output: Folder for CSV, Markdown, LaTeX and figures.
        settings: Model, data and scale.
        workers: Processes on this machine.
        engine: `local`, or `ray` for a Ray cluster.

    Returns:
        Exit code: 1 if a cell failed by a fault of foretune or a library.

    Raises:
        ConfigError: If no item is named.
    """
    if not items:
        raise ConfigError("name what to make: table1, table2, table3 or figure1")
    from foretune.report.terminal import console

    log = console(stderr=True)
    with log.status("loading"):
        from foretune.evaluation.records import read_records
        from foretune.paper.experiment import plan_experiment
        from foretune.paper.items import make_item, needed_cells
        from foretune.report.store import check_writable
        from foretune.study.runs import run_cells

        check_writable(output)
        experiment = plan_experiment(settings or PaperSettings())
    cells = needed_cells(experiment, items)
    store = output / "study"
    records: tuple[Record, ...] = ()
    if cells:
        code = run_cells(cells, store, workers=workers, engine_name=engine, log=log).settle(log)
        if code:
            return code
        records = read_records(store, cells)
    for item in dict.fromkeys(items):
        make_item(item, experiment, records, output, console())
    log.print(f"saved to {output}")
    return 0
