"""Images, from a column or from inside of messages, in the column and shape that TRL reads."""

from __future__ import annotations

import base64
import binascii
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, Image, Json, LargeList, List, Value, concatenate_datasets
from datasets.features.features import register_feature
from tqdm.auto import tqdm

from .errors import DataError

MAX_OPENED = 2000  # rows whose images `open_images` opens
IMAGE_STORAGE = {"bytes": Value("binary"), "path": Value("string")}
# How PNG, JPEG, GIF and WebP begin in base64: such texts are images, not paths
BASE64_STARTS = ("iVBOR", "/9j/", "R0lGOD", "UklGR")
SAVE_AS_8_BITS = "save it with 8 bits per pixel, scaled to the range that it uses"
OTHER_NAMES = {"file_name": "image", "file_names": "images", "image_path": "image", "image_paths": "images"}
# In place of the path of an image that cannot be read, with what is wrong: the check names the row
PROBLEM = "problem://"


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    An image as every image processor takes it. Pillow's `convert("RGB")` alone would make images with more than 8 bits
    per pixel all white or all black, and show the colors that are hidden under transparency.

    Args:
        image (`PIL.Image.Image`): transparent parts become white. Of 16 bits, the upper 8 are kept.

    Raises:
        ValueError: the range of its pixels is not known.
    """
    if image.mode in ("I", "F"):
        kind = "integers of 32 bits" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind}, of which black and white are not known: {SAVE_AS_8_BITS}")
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        if 0 < pixels.max() < 4096:
            raise ValueError(
                f"its pixels have 16 bits, and the brightest is {pixels.max():,} of 65,535, as in images of 12 bits, "
                f"so that it would be almost black: {SAVE_AS_8_BITS}"
            )
        return PIL.Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(white, image).convert("RGB")


@dataclass
class RGBImage(Image):
    """A column of images that are decoded by [`to_rgb`], wherever they are read: in training, in the preview, for
    answers and for scores. Stored are their paths, or their bytes as they are in the file."""

    _type: str = field(default="RGBImage", init=False, repr=False)

    def decode_example(self, value: dict, token_per_repo_id: dict | None = None) -> PIL.Image.Image:
        """
        Raises:
            [`DataError`]: the range of its pixels is not known.
        """
        image = super().decode_example(value, token_per_repo_id)
        try:
            return to_rgb(image)
        except ValueError as error:
            where = value["path"] or "stored in the data"
            raise DataError(f"image ({where}) cannot be shown to a model: {error}") from error


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "'register_feature' is experimental")
    # `datasets` writes the types of columns into its tables, and looks them up by name when it reads them
    register_feature(RGBImage, "RGBImage")
RGB = RGBImage()


def image_column(columns: list[str]) -> str | None:
    """`"images"`, or else `"image"`, or `None` where the rows have no images."""
    return next((column for column in ("images", "image") if column in columns), None)


def read_images(dataset: Dataset, folder: Path) -> Dataset:
    """
    Makes a column of paths, bytes or images decodable, whatever it was called.

    Args:
        dataset ([`~datasets.Dataset`]): rows with a column `image` or `images`, under this name or one of
            `OTHER_NAMES`, or without.
        folder (`Path`): relative paths start here, or else in the current folder.

    Returns:
        [`~datasets.Dataset`]: with one image per row in `image`, or a list of images per row in `images`.

    Raises:
        [`DataError`]: the column holds something else, or a row has both.
    """
    if image_column(dataset.column_names) is None:
        for old, new in OTHER_NAMES.items():
            if old in dataset.column_names and new not in dataset.column_names:
                dataset = dataset.rename_column(old, new)
    if "images" in dataset.column_names and "image" in dataset.column_names:
        return _of_both_columns(dataset, folder)
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
    is_storage = isinstance(inner, dict) and set(inner) <= {"bytes", "path"} and inner.get("bytes") == Value("binary")
    if inner == Value("binary") or is_storage:
        return dataset.cast(features)
    of_text = isinstance(inner, Value) and inner.dtype in ("string", "large_string", "null")
    if not (of_text or isinstance(inner, (Json, dict))):
        raise DataError(f'the column "{column}" should hold images or paths of images, found {feature}')
    # Lists wherever it can be either, as in LLaVA's files: one path, or a list of them
    to = "images" if is_list or isinstance(inner, Json) else "image"
    return dataset.map(
        _to_storage,
        batched=True,
        fn_kwargs={"column": column, "to": to, "folders": image_folders(folder)},
        remove_columns=[column],
        features=Features(
            {**{c: f for c, f in features.items() if c != column}, to: List(RGB) if to == "images" else RGB}
        ),
        desc="Finding images",
    )


def _of_both_columns(dataset: Dataset, folder: Path) -> Dataset:
    """Rows of which some have `image` and others have `images`."""
    one, several = (images_in_lists(read_images(dataset.select_columns([c]), folder)) for c in ("image", "images"))
    pairs = zip(count_images(one, "images"), count_images(several, "images"), strict=True)
    both = next((row for row, counts in enumerate(pairs) if all(counts)), None)
    if both is not None:
        raise DataError(
            f'row {both} (the first is 0) has images in "image" and in "images", expected one of the two: remove a '
            "column, or name the one that is meant, as in --columns images=images"
        )

    def merge(table: pa.Table) -> dict[str, list]:
        rows = zip(table["images"].to_pylist(), table["image"].to_pylist(), strict=True)
        return {"images": [images or image for images, image in rows]}

    images = _to_images(concatenate_datasets([one.rename_column("images", "image"), several], axis=1), merge)
    rest = dataset.remove_columns(["image", "images"])
    return concatenate_datasets([rest, images], axis=1) if rest.column_names else images


def image_folders(folder: Path) -> list[str]:
    """Where relative paths of images start: beside the data file, as in `datasets`, or else in the current folder, as
    in ms-swift, axolotl and LLaMA-Factory's v1 files."""
    return [str(folder.absolute()), str(Path.cwd())]


