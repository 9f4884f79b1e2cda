"""`GradESVLMTrainer`: GradESTrainer for models that see."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from grades_trl.config import GradESConfig
from grades_trl.trainers.binding import on_sft_trainer
from grades_trl.trainers.mixin import GradESMixin

from .collator import RepliesCollator


class GradESVLMMixin(GradESMixin):
    """
    `GradESMixin` for vision-language models, with one tau per tower: `tau={"vision": .3, "language": 6}`.

    The towers learn at different speeds and their matrices have different sizes, so one number does not fit both
    (arXiv 2509.01842, section 4.3). `tau="auto"` takes each matrix against itself and needs no such care.

    Args:
        *args, **kwargs: of the trainer. `processing_class` must be a processor; rows have `images`.
        grades (`GradESConfig`, *optional*, defaults to `GradESConfig()`): `None` is the plain trainer.

    Raises:
        ValueError: a tokenizer in place of a processor; a dataset without images; a tower without a tau.
    """

    def __init__(self, *args: Any, grades: GradESConfig | None = GradESConfig(), **kwargs: Any):  # noqa: B008
        processor = kwargs.get("processing_class")  # None: the trainer loads the model's own
        if processor is not None and not isinstance(processor, ProcessorMixin):
            raise ValueError(
                f"A vision-language model is trained with its processor, and processing_class is a "
                f"{type(processor).__name__}: pass AutoProcessor.from_pretrained(...) (for text alone, use "
                "GradESTrainer)."
            )
        super().__init__(*args, grades=grades, **kwargs)
        if not self._is_vision_dataset:
            raise ValueError(
                f"train_dataset has no column `image` or `images`, only {', '.join(self.train_dataset.column_names)}: "
                "add the images (for text alone, use GradESTrainer)."
            )
        collator: Any = self.data_collator  # type: ignore[has-type]
        if self.args.assistant_only_loss and type(collator) is DataCollatorForVisionLanguageModeling:
            self.data_collator = RepliesCollator.of(collator)


def __getattr__(name: str) -> Any:
    if name == "GradESVLMTrainer":
        return on_sft_trainer(GradESVLMMixin, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
