"""Fit the calibration that comes with foretune, on the cells of the studies beside this file.

python studies/calibrate.py src/foretune/forecasting
"""

import sys
from dataclasses import replace
from pathlib import Path

from foretune.evaluation.held_out import OUTPUTS, finished_runs
from foretune.evaluation.records import read_records
from foretune.forecasting.calibration import CALIBRATION
from foretune.forecasting.calibration_fit import fit_calibration
from foretune.forecasting.finished_runs import FINISHED_RUNS, in_lines
from foretune.forecasting.risk import fit_risk
from foretune.report.store import write_json

HERE = Path(__file__).parent
STUDIES = ("minilm-forecast", "minilm-sizes")


def main() -> None:
    """Fit on the cells of both studies, and write the calibration and the runs that it was fitted on."""
    folder = Path(sys.argv[1])
    records = [record for study in STUDIES for record in read_records(HERE / study)]
    records = [record for record in records if record.model == "MiniLM"]
    runs = finished_runs(records)
    calibration = fit_calibration([run.case for run in runs if run.case], OUTPUTS, " and ".join(STUDIES))
    risk = fit_risk([run.rate for run in runs if run.rate])
    write_json(folder / CALIBRATION, replace(calibration, risk=risk).to_dict())
    (folder / FINISHED_RUNS).write_text(in_lines(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