def _to_storage(batch: dict[str, list], column: str, to: str, folders: Sequence[str]) -> dict[str, list]:
    def stored(value: Any) -> Any:
        image, problem = to_image(value, folders)
        return {"bytes": None, "path": f"{PROBLEM}{problem}"} if problem else image

    if to == "image":
        return {to: [stored(value) if value else None for value in batch[column]]}
    rows = [value if isinstance(value, list) else [value] if value else [] for value in batch[column]]
    return {to: [[stored(value) for value in row if value] for row in rows]}


def to_image(value: Any, folders: Sequence[str] = ("",)) -> tuple[dict[str, Any] | None, str | None]:
    """
    An image as `datasets` stores it.

    Args:
        value: path, `file://` address, data URL, base64, bytes, PIL image, array; or a dict with one of these under
            `url`, `path`, `bytes`, `base64`, `data` or `image`.
        folders (`Sequence[str]`, *optional*): relative paths start in the first of these that has the file.

    Returns:
        `tuple[dict | None, str | None]`: `bytes` and `path`, or else what is wrong with it.
    """
    if isinstance(value, dict):
        keys = ("bytes", "base64", "data", "image", "url", "path")
        value = next((value[key] for key in keys if value.get(key) is not None), None)
    if not isinstance(value, str):
        if value is None or isinstance(value, (bool, int, float, list, dict)):
            return None, f"has an image that is {value!r:.80}, expected a path, a data URL, bytes or an image"
        return {"bytes": None, "path": None, **Image().encode_example(value)}, None
    if value.startswith(("http://", "https://")):
        return None, (
            f"has the image {value[:80]}: nothing is downloaded during training, so that no step waits for a network. "
            "Download the images, and put their paths here"
        )
    if value.startswith("data:") or (len(value) > 256 and value.startswith(BASE64_STARTS)):
        data = value.partition(";base64,")[2] if value.startswith("data:") else value
        try:
            stored = base64.b64decode(data, validate=True)
        except binascii.Error:
            stored = b""
        if not stored:
            return None, f"has the image {value[:40]}..., expected data:image/png;base64,... with its data"
        return {"bytes": stored, "path": None}, None
    value = value.removeprefix("file://")
    if "://" in value:
        return {"bytes": None, "path": value}, None
    paths = [Path(folder, value) for folder in folders]
    return {"bytes": None, "path": str(next((path for path in paths if path.exists()), paths[0]))}, None


