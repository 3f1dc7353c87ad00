"""Fit the calibration that comes with foretune, on the cells of the studies beside this file.

python studies/calibrate.py src/foretune/forecasting/calibration.json
"""

import sys
from dataclasses import replace
from pathlib import Path

from foretune.evaluation.collapses import rate_cases
from foretune.evaluation.held_out import OUTPUTS, calibration_cases
from foretune.evaluation.records import read_records
from foretune.forecasting.calibration_fit import fit_calibration
from foretune.forecasting.risk import fit_risk
from foretune.report.store import write_json

HERE = Path(__file__).parent
STUDIES = ("minilm-forecast", "minilm-sizes")


def main() -> None:
    """Fit on the cells of both studies, and write what comes with foretune."""
    records = [record for study in STUDIES for record in read_records(HERE / study)]
    records = [record for record in records if record.model == "MiniLM"]
    calibration = fit_calibration(calibration_cases(records), OUTPUTS, " and ".join(STUDIES))
    write_json(Path(sys.argv[1]), replace(calibration, risk=fit_risk(rate_cases(records))).to_dict())


if __name__ == "__main__":
    main()
