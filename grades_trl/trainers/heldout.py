"""The held-out score of a trainer: which rows, and what their score is."""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import set_seed

from grades_trl.distributed import gathered, rank, world_size

IGNORED = -100  # label of a token that is not learned
# `loss_type` of models of Transformers that predict a label in its own place. Other decoders predict the next token.
UNSHIFTED_LOSSES = ("ForMaskedLM", "ForTokenClassification")


@dataclass(frozen=True)
class HeldoutAnswers:
    """
    How a model answers held-out prompts, for `heldout_metric="exact_match"`.

    Attributes:
        exact_match (`Callable[[int], float]`): lets the model answer the first N prompts, greedily, and returns the
            fraction that it answers right.
        available (`int`): prompts.
        max_new_tokens (`int`): longest answer, in tokens.
    """

    exact_match: Callable[[int], float]
    available: int
    max_new_tokens: int

    def passes_per_row(self, trainer: Any) -> float:
        """What an answer costs at most, in forward passes of a row of the trainer's `eval_dataset`.

        With a cache of keys and values each token passes once: those of the prompt, which is a part of the row, and
        those of the longest answer. Rows are as long as the mean of the first 16.
        """
        dataset = _rows_for_the_collator(trainer)
        rows = range(min(16, len(dataset)))
        with nothing_random_moves():
            tokens = [trainer.data_collator([dataset[row]])["input_ids"].shape[-1] for row in rows]
        return 1 + self.max_new_tokens / (sum(tokens) / len(tokens))


