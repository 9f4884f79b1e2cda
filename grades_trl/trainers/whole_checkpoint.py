"""Checkpoints that are whole or not there, and whether one is whole: processes are killed while they save or delete.

The Trainer writes a checkpoint file by file where it will be read (5.17). Here it is written beside its place, with a
list of its files, and renamed when it is complete.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from grades_trl.distributed import world_size
from grades_trl.durable import put_in_place
from grades_trl.report.disk import is_of_the_disk

from .checkpoint import STATE_JSON, STATE_TENSORS

if TYPE_CHECKING:
    from typing import Any as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)

# In the output folder; what is in it is no checkpoint yet, or none any longer. The Trainer uploads nothing that begins
# with "_".
SAVING = "_saving"
MANIFEST = "manifest.json"  # of a checkpoint: file -> size in bytes

# What a run needs to go on as if it had not stopped; the Trainer goes on without, with other weights. It writes
# trainer_state.json last. (FSDP has folders with weights and optimizer state.)
NEEDED = {
    "trainer_state.json": "steps",
    "*model*": "weights",
    "optimizer*": "optimizer state",
    "scheduler.pt": "learning rate",
    "rng_state*.pth": "random state",
}


class InCheckpoints:
    """A callback that has a file of its own in each checkpoint."""

    def save_state(self, folder: Path) -> None:
        """Writes it into a checkpoint, after the Trainer's files. For the main process."""
        raise NotImplementedError


class WholeCheckpoints(_Trainer):
    """
    Makes a Trainer's checkpoints whole by a rename: `class MyTrainer(WholeCheckpoints, Trainer)`.

    Older checkpoints are deleted, and the new one is pushed to the hub, when it has its place. One that does not fit
    on the disk is said, and training goes on, with the earlier ones.
    """

    _is_saving = False

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        place = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        partial = place.parent / SAVING / place.name
        best = self.state.best_model_checkpoint
        try:
            self._save_whole(place, partial, model, trial, *args, **kwargs)
        except Exception as error:
            if world_size() > 1 or not is_of_the_disk(error):  # the other processes would wait for this one
                raise
            self.state.best_model_checkpoint = best
            files = [path for path in partial.rglob("*") if path.is_file()]
            torn = max(files, key=lambda path: path.stat().st_mtime, default=partial)
            logger.warning(
                f"{place} was not saved: {torn.name} did not fit on the disk ({error}). Training goes on, and earlier "
                "checkpoints stay. Make room before the end: the model has to be saved."
            )
            shutil.rmtree(partial.parent, ignore_errors=True)

    def _save_whole(self, place: Path, partial: Path, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            shutil.rmtree(partial.parent, ignore_errors=True)  # of a process that was killed
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial, *args, **kwargs)
        finally:
            self._is_saving = False
        if self.state.best_model_checkpoint == str(partial):
            self.state.best_model_checkpoint = str(place)
        self.accelerator.wait_for_everyone()  # each process has files of its own
        if self.args.should_save:
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))  # with the place of the best one
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, InCheckpoints):
                    callback.save_state(partial)
            _write_manifest(partial)
            if place.exists():  # of a run that went on from an older checkpoint; a folder replaces no other
                os.rename(place, partial.parent / "replaced")
            put_in_place(partial, place)
            shutil.rmtree(partial.parent)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(place.parent), self.args.save_total_limit, best, use_mtime=True)

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        # While it saves, the Trainer also looks here for older checkpoints to delete: there are none.
        folder = super()._get_output_dir(*args, **kwargs)
        return os.path.join(folder, SAVING) if self._is_saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # it uploads in the background, from where the checkpoint stays
            super()._push_from_checkpoint(checkpoint_folder)


def _write_manifest(checkpoint: Path) -> None:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": sizes}, indent=2), "utf-8")


def what_is_wrong(checkpoint: Path, with_grades: bool) -> str | None:
    """Why a run cannot be resumed from a checkpoint; `None` if it is whole.

    Only the beginnings and ends of large files are read. One that the stock Trainer has written has no manifest: the
    files that are there must be readable.

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
    if (checkpoint / MANIFEST).exists():
        for name, size in json.loads((checkpoint / MANIFEST).read_text("utf-8"))["files"].items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
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
