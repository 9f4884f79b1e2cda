"""GradES in axolotl: `trainer_cls: grades_trl.trainers.axolotl.GradESAxolotlTrainer` in its YAML file.

It has the settings of `GradESConfig()`. For others, write a class of your own with the mixin and name that one:

```python
class MyTrainer(GradESMixin, AxolotlTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, grades=GradESConfig(metric="grad_change", tau=1.8), **kwargs)
```
"""

from __future__ import annotations

import functools
from typing import Any

from .mixin import GradESMixin


@functools.cache
def _trainer() -> type:
    from axolotl.core.trainers.base import AxolotlTrainer

    return type("GradESAxolotlTrainer", (GradESMixin, AxolotlTrainer), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    # Bound late: axolotl is no dependency, and looks this name up when it makes its trainer.
    if name == "GradESAxolotlTrainer":
        return _trainer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
