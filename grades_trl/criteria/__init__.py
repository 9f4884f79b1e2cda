"""Which weight matrices have converged: one criterion per file. A new one is a file here, a line below and a test."""

from .base import Converged, Criterion
from .gain import Gain
from .gain_meter import GainMeter
from .grad_change import GradChange
from .grad_norm import GradNorm
from .none import NoFreezing
from .schedule import Schedule
from .weight_change import WeightChange

__all__ = ["CRITERIA", "Converged", "Criterion", "GainMeter"]

CRITERIA: dict[str, type[Criterion]] = {
    "grad_change": GradChange,
    "grad_norm": GradNorm,
    "weight_change": WeightChange,
    "gain": Gain,
    "schedule": Schedule,
    "none": NoFreezing,
}
