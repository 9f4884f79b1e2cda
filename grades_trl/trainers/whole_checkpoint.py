"""Whether a checkpoint is whole. A process that is killed while it saves, or deletes, leaves a part of one."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import sort_checkpoints

from .checkpoint import STATE_JSON, STATE_TENSORS

logger = logging.getLogger(__name__)

# What a run needs to go on as if it had not stopped; the Trainer goes on without, with other weights. It writes
# trainer_state.json last. (FSDP has folders with weights and optimizer state.)
NEEDED = {
    "trainer_state.json": "steps",
    "*model*": "weights",
    "optimizer*": "optimizer state",
    "scheduler.pt": "learning rate",
    "rng_state*.pth": "random state",
}


def what_is_wrong(checkpoint: Path, with_grades: bool) -> str | None:
    """Why a run cannot be resumed from a checkpoint; `None` if it is whole.

    Only the beginnings and ends of large files are read.

    Args:
        checkpoint (`Path`): its folder.
        with_grades (`bool`): the state of GradES has to be in it.
    """
    needed = NEEDED | ({STATE_JSON: "state of GradES", STATE_TENSORS: "state of GradES"} if with_grades else {})
    for pattern, content in needed.items():
        if not any(checkpoint.glob(pattern)):
            return f"the {content} is missing ({pattern})"
    for file in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        if not _is_readable(file):
            return f"{file.name} is incomplete"
    for index in checkpoint.glob("*.safetensors.index.json"):
        for shard in set(json.loads(index.read_text("utf-8"))["weight_map"].values()):
            if not (checkpoint / shard).exists():
                return f"{shard} is missing"
    return None


def newest_whole(output_dir: Path, with_grades: bool) -> Path | None:
    """The newest checkpoint of a run that is whole; newer ones are said. `None` if there is none.

    Arguments as in `what_is_wrong`.
    """
    for path in reversed(sort_checkpoints(str(output_dir))):
        wrong = what_is_wrong(Path(path), with_grades)
        if wrong is None:
            return Path(path)
        logger.warning(f"{path} is not whole, and is passed over: {wrong}.")
    return None


def _is_readable(file: Path) -> bool:
    try:
        if file.suffix == ".json":
            json.loads(file.read_text("utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):  # compares the size of the file with its header
                pass
        elif file.suffix in (".pt", ".pth"):
            return zipfile.is_zipfile(file)  # by its directory, which is at the end
    except (ValueError, SafetensorError):
        return False
    return True
