"""A model zoo of positive concave deep equilibrium models. Importing it registers the models with timm."""

__version__ = "0.1.0"  # before the imports: the weights of this version are looked for on the Hub by it

from pcdeq_zoo.certificate import Enclosure, enclosure
from pcdeq_zoo.data import DATASETS, DataError, Dataset
from pcdeq_zoo.layers import ACTIVATIONS, PcDEQConv2d, PcDEQLinear
from pcdeq_zoo.pcdeq import PcDEQ
from pcdeq_zoo.solver import (
    ConvergenceError,
    ConvergenceWarning,
    Solution,
    Solver,
    SolveRecord,
    Status,
    record_solves,
    solve,
)
from pcdeq_zoo.variants import VARIANTS, Recipe, Variant
from pcdeq_zoo.weights import WeightsError

__all__ = [
    "ACTIVATIONS",
    "DATASETS",
    "VARIANTS",
    "ConvergenceError",
    "ConvergenceWarning",
    "DataError",
    "Dataset",
    "Enclosure",
    "PcDEQ",
    "PcDEQConv2d",
    "PcDEQLinear",
    "Recipe",
    "Solution",
    "SolveRecord",
    "Solver",
    "Status",
    "Variant",
    "WeightsError",
    "enclosure",
    "record_solves",
    "solve",
]