class HeldoutRows:
    """
    Always the same held-out rows, and their score at the weights that the model has. Forward passes only. Several
    processes share the rows out, and all of them get the score.

    For language models the loss is the mean negative log-likelihood per learned token (nats), whatever the training
    loss is; it does not depend on how rows are batched. For other models it is the trainer's own loss, averaged over
    the rows. The model is in evaluation mode meanwhile, without dropout and noise. What a collator draws at random is
    the same in each measurement. Random states, logged metrics and gradients are afterwards what they were.

    Args:
        trainer (`Trainer`): with `eval_dataset`; of several sets the first one is taken.
        count (`int`): rows to draw. Rows without a learned token are left out.
        metric (`str`, *optional*, defaults to `"loss"`): `"loss"`, or `"token_accuracy"`: the fraction of all learned
            tokens that the model predicts.

    Attributes:
        rows (`list[int]`): indices into the dataset.

    Raises:
        ValueError: the rows are streamed or there are none, none of them has a learned token, or the trainer computes
            no loss of them (it generates).
    """

    def __init__(self, trainer: Any, count: int, metric: str = "loss"):
        self._trainer = trainer
        self._metric = metric
        self._dataset = dataset = _rows_for_the_collator(trainer)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        self.rows: list[int] = []
        with nothing_random_moves(seed=0):
            for row in order:
                if self._is_learned(row):
                    self.rows.append(row)
                if len(self.rows) == count:
                    break
        if not self.rows:
            raise ValueError(
                f"None of the {len(dataset)} rows of eval_dataset has a token to learn: every label is masked. Is "
                "max_length too short for the prompts, or the response empty?"
            )
        self._has_been_finite = False
        # Whether the model's loss of a batch is a mean; asked in the first batch of those that should return a sum
        self._loss_is_mean: bool | None = None if trainer.model_accepts_loss_kwargs else True

    def _is_learned(self, row: int) -> bool:
        batch = self._trainer.data_collator([self._dataset[row]])
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"{type(self._trainer).__name__} computes no loss of its eval_dataset as it is (it generates first), "
                'so there is no held-out score to measure: set stopping="all_frozen" and keep="last".'
            )
        labels: Any = batch.get("labels")
        if self._metric == "token_accuracy" and not _are_tokens(labels):
            raise ValueError(
                f'heldout_metric is "token_accuracy", and {type(self._trainer).__name__} has no labels of tokens: set '
                'heldout_metric="loss".'
            )
        return not _are_tokens(labels) or bool(self._learned(labels).any())

    @property
    def _shifts_labels(self) -> bool:
        """Whether the model compares the prediction in a place with the label of the next one."""
        model = self._trainer.model
        return not model.config.is_encoder_decoder and getattr(model, "loss_type", None) not in UNSHIFTED_LOSSES

    def _learned(self, labels: Tensor) -> Tensor:
        """Which tokens are learned: where each is predicted from those before it, never the first of a row."""
        return (labels[:, 1:] if self._shifts_labels else labels) != IGNORED

    def __call__(self) -> float | tuple[float, float]:
        """The mean loss of the rows now; with `metric="token_accuracy"` the accuracy and the loss.

        Raises:
            ValueError: the loss of a row was not finite in the first measurement, although that of others was; the
                model returns no logits to compute an accuracy from.
        """
        model = self._trainer.model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad(), nothing_random_moves(seed=0), self._no_metrics_logged():
                loss, accuracy = self._scores()
                if not math.isfinite(loss) and not self._has_been_finite:
                    self._blame_a_row()
        finally:
            for module, training in modes.items():
                module.training = training
        self._has_been_finite = self._has_been_finite or math.isfinite(loss)
        return (accuracy, loss) if self._metric == "token_accuracy" else loss

    def _scores(self) -> tuple[float, float]:
        """Loss and token accuracy of all rows; the accuracy is 0 where it is not asked for."""
        size = self._trainer._train_batch_size  # smaller than its argument after auto_find_batch_size
        batches = [self.rows[start : start + size] for start in range(0, len(self.rows), size)]
        own = batches[rank() :: world_size()]
        sums = torch.zeros(3, device=self._trainer.args.device)
        for batch in own:
            sums += self._sums_of(batch)
        if len(own) < math.ceil(len(batches) / world_size()):
            self._sums_of(batches[0])  # some trainers gather metrics in each of their passes: as many everywhere
        total, right, weight = gathered(sums).sum(0).tolist()
        return total / weight, right / weight

    def _sums_of(self, rows: list[int]) -> Tensor:
        """Of a batch: the sum of its losses, its correct tokens, and of how many tokens or rows these are."""
        batch = self._trainer.data_collator([self._dataset[row] for row in rows])
        inputs = self._trainer._prepare_inputs(copy.copy(batch))
        with self._trainer.compute_loss_context_manager():
            numbers = self._sums_and_count(inputs, len(rows))
        device = self._trainer.args.device
        return torch.stack([torch.as_tensor(number, dtype=torch.float32, device=device) for number in numbers])

    def _sums_and_count(self, inputs: dict[str, Any], rows: int) -> tuple[Tensor, Any, Any]:
        """The sum of the losses of a batch, its correct tokens, and of how many tokens or rows these are."""
        trainer = self._trainer
        labels: Any = inputs.get("labels")
        if not _are_tokens(labels):
            return trainer.compute_loss(trainer.model, inputs).detach().float() * rows, 0, rows
        count = self._learned(labels).sum()
        inputs = {**inputs, "use_cache": False}
        if getattr(trainer, "aux_loss_enabled", False):  # TRL adds the routers' loss unless told not to
            inputs["output_router_logits"] = False
        if trainer.args.use_liger_kernel:
            inputs |= {"skip_logits": True, "return_token_accuracy": self._metric == "token_accuracy"}
        half = None
        if self._loss_is_mean is None:
            with nothing_random_moves():
                half = self._outputs(inputs, 2)["loss"]
        outputs = self._outputs(inputs, 1)  # the sum over tokens, divided by 1
        loss = outputs["loss"].float()
        if half is not None:  # T5, Whisper and others take the number, and do not divide by it
            self._loss_is_mean = bool(half > 0.75 * loss)
        if self._loss_is_mean:
            loss = loss * count
        return loss, self._correct_tokens(outputs, labels, count) if self._metric == "token_accuracy" else 0, count

    def _outputs(self, inputs: dict[str, Any], items: int) -> Any:
        trainer = self._trainer
        if trainer.model_accepts_loss_kwargs:
            # A tensor, as in training: a compiled model would be compiled anew for another integer.
            inputs = {**inputs, "num_items_in_batch": torch.tensor(items, device=trainer.args.device)}
        return trainer.model(**inputs)

    def _correct_tokens(self, outputs: Any, labels: Tensor, count: Any) -> Any:
        if outputs.get("num_correct_tokens") is not None:  # TRL's loss in chunks
            return outputs["num_correct_tokens"]
        if outputs.get("token_accuracy") is not None:  # Liger's loss
            return outputs["token_accuracy"] * count
        logits = outputs.get("logits")
        if not isinstance(logits, Tensor):
            raise ValueError(
                'heldout_metric is "token_accuracy", and the model returns no logits to compute it from (its loss is '
                "fused with the output head, as Unsloth's): "
                'set heldout_metric="loss".'
            )
        logits = logits[:, -labels.shape[1] :]  # without the virtual tokens of prompt tuning
        if self._shifts_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()

    def _blame_a_row(self) -> None:
        losses = {}
        for row in self.rows:  # each process looks at all of them
            total, _, count = self._sums_of([row]).tolist()
            losses[row] = total / count
        bad = [row for row, loss in losses.items() if not math.isfinite(loss)]
        if bad and len(bad) < len(losses):  # of all rows it is the model, not the rows
            raise ValueError(
                f"The loss of row {bad[0]} of eval_dataset is {losses[bad[0]]}, that of {len(losses) - len(bad)} "
                "others is a number: look at that row, or leave it out."
            )

    @contextmanager
    def _no_metrics_logged(self) -> Iterator[None]:
        """TRL's trainers collect metrics in `compute_loss`, for the next log."""
        logged = {
            key: getattr(self._trainer, key)
            for key in ("_metrics", "_total_train_tokens")
            if hasattr(self._trainer, key)
        }
        if "_metrics" in logged:
            self._trainer._metrics = {mode: defaultdict(list) for mode in logged["_metrics"]}
        try:
            yield
        finally:
            vars(self._trainer).update(logged)


def first_dataset(datasets: Any) -> Any:
    """An `eval_dataset`; of a dict of several the first one."""
    return next(iter(datasets.values())) if isinstance(datasets, dict) else datasets


def heldout_dataset(trainer: Any) -> Any:
    """The rows that the held-out score is measured on: `eval_dataset`, of several the first.

    Raises:
        ValueError: there are no rows, or they are streamed.
    """
    dataset = first_dataset(trainer.eval_dataset)
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "The held-out score is measured on the same rows each time, and eval_dataset is streamed: pass a dataset "
            'of known length (64 rows are enough), or set stopping="all_frozen" and keep="last".'
        )
    if len(dataset) == 0:
        raise ValueError("The held-out score is measured on eval_dataset, which has no rows.")
    return dataset


def _rows_for_the_collator(trainer: Any) -> Any:
    dataset = heldout_dataset(trainer)
    return trainer._remove_unused_columns(dataset, "evaluation") if isinstance(dataset, Dataset) else dataset


def _are_tokens(labels: Any) -> bool:
    """Whether labels are those of a language model: one per token of each row. (Those of several classes at once are
    floating-point numbers.)"""
    return isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()


@contextmanager
def nothing_random_moves(seed: int | None = None) -> Iterator[None]:
    """Puts all random states back: Python's, NumPy's, and torch's of every device.

    Args:
        seed (`int`, *optional*): what is random inside (a collator that masks tokens or crops images, for example) is
            the same each time.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        if seed is not None:
            set_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)
