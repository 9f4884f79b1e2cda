"""Which settings of GradES may change when a run is resumed, and which may not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from grades_trl.config import GradESConfig

OTHER_SCORES = "new scores are compared with those before, and would be of other rows, or of another kind"
# Setting -> why it stays what it was. All others may change; `schedule` is compared by what it says.
FIXED = {
    "metric": "its values cannot be compared with those of another one",
    "sample_fraction": "gradients are compared with those before, of which other elements were kept",
    **dict.fromkeys(("heldout_metric", "heldout_every", "heldout_cost", "heldout_samples"), OTHER_SCORES),
}
FIXED_FOR_GAIN = {"alpha": "the windows of steps that metric gain compares have begun"}
NO_LEVEL = "a run with a number keeps no level of its matrices in the grace period"


def resolved_settings(config: GradESConfig) -> dict[str, Any]:
    """All settings with the defaults of the chosen metric filled in, JSON-able. The schedule is left out."""
    heldout = {f"heldout_{name}": value for name, value in config.heldout_settings().items()}
    settings = dataclasses.asdict(config) | config.criterion_settings() | heldout
    return {name: value for name, value in settings.items() if name != "schedule"}


def changed_settings(state: Mapping[str, Any], config: GradESConfig) -> dict[str, tuple[Any, Any]]:
    """What differs between a checkpoint and the run that goes on from it.

    Args:
        state (`Mapping`): of the engine, as `GradES.state_dict` gives it; `settings` and `heldout` are read.
        config (`GradESConfig`): of the run that goes on.

    Returns:
        `dict`: setting -> its value before, and now.

    Raises:
        ValueError: one of them may not change; with the reason.
    """
    before, now = state["settings"], resolved_settings(config)
    # The interval of a run whose held-out score is not measured says nothing.
    ignored = () if state["heldout"] is not None else [name for name in now if name.startswith("heldout_")]
    changed = {
        name: (before[name], value) for name, value in now.items() if before[name] != value and name not in ignored
    }
    fixed = FIXED | (FIXED_FOR_GAIN if config.metric == "gain" else {})
    if now.get("tau") == "auto":
        fixed["tau"] = NO_LEVEL
    for name in (name for name in fixed if name in changed):
        raise ValueError(
            f"The checkpoint was written with {name} {before[name]!r} and this run has {now[name]!r}: resume with "
            f"--{name} {before[name]}. It cannot change in a run: {fixed[name]}."
        )
    return changed
