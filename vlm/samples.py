"""A contact sheet: images with what was expected and what the model answered before and after training."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from transformers import ProcessorMixin

from grades_trl.extras import require
from grades_trl.recipe.generation import exact_match, final_answer, text_of
from grades_trl.wording import shortened


def save_samples(
    dataset: Dataset, before: list[str], after: list[str], path: str | Path, processor: ProcessorMixin | None = None
) -> None:
    """Draws one row per example, its first image beside three lines of text, and saves it as PNG.

    Args:
        dataset (`Dataset`): with `images`, `prompt` and `completion`.
        before (`list[str]`), after (`list[str]`): the answers, one per example.
        path (`str` or `Path`): of the PNG.
        processor ([`~transformers.ProcessorMixin`], *optional*): of the model, as in `exact_match`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", "Sheets of samples")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.3 * len(dataset)), layout="constrained")
    rows = figure.subplots(len(dataset), 2, squeeze=False, width_ratios=[1, 2])
    for i, ((left, right), example, first, last) in enumerate(zip(rows, dataset, before, after, strict=True)):
        if example["images"]:
            left.imshow(example["images"][0], cmap="gray")
        right_answer = exact_match([last], dataset.select([i]), processor) == 1
        lines = [("expected", text_of(example["completion"]), "black"), ("before", first, "0.5")]
        lines.append(("after", last, "tab:green" if right_answer else "tab:red"))
        for y, (label, text, color) in zip((0.82, 0.5, 0.18), lines, strict=True):
            printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in final_answer(text))
            shown = shortened(printable, 90).replace("$", r"\$")  # $ would start mathtext
            right.text(0, y, f"{label:<9} {shown}", color=color, family="monospace", fontsize=9, va="center")
        left.axis("off")
        right.axis("off")
    figure.savefig(path, dpi=120)
