"""Where rows come from: the hub, a file, a folder, or what `save_to_disk` has written."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from grades_trl.recipe.bad_input import blamed_on

from .errors import DataError
from .formats import BESIDE, PROMPTS, REPLIES, rename_columns, to_trl_format
from .images import read_images

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
# The words by which `datasets` recognizes a split in the name of a folder or file
SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}

logger = logging.getLogger(__name__)

# What `datasets` raises of a name that is no dataset, or of a damaged one
NO_DATA = (OSError, ValueError, KeyError, RuntimeError, DatasetGenerationError)


def read(
    name: str,
    config: str | None = None,
    text_column: str = "text",
    columns: dict[str, str] | None = None,
    vision: bool = False,
) -> dict[str, Dataset]:
    """
    Reads the splits of a dataset, with their images decodable, and formats of other tools as TRL's.

    Args:
        name (`str`): id of a dataset on the hub, or path of a local file or folder.
        config (`str`, *optional*): configuration of a dataset on the hub.
        text_column (`str`, *optional*, defaults to `"text"`): column that holds plain text; a CSV file keeps it as
            text.
        columns (`dict[str, str]`, *optional*): see [`formats.rename_columns`].
        vision (`bool`, *optional*, defaults to `False`): see [`formats.to_trl_format`].

    Returns:
        `dict[str, Dataset]`: by name of the split; `train` alone where the names of files and folders tell none.

    Raises:
        [`DataError`]: the path is not there, the files cannot be read, or it cannot be told what the columns are.
    """
    path = Path(name).expanduser()
    columns = columns or {}

    def ready(splits: dict[str, Dataset], folder: Path) -> dict[str, Dataset]:
        return {
            split: _ready(dataset, folder, name, text_column, columns, vision) for split, dataset in splits.items()
        }

    if not path.exists():
        if name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name or path.suffix in BUILDERS:
            raise DataError(f"{name}: there is no such file or folder")
        with blamed_on(f"{name}: cannot be loaded", *NO_DATA):
            splits = load_dataset(name, config)
        return ready(splits, Path())
    if config is not None:
        raise DataError(f'{name}: is a local path, expected no config, got "{config}"')
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        with blamed_on(f"{name}: cannot be loaded", *NO_DATA):
            saved = load_from_disk(str(path))
        return ready({"train": saved} if isinstance(saved, Dataset) else saved, path)

    expected = f"expected {', '.join(BUILDERS)}"
    if path.is_file() and path.suffix not in BUILDERS:
        raise DataError(f"{name}: cannot be read, {expected}")
    files = [path] if path.is_file() else _data_files(path)
    if not files:
        raise DataError(f"{name}: the folder has no data file, {expected}")
    if len({BUILDERS[file.suffix] for file in files}) > 1:
        raise DataError(
            f"{name}: expected files of one kind, found {', '.join(sorted({file.suffix for file in files}))}"
        )
    splits = {"train": files} if path.is_file() else _files_by_split(path, files)
    left_out = sorted({*files} - {file for of_split in splits.values() for file in of_split})
    if left_out:
        logger.warning(
            f"{name}: files without a split in their name are left out, since others have one: "
            f"{', '.join(str(file.relative_to(path)) for file in left_out)}. Rename them (train_..., test_...) to "
            "read them too."
        )
    return {split: _read_files(files, name, text_column, columns, vision) for split, files in splits.items()}


def _ready(
    dataset: Dataset,
    folder: Path,
    name: str,
    text_column: str,
    columns: dict[str, str],
    vision: bool,
    always: bool = False,
) -> Dataset:
    try:
        dataset = read_images(rename_columns(dataset, columns, name), folder)
        return to_trl_format(dataset, folder, vision, text_column, always)
    except DataError as error:
        raise error if str(error).startswith(name) else DataError(f"{name}: {error}") from error


def _data_files(folder: Path) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in BUILDERS
        and file.suffix != ".txt"  # in a folder it is a README or a licence
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    # In a folder of images, this file is the data
    return [file for file in files if file.stem == "metadata"] or files


def _files_by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for file in files:
        if match := re.fullmatch(r"(.+)-\d{5}-of-\d{5}", file.stem):
            splits.setdefault(match[1], []).append(file)
    if splits:
        return splits
    # As in `datasets`: names of folders go before names of files, and files without a split are left out once one has
    for parts in (lambda file: file.parent.parts, lambda file: (file.name,)):
        for split, words in SPLIT_WORDS.items():
            for file in files:
                pattern = rf"(^|[-._ 0-9])({words})([-._ 0-9]|$)"
                if any(re.search(pattern, part) for part in parts(file.relative_to(folder))):
                    splits.setdefault(split, []).append(file)
        if splits:
            return splits
    return {"train": files}


def _read_files(files: list[Path], name: str, text_column: str, columns: dict[str, str], vision: bool) -> Dataset:
    builder = BUILDERS[files[0].suffix]
    # A CSV has no types: without this, the answer 007 is read as 7, and NA as missing
    beside = [column for names in BESIDE.values() for column in names]
    names = (*PROMPTS, *REPLIES, *beside, "instruction", "caption", "text")
    texts = (*(spelled for n in names for spelled in (n, n.capitalize(), n.upper())), text_column, *columns.values())
    options = {"converters": dict.fromkeys(texts, str), "keep_default_na": False} if builder == "csv" else {}
    datasets = []
    # Folder by folder, since paths of images are relative to the file they are written in
    folders = sorted({file.parent for file in files})
    for folder in folders:
        here = [str(file) for file in files if file.parent == folder]
        try:
            dataset = load_dataset(builder, data_files=here, split="train", **options)
            dataset.data.validate(full=True)  # texts in another encoding than UTF-8
            if builder == "json":
                dataset = _with_dates_as_texts(dataset, here)
            if builder == "text":
                dataset = dataset.filter(lambda row: row["text"].strip() != "", desc="Leaving empty lines out")
        except (DatasetGenerationError, StopIteration, ValueError) as error:  # the last two for files without rows
            reason = str(error.__cause__ or error) or "it has no rows"
            if "utf" in reason.lower():  # the decoder names bytes, not what to do
                reason = "its text is not UTF-8: save it in that encoding"
            raise DataError(f"{', '.join(here)}: cannot be read: {reason}") from error
        datasets.append(_ready(dataset, folder, name, text_column, columns, vision, always=len(folders) > 1))
    return concatenate_datasets(datasets) if len(datasets) > 1 else datasets[0]


def _with_dates_as_texts(dataset: Dataset, files: list[str]) -> Dataset:
    """
    Reads JSON once more where it has dates: Arrow takes a column for times if each text in it is one, as the answers
    of which all are `"1998-05-01"`, and no longer knows how they were written.
    """
    features = Features({name: _dates_as_texts(feature) for name, feature in dataset.features.items()})
    if features == dataset.features:
        return dataset
    rows: list[dict[str, Any]] = []
    for file in files:
        text = Path(file).read_text("utf-8-sig")
        if text.lstrip().startswith("["):
            rows += json.loads(text)
        else:
            rows += [json.loads(line) for line in text.split("\n") if line.strip()]
    return Dataset.from_list([{name: row.get(name) for name in features} for row in rows], features=features)


def _dates_as_texts(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _dates_as_texts(part) for name, part in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return type(feature)(_dates_as_texts(feature.feature))
    is_date = isinstance(feature, Value) and feature.dtype.startswith(("timestamp", "date", "time"))
    return Value("string") if is_date else feature
