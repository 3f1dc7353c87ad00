"""Know how a fine-tune will go before you run it.

The names below are imported when they are first used, so that `import foretune` and `foretune --help` stay fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foretune.bounds import RiskBounds as RiskBounds
    from foretune.bounds import label_energy_bound as label_energy_bound
    from foretune.bounds import risk_bounds as risk_bounds
    from foretune.config import AdapterConfig as AdapterConfig
    from foretune.config import DataConfig as DataConfig
    from foretune.config import ModelConfig as ModelConfig
    from foretune.config import ScoreConfig as ScoreConfig
    from foretune.config import ScoreSettings as ScoreSettings
    from foretune.config import TuneConfig as TuneConfig
    from foretune.config import TuneSettings as TuneSettings
    from foretune.data import Task as Task
    from foretune.data import load_task as load_task
    from foretune.data import task_from_datasets as task_from_datasets
    from foretune.errors import ForetuneError as ForetuneError
    from foretune.features import TangentFeatures as TangentFeatures
    from foretune.forecasting.calibration import Calibration as Calibration
    from foretune.forecasting.calibration import Interval as Interval
    from foretune.forecasting.calibration import read_calibration as read_calibration
    from foretune.forecasting.training import Training as Training
    from foretune.forecasts import Evaluation as Evaluation
    from foretune.forecasts import Forecast as Forecast
    from foretune.forecasts import forecast as forecast
    from foretune.kernel import TangentKernel as TangentKernel
    from foretune.kernel import tangent_kernel as tangent_kernel
    from foretune.models import Classifier as Classifier
    from foretune.models import batches as batches
    from foretune.models import encode as encode
    from foretune.models import load_classifier as load_classifier
    from foretune.outputs import OutputReduction as OutputReduction
    from foretune.outputs import output_reduction as output_reduction
    from foretune.placement import place as place
    from foretune.placement import read_adapters as read_adapters
    from foretune.ranking.ranks import Ranking as Ranking
    from foretune.ranking.ranks import rank as rank
    from foretune.ranking.report import save_adapter as save_adapter
    from foretune.ranking.settings import Candidates as Candidates
    from foretune.ranking.settings import RankSample as RankSample
    from foretune.ranking.settings import RankSettings as RankSettings
    from foretune.regression import KernelRegression as KernelRegression
    from foretune.regression import fit_regression as fit_regression
    from foretune.regression import predict as predict
    from foretune.save import save_score as save_score
    from foretune.scores import ScoreResult as ScoreResult
    from foretune.scores import score as score
    from foretune.sites import Site as Site
    from foretune.spectra import Spectrum as Spectrum
    from foretune.spectra import decompose as decompose
    from foretune.spectra import spectrum as spectrum
    from foretune.study.grid import Cell as Cell
    from foretune.study.grid import read_grid as read_grid
    from foretune.study.records import Record as Record
    from foretune.study.records import read_records as read_records
    from foretune.study.summary import StudyReport as StudyReport
    from foretune.study.summary import summarise as summarise
    from foretune.tangent import Batch as Batch
    from foretune.tangent import tangent_features as tangent_features
    from foretune.tuning.curves import History as History
    from foretune.tuning.outcome import TuneResult as TuneResult
    from foretune.tuning.outcome import tune as tune

# Where each public name lives, by stage.
_HOME = {
    "errors": ["ForetuneError"],
    "config": [
        "AdapterConfig",
        "DataConfig",
        "ModelConfig",
        "ScoreConfig",
        "ScoreSettings",
        "TuneConfig",
        "TuneSettings",
    ],
    "data": ["Task", "load_task", "task_from_datasets"],
    "models": ["Classifier", "batches", "encode", "load_classifier"],
    "outputs": ["OutputReduction", "output_reduction"],
    "sites": ["Site"],
    "placement": ["place", "read_adapters"],
    "tangent": ["Batch", "tangent_features"],
    "features": ["TangentFeatures"],
    "kernel": ["TangentKernel", "tangent_kernel"],
    "spectra": ["Spectrum", "decompose", "spectrum"],
    "bounds": ["RiskBounds", "label_energy_bound", "risk_bounds"],
    "regression": ["KernelRegression", "fit_regression", "predict"],
    "forecasts": ["Evaluation", "Forecast", "forecast"],
    "scores": ["ScoreResult", "score"],
    "save": ["save_score"],
    "forecasting.calibration": ["Calibration", "Interval", "read_calibration"],
    "forecasting.training": ["Training"],
    "ranking.settings": ["Candidates", "RankSample", "RankSettings"],
    "ranking.ranks": ["Ranking", "rank"],
    "ranking.report": ["save_adapter"],
    "tuning.curves": ["History"],
    "tuning.outcome": ["TuneResult", "tune"],
    "study.grid": ["Cell", "read_grid"],
    "study.records": ["Record", "read_records"],
    "study.summary": ["StudyReport", "summarise"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'foretune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"foretune.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
