"""Fit the calibration that comes with foretune, on the cells of the studies beside this file, and judge it.

python studies/calibrate.py src/foretune/forecasting                          # the calibration and its runs
python studies/calibrate.py src/foretune/forecasting studies/minilm-sizes/shipped    # and how good it is
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from foretune.evaluation.choice import choice_table
from foretune.evaluation.distance_figure import distance_figure
from foretune.evaluation.held_out import OUTPUTS, finished_runs, forecast_held_out
from foretune.evaluation.quality import quality_table
from foretune.evaluation.rates import rates_table
from foretune.evaluation.records import Record, read_records
from foretune.evaluation.strata import strata_table
from foretune.evaluation.troubles import trouble_table
from foretune.forecasting.calibration import CALIBRATION
from foretune.forecasting.calibration_fit import fit_calibration
from foretune.forecasting.finished_runs import FINISHED_RUNS, in_lines, runs_from
from foretune.forecasting.risk import fit_risk
from foretune.report.figures import figure_writers
from foretune.report.store import write_files, write_json

HERE = Path(__file__).parent
STUDIES = ("minilm-forecast", "minilm-sizes")


def main() -> None:
    """Fit on the cells of both studies, and write the calibration and the runs that it was fitted on."""
    folder = Path(sys.argv[1])
    records = [record for study in STUDIES for record in read_records(HERE / study)]
    records = [record for record in records if record.model == "MiniLM"]
    lines = in_lines(finished_runs(records))
    runs = runs_from(json.loads(lines))  # with the digits that ship, so that these give the same calibration
    calibration = fit_calibration([run.case for run in runs if run.case], OUTPUTS, " and ".join(STUDIES))
    risk = fit_risk([run.rate for run in runs if run.rate])
    write_json(folder / CALIBRATION, replace(calibration, risk=risk).to_dict())
    (folder / FINISHED_RUNS).write_text(lines, encoding="utf-8")
    if len(sys.argv) > 2:
        judge(records, Path(sys.argv[2]))


def judge(records: Sequence[Record], folder: Path) -> None:
    """Write how good the forecasts of each data set are by the same fit on the others."""
    held_out = forecast_held_out(records)
    tables = {
        "quality": quality_table(held_out),
        "distance": strata_table(held_out),
        "choice": choice_table(held_out),
        "rates": rates_table(held_out),
        "warnings": trouble_table(held_out),
    }
    writers = {f"{name}.md": table.writers(name)[f"{name}.md"] for name, table in tables.items()}
    drawn = figure_writers(distance_figure(held_out), "distance")
    write_files(folder, {**writers, "distance.png": drawn["distance.png"]})


if __name__ == "__main__":
    main()
