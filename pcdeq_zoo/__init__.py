"""A model zoo of positive concave deep equilibrium models. Importing it registers the models with timm."""

from pcdeq_zoo._version import __version__
from pcdeq_zoo.activations import ACTIVATIONS
from pcdeq_zoo.certificate import Enclosure, enclosure
from pcdeq_zoo.data import DATASETS, DataError, Dataset
from pcdeq_zoo.layers import PcDEQConv2d, PcDEQLinear, project
from pcdeq_zoo.pcdeq import PcDEQ
from pcdeq_zoo.robustness import (
    Box,
    Certification,
    certify,
    forward_with_margins,
    interval_bounds,
    pgd,
    pixel_box,
)
from pcdeq_zoo.solution import (
    ConvergenceError,
    ConvergenceWarning,
    Solution,
    SolveRecord,
    Status,
    record_solves,
)
from pcdeq_zoo.solver import Solver, solve
from pcdeq_zoo.state_dict import WeightsError
from pcdeq_zoo.unrolled import unrolled
from pcdeq_zoo.variants import VARIANTS, Recipe, Variant

__all__ = [
    "ACTIVATIONS",
    "DATASETS",
    "VARIANTS",
    "Box",
    "Certification",
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
    "__version__",
    "certify",
    "enclosure",
    "forward_with_margins",
    "interval_bounds",
    "pgd",
    "pixel_box",
    "project",
    "record_solves",
    "solve",
    "unrolled",
]
