"""Crop yield from satellite imagery: readers, DFYP, baselines, honest evaluation, maps.

Names are imported when they are first used, so that a command line answers at once. Doors into other libraries are
modules of their own: `geo_yield.lightning`, `geo_yield.stac`, and `geo_yield.timm_models`, whose import registers the
models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geo_yield.baselines import CountyHistory as CountyHistory
    from geo_yield.baselines import CountyTrend as CountyTrend
    from geo_yield.baselines import DeepGaussianProcess as DeepGaussianProcess
    from geo_yield.baselines import MeanYield as MeanYield
    from geo_yield.baselines import RandomForest as RandomForest
    from geo_yield.baselines import Ridge as Ridge
    from geo_yield.checkpoint import load_model as load_model
    from geo_yield.checkpoint import save_model as save_model
    from geo_yield.crossfit import CrossFit as CrossFit
    from geo_yield.crossfit import Prediction as Prediction
    from geo_yield.dfyp import DFYP as DFYP
    from geo_yield.dfyp import DFYPConfig as DFYPConfig
    from geo_yield.dfyp_sentinel2 import DFYPSentinel2 as DFYPSentinel2
    from geo_yield.dfyp_sentinel2 import DFYPSentinel2Config as DFYPSentinel2Config
    from geo_yield.errors import InputProblem as InputProblem
    from geo_yield.evaluation import evaluate as evaluate
    from geo_yield.evaluation import paired_bootstrap as paired_bootstrap
    from geo_yield.evaluation import summarise as summarise
    from geo_yield.histograms import HistogramLayout as HistogramLayout
    from geo_yield.histograms import HistogramStore as HistogramStore
    from geo_yield.histograms import YieldTensor as YieldTensor
    from geo_yield.modis import modis_layout as modis_layout
    from geo_yield.modis import modis_scenes as modis_scenes
    from geo_yield.prediction import predict_yields as predict_yields
    from geo_yield.prepare import prepare_histograms as prepare_histograms
    from geo_yield.regions import read_regions as read_regions
    from geo_yield.report import write_report as write_report
    from geo_yield.samples import IndexSeries as IndexSeries
    from geo_yield.samples import Samples as Samples
    from geo_yield.sentinel2 import sentinel2_layout as sentinel2_layout
    from geo_yield.sentinel2 import sentinel2_scenes as sentinel2_scenes
    from geo_yield.series import read_series as read_series
    from geo_yield.simulator import simulate as simulate
    from geo_yield.training import DFYPRegressor as DFYPRegressor
    from geo_yield.training import TrainConfig as TrainConfig
    from geo_yield.training import select_operator as select_operator
    from geo_yield.yields import join_yields as join_yields
    from geo_yield.yields import read_yields as read_yields

_MODULE_OF = {
    "CountyHistory": "baselines",
    "CountyTrend": "baselines",
    "CrossFit": "crossfit",
    "DFYP": "dfyp",
    "DFYPConfig": "dfyp",
    "DFYPRegressor": "training",
    "DFYPSentinel2": "dfyp_sentinel2",
    "DFYPSentinel2Config": "dfyp_sentinel2",
    "DeepGaussianProcess": "baselines",
    "HistogramLayout": "histograms",
    "HistogramStore": "histograms",
    "IndexSeries": "samples",
    "InputProblem": "errors",
    "MeanYield": "baselines",
    "Prediction": "crossfit",
    "RandomForest": "baselines",
    "Ridge": "baselines",
    "Samples": "samples",
    "TrainConfig": "training",
    "YieldTensor": "histograms",
    "evaluate": "evaluation",
    "join_yields": "yields",
    "load_model": "checkpoint",
    "modis_layout": "modis",
    "modis_scenes": "modis",
    "paired_bootstrap": "evaluation",
    "predict_yields": "prediction",
    "prepare_histograms": "prepare",
    "read_regions": "regions",
    "read_series": "series",
    "read_yields": "yields",
    "save_model": "checkpoint",
    "select_operator": "training",
    "sentinel2_layout": "sentinel2",
    "sentinel2_scenes": "sentinel2",
    "simulate": "simulator",
    "summarise": "evaluation",
    "write_report": "report",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'geo_yield' has no attribute '{name}'")
    value = getattr(import_module(f"geo_yield.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