def take_inline_images(dataset: Dataset, column: str) -> Dataset:
    """
    The images that were inside of messages, as `images` of the row, and without the column that held them.

    A row that has images of its own in `image` or `images` keeps those: some tools write them twice.
    """
    inline = [count > 0 for count in count_images(dataset, column)]
    rest = dataset.remove_columns(column)
    if not any(inline):
        return rest
    own = image_column(rest.column_names)
    if own is None:
        return dataset.rename_column(column, "images").cast_column("images", List(RGB))
    rest = images_in_lists(rest)

    def merge(table: pa.Table) -> dict[str, list]:
        pairs = zip(table["images"].to_pylist(), table[column].to_pylist(), strict=True)
        return {"images": [images or taken for images, taken in pairs]}

    both = concatenate_datasets([rest.select_columns(["images"]), dataset.select_columns([column])], axis=1)
    return concatenate_datasets([rest.remove_columns("images"), _to_images(both, merge)], axis=1)


def images_in_lists(dataset: Dataset) -> Dataset:
    """`image` becomes `images`, a list of one; a row without images gets an empty list. Nothing is decoded."""
    column = image_column(dataset.column_names)
    if column is None or (column == "images" and not dataset.data.column("images").null_count):
        return dataset

    def wrap(table: pa.Table) -> dict[str, list]:
        values = table[column].to_pylist()
        return {"images": [value or [] if column == "images" else [value] if value else [] for value in values]}

    images = _to_images(dataset.select_columns([column]), wrap)
    return concatenate_datasets([dataset.remove_columns(column), images], axis=1)


def _to_images(dataset: Dataset, listed: Callable[[pa.Table], dict[str, list]]) -> Dataset:
    """The one column `images` that a function makes of all columns, as they are stored."""
    rows = dataset.with_format("arrow").map(
        listed,
        batched=True,
        batch_size=100,
        remove_columns=dataset.column_names,
        features=Features({"images": List(RGB)}),
        desc="Listing images",
    )
    return rows.with_format(None)


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
    for start, table in zip(range(0, len(dataset), 1000), images.iter(1000), strict=True):
        _raise_problem(table[column], name, start)
    opened = min(len(dataset), MAX_OPENED)
    for k in tqdm(range(opened), desc=f"Opening images of {name}", delay=2, leave=False, disable=None):
        row = k * len(dataset) // opened
        (value,) = images[row][column].to_pylist()
        of_row: list[Any] = (value or []) if column == "images" else [value] if value else []
        for i, image in enumerate(of_row):
            image = image if isinstance(image, dict) else {"path": image, "bytes": None}
            try:
                RGB.decode_example(image)
            except DataError as error:
                raise DataError(f"{name}: row {row} (the first is 0): {error}") from error
            except Exception as error:  # PIL and its plugins raise all kinds
                where = image["path"] or "stored in the data"
                raise DataError(
                    f"{name}: row {row} (the first is 0): image {i} ({where}) cannot be opened, expected an image: "
                    f"{type(error).__name__}: {error}"
                ) from error


def _raise_problem(images: pa.ChunkedArray, name: str, start: int) -> None:
    """Raises what `to_image` has found wrong with one of these images, which begin at row `start`."""
    stored = pc.list_flatten(images) if pa.types.is_list(images.type) else images
    if not pa.types.is_struct(stored.type):
        return
    if not pc.any(pc.starts_with(pc.struct_field(stored, "path"), PROBLEM)).as_py():
        return
    for row, value in enumerate(images.to_pylist(), start):
        for image in value if isinstance(value, list) else [value]:
            if image and (image["path"] or "").startswith(PROBLEM):
                raise DataError(f"{name}: row {row} (the first is 0): {image['path'].removeprefix(PROBLEM)}")
