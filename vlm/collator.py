"""The collator of rows with images: conversations of which all replies are learned, beside prompts with one reply."""

from __future__ import annotations

import dataclasses
from typing import Any

from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling


class RepliesCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator (1.16) takes no prompts with completions under `assistant_only_loss`. Training rows are whole
    conversations then, while held-out rows have one reply each, as the model will have to write it."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "messages" in examples[0]:
            return super().torch_call(examples)
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        settings |= {"assistant_only_loss": False, "completion_only_loss": True}
        return DataCollatorForVisionLanguageModeling(**settings).torch_call(examples)

    @classmethod
    def of(cls, collator: DataCollatorForVisionLanguageModeling) -> RepliesCollator:
        """The same settings."""
        return cls(**{field.name: getattr(collator, field.name) for field in dataclasses.fields(collator)})
