"""GradESConfig: every knob of the method, one dataclass."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS = ("grad_change", "grad_norm", "weight_change", "agreement", "heldout_gain")
TOWERS = ("language", "vision", "audio", "projector")


@dataclass
class GradESConfig:
    """
    When a weight matrix counts as converged. A dataclass beside `SFTConfig`, so that `TrlParser` reads both.

    The defaults are the paper's method (arXiv 2509.01842 v3, algorithm 1) with thresholds that set themselves. To
    replay a published setting give its number: `--metric weight_change --tau 1.804456 --alpha 0.55`.

    Parameters:
        metric (`str`, *optional*, defaults to `"grad_change"`):
            What is read from each matrix. A sum over its elements: `"grad_change"`, `sum |g_t - g_{t-1}|` (paper,
            Eq. 1); `"grad_norm"`, `sum |g_t|` (paper v1, and Eq. 3 for LoRA); `"weight_change"`, `sum |W_t - W_{t-1}|`
            (what the authors' package `grades` 1.0.6 measures; the published thresholds are on this scale).
            `"agreement"`: the cosine of g_t and g_{t-1}, -1 to 1, without units. `"heldout_gain"`: the held-out loss,
            in nats, that the updates of the matrix have bought since the last reading (see `heldout.py`); it needs
            held-out examples, and in the end the model gets the average of its weights that was best on them.
            Gradients are those of the whole optimizer step, before clipping.
        tau (`float`, `dict[str, float]` or `"auto"`, *optional*, defaults to `"auto"`):
            A matrix whose reading is below it has converged. A number; a number per tower, as
            `{"vision": 0.3, "language": 6.0}` (JSON on the command line); or `"auto"`: `auto_ratio` times the median
            of the matrix's own readings during the grace period; for `heldout_gain` it is 0.
        auto_ratio (`float`, *optional*, defaults to `0.5`):
            Used by `tau="auto"` alone: the fraction of its level in the grace period that a matrix must fall below.
        alpha (`float`, *optional*):
            Grace period as a fraction of all optimizer steps; nothing freezes while `step <= ceil(alpha * total)`. By
            default 0.55, as in the paper; 0.1 for `heldout_gain`.
        patience (`int`, *optional*):
            Consecutive readings below tau that a matrix needs to freeze. By default 1, as in the paper; 2 for
            `heldout_gain`.
        interval (`int`, *optional*):
            Read every that many steps. By default 1; for `heldout_gain`, what `heldout_cost` allows. A reading of the
            other metrics always compares two neighbouring steps, so tau keeps its meaning.
        heldout_cost (`float`, *optional*, defaults to `0.02`):
            Used by `heldout_gain` alone: held-out examples per training example, at most, in 20 readings. It sets how
            many examples a reading takes, from 16 to `heldout_samples`. Where it does not pay for the four readings
            that it takes to end a run (below about 3,200 training examples), nothing is read and nothing freezes.
        heldout_samples (`int`, *optional*, defaults to `128`):
            Used by `heldout_gain` alone: held-out examples per reading, at most; always the same ones.
        replay (`str`, *optional*):
            Path of another run's `events.jsonl`: freeze the same matrices at the same steps; readings are taken, and
            decide nothing.
        sample (`float`, *optional*, defaults to `1 / 64`):
            Fraction of each large matrix that is read and kept for comparison; a matrix that is hardly larger than the
            smallest sample (16,384 elements) is read as a whole. Unbiased, with an error of 0.6 % for a matrix of 16M
            elements and 2 % for small ones (see `metrics.py`). 1 reads everything, as the paper does.
        track_projector (`bool`, *optional*, defaults to `False`):
            Also watch and freeze the linear layers between two towers (mergers, projectors). The paper does not.
        cache_prefix (`int`, *optional*, defaults to `0`):
            MiB of CPU memory that keep the output of the frozen leading layers for each sample, so that they are not
            computed again in later epochs (see `caching.py`). It should hold rows x tokens x hidden size x 2 or 4
            bytes; 0 is off.
        freeze_norms (`bool`, *optional*, defaults to `False`):
            Freeze the norms and biases of a block with the last of its matrices. Off, because the paper trains them to
            the end; but as long as one of them trains, backward has to reach that block (see `cutting.py`).
        freeze_embeddings (`bool`, *optional*, defaults to `False`):
            Freeze what feeds the first block (token, patch and position embeddings, and with them a tied output head)
            when all matrices of that block are frozen. Off for the same reason, with the same price. LoRA trains
            neither norms nor embeddings and needs neither flag.

    Raises:
        ValueError: a value out of range, with the range.
    """

    _argument_group_name = "GradES"

    metric: str = field(
        default="grad_change",
        metadata={"help": "What is read from each matrix at each step.", "choices": list(METRICS)},
    )
    tau: dict | str | None = field(
        default="auto",
        metadata={
            "help": "A matrix whose reading is below tau has converged: a number, a JSON object with one per tower "
            'such as \'{"vision": 0.3, "language": 6.0}\', or "auto".'
        },
    )
    auto_ratio: float = field(
        default=0.5,
        metadata={"help": "With tau=auto: fraction of its own level in the grace period a matrix must fall below."},
    )
    alpha: float | None = field(
        default=None,
        metadata={"help": "Grace period, a fraction of all steps; 0.55, 0.1 for heldout_gain."},
    )
    patience: int | None = field(
        default=None,
        metadata={"help": "Consecutive readings below tau to freeze; 1, and 2 for heldout_gain."},
    )
    interval: int | None = field(
        default=None,
        metadata={"help": "Read every that many steps; 1, and what heldout_cost allows."},
    )
    heldout_cost: float = field(
        default=0.02, metadata={"help": "heldout_gain: held-out examples per training example, at most."}
    )
    heldout_samples: int = field(
        default=128, metadata={"help": "heldout_gain: held-out examples per reading, at most."}
    )
    replay: str | None = field(
        default=None,
        metadata={"help": "An events.jsonl: freeze what that run froze, when it did."},
    )
    sample: float = field(
        default=1 / 64,
        metadata={"help": "Fraction of each large matrix that is read; 1 reads all, as the paper does."},
    )
    track_projector: bool = field(
        default=False,
        metadata={"help": "Also watch the linear layers between two towers (mergers, projectors)."},
    )
    cache_prefix: int = field(
        default=0,
        metadata={
            "help": "MiB of CPU memory for the outputs of frozen leading layers, read in later epochs; 0 is off."
        },
    )
    freeze_norms: bool = field(
        default=False,
        metadata={"help": "Freeze a block's norms and biases with the last of its matrices, so backward can skip it."},
    )
    freeze_embeddings: bool = field(
        default=False,
        metadata={"help": "Freeze the embeddings (and a tied head) when all matrices of the first block are frozen."},
    )

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"metric is {self.metric!r}; expected one of {', '.join(METRICS)}.")
        alpha, patience = (0.1, 2) if self.metric == "heldout_gain" else (0.55, 1)
        self.alpha = alpha if self.alpha is None else self.alpha
        self.patience = patience if self.patience is None else self.patience
        # A sum of absolute values is never below 0; a cosine or a gain can be.
        self.tau = _parse_tau(self.tau, lowest=-math.inf if self.metric in METRICS[3:] else 0.0)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; expected a fraction of the training steps from 0 to 1.")
        if self.tau == "auto" and self.alpha == 0 and self.metric != "heldout_gain":
            raise ValueError(
                'tau is "auto" and alpha is 0: the level of a matrix is taken in the grace period. Set alpha.'
            )
        if self.patience < 1 or (self.interval is not None and self.interval < 1):
            raise ValueError(f"patience is {self.patience} and interval {self.interval}; expected 1 or more of each.")
        if not 0 < self.heldout_cost <= 1:
            raise ValueError(f"heldout_cost is {self.heldout_cost}; expected a fraction above 0 and at most 1.")
        if self.heldout_samples < 1:
            raise ValueError(f"heldout_samples is {self.heldout_samples}; expected 1 or more examples.")
        if not 0 < self.sample <= 1:
            raise ValueError(f"sample is {self.sample}; expected a fraction of a matrix, above 0 and at most 1.")
        if self.cache_prefix < 0:
            raise ValueError(f"cache_prefix is {self.cache_prefix}; expected MiB of memory, or 0 for none.")
        if self.replay is not None and not Path(self.replay).is_file():
            raise ValueError(f"replay is {self.replay!r}; expected the events.jsonl of another run, which is no file.")
        if self.auto_ratio <= 0:
            raise ValueError(f"auto_ratio is {self.auto_ratio}; expected a number above 0.")

    def tau_of(self, tower: str) -> float | None:
        """The threshold of a tower; `None` if every matrix finds its own (`tau="auto"`)."""
        if self.tau == "auto":
            return 0.0 if self.metric == "heldout_gain" else None
        if isinstance(self.tau, dict):
            if tower not in self.tau:
                raise ValueError(
                    f"tau gives thresholds for {', '.join(self.tau)}, but the model trains a {tower} tower: add "
                    f'"{tower}" to tau, or give one number for all.'
                )
            return float(self.tau[tower])
        return float(self.tau)  # type: ignore[arg-type]  # the annotation is what HfArgumentParser can read

    def grace_steps(self, total_steps: int) -> int:
        """`ceil(alpha * total_steps)`; the rounding guards against .55 * 100 being 55.00000000000001."""
        assert self.alpha is not None  # since __post_init__
        return math.ceil(round(self.alpha * total_steps, 9))


def _parse_tau(tau: Any, lowest: float) -> Any:
    """A number, a dict of towers or "auto", also from the text of a command line."""
    given = tau
    if isinstance(tau, str) and tau != "auto":
        try:
            tau = json.loads(tau)
        except json.JSONDecodeError:
            tau = None

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= lowest

    if tau == "auto" or is_number(tau):
        return tau
    if isinstance(tau, dict) and tau and set(tau) <= set(TOWERS) and all(is_number(value) for value in tau.values()):
        return {tower: float(value) for tower, value in tau.items()}
    at_least = "" if lowest == -math.inf else " of at least 0"
    raise ValueError(
        f'tau is {given!r}; expected a number{at_least}, "auto", or an object with a number for some of '
        f'{", ".join(TOWERS)}, as in {{"vision": 0.3, "language": 6.0}}.'
    )
