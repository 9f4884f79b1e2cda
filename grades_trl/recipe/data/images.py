"""The column of images: paths or bytes become decodable images, in the column and shape that TRL reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, Image, LargeList, List, Value, concatenate_datasets
from tqdm.auto import tqdm

from .errors import DataError

MAX_OPENED = 2000  # rows whose images `open_images` opens
RGB = Image(mode="RGB")  # not every image processor takes gray, palette or transparent images


def image_column(columns: list[str]) -> str | None:
    """`"images"`, or else `"image"`, or `None` where the rows have no images."""
    return next((column for column in ("images", "image") if column in columns), None)


def read_images(dataset: Dataset, folder: Path) -> Dataset:
    """
    Makes a column of paths, bytes or images decodable, whatever it was called.

    Args:
        dataset ([`~datasets.Dataset`]): rows with a column `image`, `images`, `file_name` or `file_names`, or without.
        folder (`Path`): relative paths start here.

    Returns:
        [`~datasets.Dataset`]: with one image per row in `image`, or a list of images per row in `images`.

    Raises:
        [`DataError`]: the column holds something else.
    """
    for old, new in (("file_name", "image"), ("file_names", "images")):
        if old in dataset.column_names and new not in dataset.column_names:
            dataset = dataset.rename_column(old, new)
    if "images" in dataset.column_names and "image" in dataset.column_names:
        dataset = dataset.remove_columns("image")
    column = image_column(dataset.column_names)
    if column is None:
        return dataset

    feature = dataset.features[column]
    is_list = isinstance(feature, (List, LargeList))
    inner = feature.feature if is_list else feature
    if column != ("images" if is_list else "image"):
        dataset = dataset.rename_column(column, "images" if is_list else "image")
        column = "images" if is_list else "image"
    features = dataset.features.copy()
    features[column] = List(RGB) if is_list else RGB

    if isinstance(inner, Image):
        # The storage is the same: `cast` would copy every image into the cache
        return Dataset(dataset.data, info=DatasetInfo(features=features), split=dataset.split)
    if isinstance(inner, Value) and inner.dtype in ("string", "large_string", "null"):
        return dataset.map(
            _absolute_paths,
            batched=True,
            fn_kwargs={"column": column, "folder": str(folder.absolute())},
            features=features,
            desc="Finding images",
        )
    if inner == Value("binary") or (isinstance(inner, dict) and set(inner) <= {"bytes", "path"}):
        return dataset.cast(features)
    raise DataError(f'the column "{column}" should hold images or paths of images, found {feature}')


def _absolute_paths(batch: dict[str, list], column: str, folder: str) -> dict[str, list]:
    def absolute(path: str | None) -> str | None:
        if not path:
            return None
        return path if "://" in path else str(Path(folder, path))

    if column == "image":
        return {column: [absolute(path) for path in batch[column]]}
    return {column: [[absolute(path) for path in paths or []] for paths in batch[column]]}


def images_in_lists(dataset: Dataset) -> Dataset:
    """`image` becomes `images`, a list of one; a row without images gets an empty list. Nothing is decoded."""
    column = image_column(dataset.column_names)
    if column is None or (column == "images" and not dataset.data.column("images").null_count):
        return dataset

    def wrap(table: pa.Table) -> dict[str, list]:
        values = table[column].to_pylist()
        return {"images": [value or [] if column == "images" else [value] if value else [] for value in values]}

    images = dataset.select_columns([column]).with_format("arrow")
    images = images.map(
        wrap,
        batched=True,
        batch_size=100,
        remove_columns=[column],
        features=Features({"images": List(RGB)}),
        desc="Listing images",
    )
    return concatenate_datasets([dataset.remove_columns(column), images.with_format(None)], axis=1)


def count_images(dataset: Dataset, column: str) -> list[int]:
    """Images of each row."""
    counts = []
    for table in dataset.select_columns([column]).with_format("arrow").iter(1000):
        values = table[column]
        counts += (pc.is_valid(values) if column == "image" else pc.list_value_length(values)).to_pylist()
    return [int(count or 0) for count in counts]


def open_images(dataset: Dataset, column: str, name: str) -> None:
    """Opens and decodes the images of up to `MAX_OPENED` rows, spread evenly over the dataset.

    Raises:
        [`DataError`]: an image cannot be opened; with the row and the path.
    """
    images = dataset.select_columns([column]).with_format("arrow")
    opened = min(len(dataset), MAX_OPENED)
    for k in tqdm(range(opened), desc=f"Opening images of {name}", delay=2, leave=False, disable=None):
        row = k * len(dataset) // opened
        (value,) = images[row][column].to_pylist()
        of_row: list[Any] = (value or []) if column == "images" else [value] if value else []
        for i, image in enumerate(of_row):
            image = image if isinstance(image, dict) else {"path": image, "bytes": None}
            try:
                RGB.decode_example(image)
            except Exception as error:  # PIL and its plugins raise all kinds
                where = image["path"] or "stored in the data"
                raise DataError(
                    f"{name}: row {row} (the first is 0): image {i} ({where}) cannot be opened, expected an image: "
                    f"{type(error).__name__}: {error}"
                ) from error
