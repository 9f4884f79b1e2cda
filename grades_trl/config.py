"""`GradESConfig`: the three answers of the method (which matrices freeze, when the run ends, which weights are kept)
and their settings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grades_trl.criteria import CRITERIA
from grades_trl.model.towers import TOWERS
from grades_trl.stopping import HELDOUT_METRICS, STOPPING_RULES

KEEP = ("auto", "last", "best_average")

if TYPE_CHECKING:
    Tau = float | dict[str, float] | str
    Schedule = dict[str, int] | str
else:  # what HfArgumentParser can read from a command line
    Tau = Schedule = str

# Settings that only some criteria or stopping rules have. `None` means the default of the one in use.
CRITERION_SETTINGS = (
    "tau",
    "auto_ratio",
    "alpha",
    "patience",
    "measure_every",
    "sample_fraction",
    "margin",
    "schedule",
)
HELDOUT_SETTINGS = (
    "heldout_metric",
    "heldout_every",
    "heldout_patience",
    "heldout_grace",
    "heldout_cost",
    "heldout_samples",
)


@dataclass
class GradESConfig:
    """
    Which weight matrices freeze, when the run ends and which weights are kept. A dataclass beside `SFTConfig`, so that
    `TrlParser` reads both.

    The default freezes leading layers (a vision tower, for example) where they could gain far less than they cost.
    Where held-out rows are given, it also ends the run by their loss and keeps the better of the last weights and
    their best average. The paper's method (arXiv 2509.01842 v3, algorithm 1) is
    `GradESConfig(metric="grad_change", tau=1.804456, sample_fraction=1.0, stopping="all_frozen", keep="last")`.

    Parameters:
        metric (`str`, *optional*, defaults to `"gain"`):
            Which matrices freeze, and when. `"gain"`: those of leading layers, while their share of the gain (of the
            squared gradient of the training loss) is far below their share of the time. `"grad_change"`:
            `sum |g_t - g_{t-1}|` of a matrix is below tau (paper, Eq. 1). `"grad_norm"`: `sum |g_t|` is (paper v1,
            and Eq. 3 for LoRA). `"weight_change"`: `sum |W_t - W_{t-1}|` is (the authors' package `grades` 1.0.6; the
            published thresholds are on this scale). `"schedule"`: at the steps of `schedule`. `"none"`: none freezes.
            Gradients are those of the whole optimizer step, before clipping.
        tau (`float`, `dict[str, float]` or `"auto"`, *optional*, defaults to `"auto"`):
            Threshold of `"grad_change"`, `"grad_norm"` and `"weight_change"`, in their unit: a matrix whose value is
            below it has converged. A number; a number per tower, as `{"vision": 0.3, "language": 6.0}` (JSON on the
            command line); or `"auto"`: `auto_ratio` times the median of the matrix's own values in the grace period.
        auto_ratio (`float`, *optional*, defaults to `0.5`):
            With `tau="auto"`: the fraction of its level in the grace period that a matrix must fall below.
        alpha (`float`, *optional*):
            Grace period, as a fraction of all optimizer steps: nothing freezes while
            `step <= ceil(alpha * total_steps)`. By default 0.55, the paper's; and 0.08 for `"gain"`, which decides
            after twice the grace period.
        patience (`int`, *optional*, defaults to `1`):
            Consecutive values below tau that freeze a matrix. 1 is the paper's.
        measure_every (`int`, *optional*, defaults to `1`):
            Measure every N optimizer steps. A measurement still compares two neighbouring steps, so tau keeps its
            meaning.
        sample_fraction (`float`, *optional*, defaults to `1 / 64`):
            Fraction of each large matrix that is measured and kept for comparison. The estimate is unbiased, with an
            error of 0.6 % for a matrix of 16M elements and 2 % for small ones (`criteria/metrics.py`). 1 measures all
            elements, as the paper does.
        margin (`float`, *optional*, defaults to `2`):
            For `metric="gain"`: leading layers freeze when their share of the gain is below a `margin`-th of their
            share of the time.
        schedule (`str` or `dict[str, int]`, *optional*):
            For `metric="schedule"`: when each matrix freezes. The path of another run's `events.jsonl`, or a mapping
            from a matrix, a pattern of names (`"*.layers.[0-4].*"`) or a tower to the step whose update is the first
            one not applied: `{"vision": 1}` trains no vision matrix at all.
        stopping (`str`, *optional*, defaults to `"auto"`):
            When the run ends. `"all_frozen"`: when every tracked matrix is frozen (paper). `"heldout"`: also when a
            score of held-out rows has stopped improving, at the averaged weights. `"train_accuracy"`: also when the
            accuracy on the training tokens has saturated: at least 0.99 over a quarter of the schedule, without a
            rise, in its second half (arXiv 2602.11149). `"end_of_schedule"`: not before. `"auto"`: `"heldout"` where
            there are held-out rows (`eval_dataset`) and the run can pay for them, else `"train_accuracy"` where the
            trainer computes it (TRL's SFTTrainer does), else `"all_frozen"`.
        keep (`str`, *optional*, defaults to `"auto"`):
            Which weights the model has in the end. `"last"`; `"best_average"`: the running average of the weights with
            the best held-out score, if that is better than the score of the last ones. `"auto"`: `"best_average"`
            where a held-out score is measured, else `"last"`.
        heldout_metric (`str`, *optional*, defaults to `"loss"`):
            The score of the held-out rows. `"loss"`: per learned token; for other models than language models the
            trainer's own. `"token_accuracy"`: the fraction of the learned tokens that are predicted. `"exact_match"`:
            the fraction of the prompts that are answered exactly right, by generation; a trainer needs
            `heldout_answers` for it.
        heldout_every (`int`, *optional*):
            Measure the held-out score of the averaged weights every N optimizer steps. By default what
            `heldout_cost` allows, at most 20 times; `ceil(total_steps / 20)` without a Trainer.
        heldout_patience (`int`, *optional*):
            Measurements without a new best held-out score that end the run. By default 2, or 1 of the loss where a
            tenth of the schedule or more lies between two measurements.
        heldout_grace (`float`, *optional*, defaults to `0.1`):
            Fraction of all optimizer steps before the first measurement of the held-out score.
        heldout_cost (`float`, *optional*, defaults to `0.02`):
            What all measurements of the held-out score may cost, as a fraction of the training FLOPs. Short runs may
            use 64 forward passes of a row, or 128 where they have 1.5 epochs or more, up to 5 %. With fewer than 427
            training examples in all epochs together, nothing is measured.
        heldout_samples (`int`, *optional*, defaults to `128`):
            Held-out rows per measurement, at most; always the same ones.
        track_projector (`bool`, *optional*, defaults to `False`):
            Also track the linear layers between two towers (mergers, projectors). The paper does not.
        freeze_norms (`bool`, *optional*, defaults to `False`):
            Freeze the norms and biases of a layer with the last of its matrices. The paper trains them to the end;
            then backward cannot skip the layer.
        freeze_embeddings (`bool`, *optional*, defaults to `False`):
            Freeze the embeddings of a tower, and a tied output head, with the last matrix of its first layer. Full
            fine-tuning skips the backward pass of frozen leading layers only with both of these flags.
        activation_cache_mib (`int`, *optional*):
            MiB of CPU memory for the outputs of a frozen encoder, and of the frozen leading language layers, so that
            later epochs do not compute them again. It should hold rows x tokens x hidden size x 2 or 4 bytes; 0 is
            off. By default, a trainer that runs more than one epoch in one process gives a frozen encoder up to a
            tenth of the free memory, if the outputs of all images fit. Of several processes each keeps those of its
            own batches, and with FSDP there are none.
        encoder_cache_dir (`str`, *optional*):
            Keeps the outputs of a frozen encoder in this folder too, so that the next run with the same encoder and
            images reads them. Its files take at most a tenth of the free disk space.

    When a run is resumed with other settings, these take effect from its next step on, and `summary.json` says so.
    What would compare things of two kinds may not change, and is an error: `metric`, `sample_fraction`, `schedule`,
    `heldout_metric`, `heldout_every`, `heldout_cost`, `heldout_samples`, `tau` from a number to `"auto"`, and `alpha`
    of `"gain"`. A new `tau` or `auto_ratio` holds for what is not frozen yet; `patience` then counts anew.

    Raises:
        ValueError: a value out of range, or a setting that the chosen metric or stopping rule does not have.
    """

    _argument_group_name = "GradES"

    metric: str = field(
        default="gain",
        metadata={
            "help": "Which matrices freeze: gain, where freezing pays; grad_change and grad_norm are the paper's.",
            "choices": [*CRITERIA],
        },
    )
    tau: Tau | None = field(
        default=None,
        metadata={
            "help": "A matrix whose value is below tau has converged: a number, a JSON object with one per tower "
            'such as \'{"vision": 0.3, "language": 6.0}\', or "auto" (default).'
        },
    )
    auto_ratio: float | None = field(
        default=None, metadata={"help": "With tau=auto: fraction of its own level to fall below (default: 0.5)."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Grace period, a fraction of all steps (default: 0.08 for gain, else 0.55)."}
    )
    patience: int | None = field(
        default=None, metadata={"help": "Consecutive values below tau that freeze a matrix (default: 1)."}
    )
    measure_every: int | None = field(default=None, metadata={"help": "Measure every N steps (default: 1)."})
    sample_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of each large matrix that is measured (default: 1/64; paper: 1)."}
    )
    margin: float | None = field(
        default=None,
        metadata={"help": "With metric=gain: freeze below a margin-th of the share of the time (default: 2)."},
    )
    schedule: Schedule | None = field(
        default=None,
        metadata={
            "help": "With metric=schedule: the events.jsonl of another run, or a JSON object from matrix, pattern or "
            "tower to step."
        },
    )
    stopping: str = field(
        default="auto",
        metadata={
            "help": "When the run ends; auto: by held-out rows where there are enough, else by training accuracy.",
            "choices": ["auto", *STOPPING_RULES],
        },
    )
    keep: str = field(
        default="auto",
        metadata={"help": "Which weights are kept; auto: the best average where it is measured.", "choices": [*KEEP]},
    )
    heldout_metric: str | None = field(
        default=None,
        metadata={"help": "The score of the held-out rows (default: loss).", "choices": [*HELDOUT_METRICS]},
    )
    heldout_every: int | None = field(
        default=None, metadata={"help": "Measure the held-out score every N steps (default: what the cost allows)."}
    )
    heldout_patience: int | None = field(
        default=None, metadata={"help": "Held-out measurements without improvement to end the run (default: 2 or 1)."}
    )
    heldout_grace: float | None = field(
        default=None, metadata={"help": "Fraction of all steps before the first held-out measurement (default: 0.1)."}
    )
    heldout_cost: float | None = field(
        default=None, metadata={"help": "Held-out measurements, at most, of the training FLOPs (default: 0.02)."}
    )
    heldout_samples: int | None = field(
        default=None, metadata={"help": "Held-out rows per measurement, at most (default: 128)."}
    )
    track_projector: bool = field(
        default=False, metadata={"help": "Also track the linear layers between two towers (mergers, projectors)."}
    )
    freeze_norms: bool = field(
        default=False, metadata={"help": "Freeze a layer's norms and biases with the last of its matrices."}
    )
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "Freeze the embeddings with the last matrix of the first layer."}
    )
    activation_cache_mib: int | None = field(
        default=None,
        metadata={"help": "MiB of CPU memory for outputs of frozen leading layers, for later epochs; 0 is off."},
    )

    encoder_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for outputs of a frozen encoder, for later runs on the same images."}
    )

    def __post_init__(self) -> None:
        _expect(self.metric in CRITERIA, "metric", self.metric, f"one of {', '.join(CRITERIA)}")
        rules = ("auto", *STOPPING_RULES)
        _expect(self.stopping in rules, "stopping", self.stopping, f"one of {', '.join(rules)}")
        _expect(self.keep in KEEP, "keep", self.keep, f"one of {', '.join(KEEP)}")
        self.tau = _parse_tau(self.tau)
        self.schedule = _parse_schedule(self.schedule)
        for name in CRITERION_SETTINGS:
            if getattr(self, name) is not None and name not in CRITERIA[self.metric].defaults:
                having = [metric for metric, criterion in CRITERIA.items() if name in criterion.defaults]
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but metric {self.metric!r} has no {name}; it is a setting of "
                    f"{', '.join(having)}. Remove it, or choose one of these."
                )
        if not self.may_measure_heldout:
            for name in HELDOUT_SETTINGS:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but with stopping {self.stopping!r} and keep "
                        f"{self.keep!r} no held-out score is measured. Remove it, or set stopping to 'heldout'."
                    )
        _expect(
            self.heldout_metric in (None, *HELDOUT_METRICS),
            "heldout_metric",
            self.heldout_metric,
            f"one of {', '.join(HELDOUT_METRICS)}",
        )
        if self.metric == "schedule" and self.schedule is None:
            raise ValueError(
                'metric is "schedule", which needs schedule: the events.jsonl of another run, or a mapping from '
                'matrix, pattern or tower to step, as in {"vision": 1}.'
            )

        expect_number(self, "auto_ratio", "a number above 0", 0, above=True)
        expect_number(self, "alpha", "a fraction of the training steps from 0 to 1", 0, 1)
        expect_number(self, "patience", "a whole number of consecutive measurements, 1 or more", 1, whole=True)
        expect_number(self, "measure_every", "a whole number of steps, 1 or more", 1, whole=True)
        expect_number(self, "sample_fraction", "a fraction of a matrix above 0 and at most 1", 0, 1, above=True)
        expect_number(self, "margin", "a number above 0", 0, above=True)
        expect_number(self, "heldout_every", "a whole number of steps, 1 or more", 1, whole=True)
        expect_number(self, "heldout_patience", "a whole number of measurements, 1 or more", 1, whole=True)
        expect_number(self, "heldout_grace", "a fraction of the training steps from 0 to 1", 0, 1)
        expect_number(self, "heldout_cost", "a fraction of the training FLOPs above 0 and at most 1", 0, 1, above=True)
        expect_number(self, "heldout_samples", "a whole number of rows, 1 or more", 1, whole=True)
        expect_number(self, "activation_cache_mib", "a whole number of MiB, or 0 for none", 0, whole=True)
        if self.encoder_cache_dir is not None and self.activation_cache_mib == 0:
            raise ValueError(
                f"encoder_cache_dir is {self.encoder_cache_dir!r}, but activation_cache_mib is 0, which turns the "
                "cache off. Remove one of them."
            )
        if self.alpha == 0 and self.tau in (None, "auto") and "tau" in CRITERIA[self.metric].defaults:
            raise ValueError(
                'alpha is 0 and tau is "auto": the level of a matrix is measured in the grace period. Give alpha, or '
                "a number for tau."
            )

    @property
    def may_measure_heldout(self) -> bool:
        """Whether a held-out score is measured if there are held-out rows."""
        return self.stopping in ("auto", "heldout") or self.keep == "best_average"

    @property
    def needs_heldout_rows(self) -> bool:
        """Whether held-out rows must be given."""
        return self.stopping == "heldout" or self.keep == "best_average"

    def criterion_settings(self) -> dict[str, Any]:
        """The settings of the chosen metric, defaults filled in."""
        return self._with_defaults(CRITERIA[self.metric].defaults)

    def heldout_settings(self) -> dict[str, Any]:
        """`metric`, `every`, `patience`, `grace`, `cost` and `samples` of the held-out score, defaults filled in."""
        settings = self._with_defaults({f"heldout_{k}": v for k, v in STOPPING_RULES["heldout"].defaults.items()})
        return {name.removeprefix("heldout_"): value for name, value in settings.items()}

    def _with_defaults(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in defaults}
        return {name: default if given[name] is None else given[name] for name, default in defaults.items()}


def expect_number(
    settings: Any,
    name: str,
    expected: str,
    lowest: float,
    highest: float = math.inf,
    above: bool = False,
    whole: bool = False,
) -> None:
    """Checks a number of a dataclass; `None` stands for a default of its own.

    Args:
        settings: the dataclass.
        name (`str`): of the field.
        expected (`str`): what the message says of the values that it takes.
        lowest (`float`), highest (`float`, *optional*, defaults to infinity): the range, both included.
        above (`bool`, *optional*, defaults to `False`): leave `lowest` out.
        whole (`bool`, *optional*, defaults to `False`): whole numbers only.

    Raises:
        ValueError: it is no number, not finite, or out of range.
    """
    value = getattr(settings, name)
    if value is not None:
        is_of_kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        number = is_of_kind and math.isfinite(value)
        inside = number and lowest <= value <= highest and not (above and value == lowest)
        _expect(bool(inside), name, value, expected)


def _expect(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; expected {expected}.")


def _from_json(value: Any) -> Any:
    """A value from the command line, where everything is text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


def _parse_tau(given: Any) -> Any:
    """A number, a dict of towers or "auto", also from the text of a command line."""
    tau = _from_json(given)

    def is_number(value: Any) -> bool:
        # A sum of absolute values is never below 0.
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf

    if tau is None or tau == "auto" or is_number(tau):
        return tau
    if isinstance(tau, dict) and tau and set(tau) <= set(TOWERS) and all(map(is_number, tau.values())):
        return {tower: float(value) for tower, value in tau.items()}
    raise ValueError(
        f'tau is {given!r}; expected a number of at least 0, "auto", or an object with a number for some of '
        f'{", ".join(TOWERS)}, as in {{"vision": 0.3, "language": 6.0}}.'
    )


def _parse_schedule(given: Any) -> Any:
    """A path, or a dict from names to steps, also from the text of a command line."""
    schedule = _from_json(given)
    if schedule is None:
        return None
    if isinstance(schedule, str | Path):
        _expect(os.path.isfile(schedule), "schedule", str(given), "the events.jsonl of another run; there is no file")
        return str(schedule)
    steps_are_whole = isinstance(schedule, dict) and all(
        isinstance(step, int) and not isinstance(step, bool) and step >= 1 for step in schedule.values()
    )
    _expect(
        steps_are_whole,
        "schedule",
        given,
        'a file, or an object from matrix, pattern or tower to a step of at least 1, as in {"vision": 1}',
    )
    return schedule
