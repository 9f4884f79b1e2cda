"""What a vision-language model answers: greedy generation over a dataset."""

from __future__ import annotations

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from grades_trl.distributed import is_main
from grades_trl.recipe.generation import generate_greedily, merged, own_share, prompt_text

from .builtin import blank as blank_images


def answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    blank: bool = False,
) -> list[str]:
    """Generates the model's answer to every example, greedily.

    The model may be in the middle of its training: every module's train or eval mode is put back afterwards. Several
    processes share the examples out, and all of them get all answers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Any model that generates from text and images.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor, with a chat template.
        dataset (`Dataset`):
            With columns `prompt` (messages, or text with the model's own image tokens) and `images` (a list of PIL
            images).
        batch_size (`int`, *optional*, defaults to `16`):
            Examples generated together.
        max_new_tokens (`int`, *optional*, defaults to `32`):
            Longest answer, in tokens.
        blank (`bool`, *optional*, defaults to `False`):
            Shows white images of the same sizes in place of the real ones: the control that tells reading from
            guessing.

    Returns:
        `list[str]`: one answer for each example, without special tokens and outer spaces.

    Raises:
        ValueError: if `dataset` lacks one of the two columns.
    """
    missing = {"prompt", "images"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"The dataset has no column {sorted(missing)}, only {dataset.column_names}. `answers` needs `prompt` (a "
            f"list of messages) and `images` (a list of images): rename the columns."
        )

    def inputs(start: int) -> BatchFeature:
        batch = dataset[start : start + batch_size]
        images = [blank_images(row) if blank else row for row in batch["images"]]
        texts = []
        for i, of_row in enumerate(images):
            row = {name: values[i] for name, values in batch.items()}
            if not isinstance(row["prompt"], str):
                row["prompt"] = prepare_multimodal_messages(row["prompt"], images=of_row)
            texts.append(prompt_text(processor, row))
        return processor(
            images=images if any(images) else None,  # processors refuse a batch that has none, and TRL does the same
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the chat template has put them already
            return_tensors="pt",
        ).to(model.device, dtype=model.dtype)

    starts = own_share(model, range(0, len(dataset), batch_size))
    shown = tqdm(starts, desc="answers", unit="batch", disable=None if is_main() else True)
    own = [row for start in starts for row in range(len(dataset))[start : start + batch_size]]
    texts = generate_greedily(model, processor, map(inputs, shown), max_new_tokens)
    found = merged(dict(zip(own, texts, strict=True)))
    return [found[row] for row in range(len(dataset))]
