"""What a model is made of: its repeated layers, its towers, and the weight matrices that GradES tracks."""

from grades_trl.model.matrices import (
    WeightMatrix,
    describe,
    find_matrices,
    layers_in_order,
    matrices_by_layer,
    untracked_matrices,
    untracked_parameters,
)
from grades_trl.model.structure import find_layers
from grades_trl.model.towers import TOWERS, linear_layers, towers_of_modules, towers_of_parameters

__all__ = [
    "TOWERS",
    "WeightMatrix",
    "describe",
    "find_layers",
    "find_matrices",
    "layers_in_order",
    "linear_layers",
    "matrices_by_layer",
    "towers_of_modules",
    "towers_of_parameters",
    "untracked_matrices",
    "untracked_parameters",
]
