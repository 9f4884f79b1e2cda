"""What only a recipe knows of a run: command and arguments, answers before and after training, what to run next."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from grades_trl.report.strict_json import jsonable

IMAGE_SIZE = 256  # pixels of the longer side: of a sample in the report


@dataclass(frozen=True)
class Sample:
    """
    One held-out prompt, and what the model answered.

    Attributes:
        prompt (`str`), expected (`str`): of the dataset, without its images.
        before (`str`), after (`str`): the answers before and after training.
        image (`bytes` or `None`): the first image of the prompt as JPEG, at most 256 pixels long.
    """

    prompt: str
    expected: str
    before: str
    after: str
    image: bytes | None = None

    @property
    def is_right(self) -> bool:
        """Whether the answer after training is the expected one, outer spaces aside."""
        return self.after.strip() == self.expected.strip()


@dataclass
class RecipeFacts:
    """
    Attributes:
        command (`str`): the command line of the run; empty if there is none.
        arguments (`dict[str, dict[str, Any]]`): group -> argument -> value, all of the run, without secrets.
        samples (`list[Sample]`): answers before and after.
        next_commands (`list[tuple[str, str]]`): what for, and the command.
    """

    command: str = ""
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    next_commands: list[tuple[str, str]] = field(default_factory=list)


def thumbnail(image: PIL.Image.Image) -> bytes:
    """An image as JPEG of at most 256 x 256 pixels, on white where it is transparent."""
    image = image.convert("RGBA")
    image.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    white = PIL.Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    data = io.BytesIO()
    white.save(data, format="JPEG", quality=88)
    return data.getvalue()


def write_samples(directory: Path, samples: list[Sample]) -> None:
    """Writes `samples.jsonl`, with the images beside it as `0.jpg` and so on.

    Args:
        directory (`Path`): made if missing.
        samples (`list[Sample]`): one line each, the image by the name of its file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, sample in enumerate(samples):
        name = None if sample.image is None else f"{number}.jpg"
        if name is not None and sample.image is not None:
            (directory / name).write_bytes(sample.image)
        row = {"prompt": sample.prompt, "expected": sample.expected, "before": sample.before, "after": sample.after}
        lines.append(json.dumps(jsonable({**row, "image": name}), ensure_ascii=False) + "\n")
    (directory / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
