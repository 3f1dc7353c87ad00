"""Know how a fine-tune will go before you run it.

The names below are imported when they are first used, so that `import foretune` and `foretune --help` stay fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foretune.errors import ForetuneError as ForetuneError
    from foretune.evaluation.correlations import StudyReport as StudyReport
    from foretune.evaluation.correlations import summarise as summarise
    from foretune.evaluation.predictors import Predictor as Predictor
    from foretune.evaluation.records import Record as Record
    from foretune.evaluation.records import read_records as read_records
    from foretune.forecasting.calibration import Calibration as Calibration
    from foretune.forecasting.calibration import Interval as Interval
    from foretune.forecasting.calibration_file import read_calibration as read_calibration
    from foretune.forecasting.files import save_forecast as save_forecast
    from foretune.forecasting.forecast import ForecastResult as ForecastResult
    from foretune.forecasting.sequence_forecast import SequenceForecast as SequenceForecast
    from foretune.language.load import language_task_from_datasets as language_task_from_datasets
    from foretune.language.load import load_language_task as load_language_task
    from foretune.language.rows import LanguageTask as LanguageTask
    from foretune.ledger.entries import Entry as Entry
    from foretune.ledger.files import read_ledger as read_ledger
    from foretune.ledger.summary import LedgerSummary as LedgerSummary
    from foretune.ledger.summary import summarise_ledger as summarise_ledger
    from foretune.models.adapted import AdaptedModel as AdaptedModel
    from foretune.models.adapted import Batch as Batch
    from foretune.models.classifier import Classifier as Classifier
    from foretune.models.classifier import Encoded as Encoded
    from foretune.models.classifier import batches as batches
    from foretune.models.classifier import encode as encode
    from foretune.models.classifier import load_classifier as load_classifier
    from foretune.models.placement import place as place
    from foretune.models.placement import read_adapters as read_adapters
    from foretune.models.sites import Site as Site
    from foretune.ntk.bounds import RiskBounds as RiskBounds
    from foretune.ntk.bounds import label_energy_bound as label_energy_bound
    from foretune.ntk.bounds import risk_bounds as risk_bounds
    from foretune.ntk.features import TangentFeatures as TangentFeatures
    from foretune.ntk.jacobian import tangent_features as tangent_features
    from foretune.ntk.kernel import TangentKernel as TangentKernel
    from foretune.ntk.kernel import tangent_kernel as tangent_kernel
    from foretune.ntk.prediction import Evaluation as Evaluation
    from foretune.ntk.prediction import Examples as Examples
    from foretune.ntk.prediction import KernelPrediction as KernelPrediction
    from foretune.ntk.prediction import predict_by_regression as predict_by_regression
    from foretune.ntk.regression import KernelRegression as KernelRegression
    from foretune.ntk.regression import fit_regression as fit_regression
    from foretune.ntk.regression import predict as predict
    from foretune.ntk.spectrum import Eigen as Eigen
    from foretune.ntk.spectrum import Spectrum as Spectrum
    from foretune.ntk.spectrum import decompose as decompose
    from foretune.ntk.spectrum import spectrum as spectrum
    from foretune.ranking.finalists import Quick as Quick
    from foretune.ranking.report import save_adapter as save_adapter
    from foretune.ranking.rows import Ranking as Ranking
    from foretune.ranking.sequence_rows import SequenceRanking as SequenceRanking
    from foretune.report.curves import History as History
    from foretune.scoring.files import save_score as save_score
    from foretune.scoring.score import ScoreResult as ScoreResult
    from foretune.scoring.score import score as score
    from foretune.scoring.sequence_score import SequenceScore as SequenceScore
    from foretune.settings.commands import Configuration as Configuration
    from foretune.settings.commands import ForecastSettings as ForecastSettings
    from foretune.settings.commands import RankSettings as RankSettings
    from foretune.settings.commands import ScoreSettings as ScoreSettings
    from foretune.settings.commands import TuneSettings as TuneSettings
    from foretune.settings.groups import AdapterConfig as AdapterConfig
    from foretune.settings.groups import DataConfig as DataConfig
    from foretune.settings.groups import ModelConfig as ModelConfig
    from foretune.settings.groups import Recipe as Recipe
    from foretune.study.grid import Cell as Cell
    from foretune.study.grid import read_grid as read_grid
    from foretune.tasks.classification import Classification as Classification
    from foretune.tasks.load import Task as Task
    from foretune.tasks.load import load_task as load_task
    from foretune.tasks.load import task_from_datasets as task_from_datasets
    from foretune.tasks.multi_label import MultiLabel as MultiLabel
    from foretune.tasks.objective import Objective as Objective
    from foretune.tasks.outputs import OutputReduction as OutputReduction
    from foretune.tasks.outputs import output_reduction as output_reduction
    from foretune.tasks.regression import Regression as Regression
    from foretune.training.tune import TuneResult as TuneResult
    from foretune.training.tune import tune as tune
    from foretune.trials.forecast import forecast as forecast
    from foretune.trials.ranking import rank as rank

# Where each public name lives, by stage.
_HOME = {
    "errors": ["ForetuneError"],
    "evaluation.correlations": ["StudyReport", "summarise"],
    "evaluation.predictors": ["Predictor"],
    "evaluation.records": ["Record", "read_records"],
    "forecasting.calibration": ["Calibration", "Interval"],
    "forecasting.calibration_file": ["read_calibration"],
    "forecasting.files": ["save_forecast"],
    "forecasting.forecast": ["ForecastResult"],
    "forecasting.sequence_forecast": ["SequenceForecast"],
    "language.load": ["language_task_from_datasets", "load_language_task"],
    "language.rows": ["LanguageTask"],
    "ledger.entries": ["Entry"],
    "ledger.files": ["read_ledger"],
    "ledger.summary": ["LedgerSummary", "summarise_ledger"],
    "models.adapted": ["AdaptedModel", "Batch"],
    "models.classifier": ["Classifier", "Encoded", "batches", "encode", "load_classifier"],
    "models.placement": ["place", "read_adapters"],
    "models.sites": ["Site"],
    "ntk.bounds": ["RiskBounds", "label_energy_bound", "risk_bounds"],
    "ntk.features": ["TangentFeatures"],
    "ntk.jacobian": ["tangent_features"],
    "ntk.kernel": ["TangentKernel", "tangent_kernel"],
    "ntk.prediction": ["Evaluation", "Examples", "KernelPrediction", "predict_by_regression"],
    "ntk.regression": ["KernelRegression", "fit_regression", "predict"],
    "ntk.spectrum": ["Eigen", "Spectrum", "decompose", "spectrum"],
    "ranking.finalists": ["Quick"],
    "ranking.report": ["save_adapter"],
    "ranking.rows": ["Ranking"],
    "ranking.sequence_rows": ["SequenceRanking"],
    "report.curves": ["History"],
    "scoring.files": ["save_score"],
    "scoring.score": ["ScoreResult", "score"],
    "scoring.sequence_score": ["SequenceScore"],
    "settings.commands": ["Configuration", "ForecastSettings", "RankSettings", "ScoreSettings", "TuneSettings"],
    "settings.groups": ["AdapterConfig", "DataConfig", "ModelConfig", "Recipe"],
    "study.grid": ["Cell", "read_grid"],
    "tasks.classification": ["Classification"],
    "tasks.load": ["Task", "load_task", "task_from_datasets"],
    "tasks.multi_label": ["MultiLabel"],
    "tasks.objective": ["Objective"],
    "tasks.outputs": ["OutputReduction", "output_reduction"],
    "tasks.regression": ["Regression"],
    "training.tune": ["TuneResult", "tune"],
    "trials.forecast": ["forecast"],
    "trials.ranking": ["rank"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'foretune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"foretune.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
