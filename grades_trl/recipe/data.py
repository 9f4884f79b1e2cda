"""The user's own data: loaded, checked and brought into one shape before training starts.

The formats are TRL's own: `messages` (or ShareGPT's `conversations`), `prompt` and `completion` (both text or both
messages), or plain `text`, and `image` or `images` beside them for vision. Every row is looked at before the model is
loaded, so that a bad one costs seconds and is named by its number, not found after an hour.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    Image,
    Json,
    LargeList,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# The words by which `datasets` recognizes a split in the name of a folder or file
SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
ROLES = ("system", "user", "assistant", "tool")
MAX_OPENED = 2000  # rows whose pictures `check` opens
RGB = Image(mode="RGB")  # not every image processor takes gray, palette or transparent pictures
# Image tokens of models that do not write "<image>", in plain text prompts
OTHER_IMAGE_TOKEN = re.compile(r"<[^<>]*(image|img)[^<>]*>|\[IMG\]", re.IGNORECASE)


class DataError(ValueError):
    """The data cannot be trained on. The message names the split, the row, what was found and what was expected."""


def load(
    name: str,
    *,
    config: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    test_size: int | float = 0.1,
    seed: int = 42,
    vision: bool = False,
    text_column: str = "text",
) -> DatasetDict:
    """
    Loads a data set from the hub or from a local path, checks it, and brings it into one shape.

    Local data: a `.jsonl`, `.json`, `.parquet` or `.csv` file, a folder of such files (a split is recognized by
    `train`, `validation`, `test`, ... in the name of the folder or file, as `datasets` does), a folder of pictures
    with a `metadata.jsonl` or `metadata.csv` (its `file_name` becomes `image`), or a folder written by `save_to_disk`.
    Paths in `image` or `images` are relative to the file they are written in.

    The result has only the columns that TRL reads: `messages`, or `prompt` and `completion`, or `text` (where several
    are there, the first of these), `images` for vision, and `tools` and `chat_template_kwargs` beside messages. Null
    entries that Arrow adds to messages are taken out again: chat templates ask whether a key is there. Where a row has
    `{"type": "image"}` parts, all its user messages become lists of parts, as TRL needs. Pictures are decoded as RGB
    when they are read, not here.

    Args:
        name (`str`): id of a data set on the hub, or path of a local file or folder.
        config (`str`, *optional*): configuration of a data set on the hub.
        train_split (`str`, *optional*, defaults to `"train"`): split to train on.
        test_split (`str`, *optional*): split to test on. By default `test`, or else `validation`, or where there is
            neither, `test_size` of the training split.
        test_size (`int` or `float`, *optional*, defaults to `0.1`): rows (`int`) or share (`float`) of the training
            split that is held out where there is no test split.
        seed (`int`, *optional*, defaults to `42`): of the split into train and test, and of the order of the test
            rows, which a source may keep by topic; the same seed gives the same rows.
        vision (`bool`, *optional*, defaults to `False`): whether rows have pictures.
        text_column (`str`, *optional*, defaults to `"text"`): column that holds plain text. It is `text` in the
            result, since TRL adds the end-of-sequence token to that name only: leave
            `SFTConfig.dataset_text_field` as it is.

    Returns:
        [`~datasets.DatasetDict`]: `train` and `test`.

    Raises:
        [`DataError`]: if the path or split is not there, the files cannot be read, or [`check`] finds a fault. Row
            numbers are those of the source, before anything is held out.
    """
    splits = _read(name, config, text_column)
    for split in (train_split, test_split):
        if split is not None and split not in splits:
            raise DataError(f'{name}: there is no split "{split}"; there are: {", ".join(splits)}')
    if test_split is None:
        test_split = next((s for s in ("test", "validation") if s in splits and s != train_split), None)

    ready = []
    for split in (train_split, test_split) if test_split else (train_split,):
        dataset = splits[split]
        if "conversations" in dataset.column_names and "messages" not in dataset.column_names:
            dataset = dataset.map(_from_sharegpt, remove_columns="conversations", desc="Renaming roles")
        check(dataset, vision, name=split, text_column=text_column)
        ready.append(_shape(dataset, text_column))
    if test_split is not None:
        return DatasetDict(train=ready[0], test=ready[1].shuffle(seed=seed))
    try:
        return ready[0].train_test_split(test_size=test_size, seed=seed)
    except ValueError as error:
        raise DataError(f"{name}: cannot hold out test_size={test_size} of {len(ready[0])} rows: {error}") from error


def _from_sharegpt(example: dict[str, Any]) -> dict[str, Any]:
    """`from` and `value` as `role` and `content`, under the names that chat templates know."""
    turns = [
        (turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value"))
        for turn in example["conversations"]
    ]
    return {"messages": [{"role": SHAREGPT_ROLES.get(role, role), "content": content} for role, content in turns]}


def check(dataset: Dataset, vision: bool, name: str = "train", text_column: str = "text") -> None:
    """
    Looks at every row for what would stop or spoil the training. [`load`] calls it.

    The pictures of up to 2,000 rows are opened and decoded (with more rows: of 2,000 spread evenly). A picture that is
    broken in a row not looked at raises PIL's or the file system's own error in the data loader during training, which
    does not tell the row.

    Args:
        dataset ([`~datasets.Dataset`]): rows in one of the formats of [`load`].
        vision (`bool`): whether rows must have pictures (`image` or `images`). A row may have an empty list.
        name (`str`, *optional*, defaults to `"train"`): what the split is called in messages.
        text_column (`str`, *optional*, defaults to `"text"`): column that holds plain text.

    Raises:
        [`DataError`]: with the split, the number of the row (counted from 0), what was found and what was expected.
    """
    if len(dataset) == 0:
        raise DataError(f"{name}: the split is empty, expected at least one row")
    columns = dataset.column_names
    text_columns = _text_columns(columns, text_column)
    if not text_columns:
        raise DataError(
            f'{name}: expected a column "messages", or "prompt" and "completion", or "{text_column}"; '
            f"found: {', '.join(columns)}"
        )
    picture_column = next((c for c in ("images", "image") if c in columns), "")
    if picture_column and not vision:
        raise DataError(f'{name}: the rows have pictures (column "{picture_column}"): use recipes/sft_vlm.py')
    if vision and not picture_column:
        raise DataError(
            f'{name}: expected a column "image" or "images"; found: {", ".join(columns)}. '
            "For data without pictures use recipes/sft_text.py"
        )
    if vision and text_columns == [text_column]:
        raise DataError(
            f'{name}: TRL does not train on "{text_column}" with pictures, expected a column "messages", or "prompt" '
            'and "completion"'
        )

    counts = _picture_counts(dataset, picture_column) if vision else [0] * len(dataset)
    conversational = None
    rows = tqdm(dataset.select_columns(text_columns), desc=f"Checking {name}", delay=2, leave=False)
    for row, (example, count) in enumerate(zip(rows, counts, strict=True)):
        problem = _problem(example, text_columns, vision, count)
        # TRL asks the first row only
        this = isinstance(example[text_columns[0]], list)
        if conversational is None:
            conversational = this
        elif not problem and this != conversational:
            kinds = ("text", "messages")
            problem = f"is {kinds[this]}, but row 0 is {kinds[conversational]}, expected the same in every row"
        if problem:
            raise DataError(f"{name}: row {row} (the first is 0): {problem}")
    if vision:
        _open_pictures(dataset, picture_column, name)


def with_validation(splits: DatasetDict, limit: int | None = None) -> DatasetDict:
    """
    Halves the held-out rows: what decides during training must not be what the result is measured on.

    Args:
        splits ([`~datasets.DatasetDict`]): with `test`, as [`load`] returns it.
        limit (`int`, *optional*): rows in each half, at most.

    Returns:
        [`~datasets.DatasetDict`]: the same with `validation`, the first half of `test`, and `test`, the rest of it.

    Raises:
        [`DataError`]: if `test` has a single row.
    """
    held_out = splits["test"]
    if len(held_out) < 2:
        raise DataError(
            f"test: {len(held_out)} row is held out, expected at least 2: one half decides when training ends, the "
            "other half measures the result"
        )
    half = len(held_out) // 2
    end = len(held_out) if limit is None else min(len(held_out), half + limit)
    halves = {
        "validation": held_out.select(range(half if limit is None else min(half, limit))),
        "test": held_out.select(range(half, end)),
    }
    return DatasetDict({**splits, **halves})


def response_only(dataset: Dataset) -> Dataset:
    """
    Turns conversations into rows of which only the response is learned, under any chat template.

    A row of `messages` becomes one row of `prompt` and `completion` per assistant message: everything before it (the
    system message too), and this message alone. So every reply is learned once, each as the model will have to write
    it. A row of an earlier turn keeps the pictures whose placeholders are in its prompt; without explicit
    placeholders, TRL puts all pictures into the first user message, and every row keeps all. Messages after the last
    assistant message are not learned.

    `prompt` and `completion` stay as they are (TRL learns the completion only), and so does `text` (all of it is
    learned). `image` becomes `images`, a list of one. Pictures are not decoded; those stored in the data itself, not
    as files, are copied into the cache of `datasets` once per turn.

    Args:
        dataset ([`~datasets.Dataset`]): one split as [`load`] returns it.

    Returns:
        [`~datasets.Dataset`]: with `prompt` and `completion`, `images` if there were pictures, and `tools` and
            `chat_template_kwargs` if they were there.
    """
    dataset = _pictures_in_lists(dataset)
    if "messages" not in dataset.column_names:
        return dataset
    messages = dataset.features["messages"]
    others = {c: dataset.features[c] for c in ("tools", "chat_template_kwargs") if c in dataset.column_names}
    pictures = {"images": List(RGB)} if "images" in dataset.column_names else {}
    stored = Features({"messages": messages, **others})

    def expand(table: pa.Table) -> dict[str, list]:
        # The table is raw storage, in which pictures are paths or compressed bytes: only the text is decoded
        columns = stored.decode_batch({c: table[c].to_pylist() for c in stored})
        if pictures:
            columns["images"] = table["images"].to_pylist()
        rows: dict[str, list] = {c: [] for c in ("prompt", "completion", *others, *pictures)}
        for i, conversation in enumerate(columns["messages"]):
            explicit = _placeholders(conversation) > 0
            for turn, message in enumerate(conversation):
                if message["role"] != "assistant":
                    continue
                prompt = conversation[:turn]
                rows["prompt"].append(prompt)
                rows["completion"].append([message])
                for column in others:
                    rows[column].append(columns[column][i])
                if pictures:
                    images = columns["images"][i] or []
                    rows["images"].append(images[: _placeholders(prompt)] if explicit else images)
        return rows

    return (
        dataset.with_format("arrow")
        .map(
            expand,
            batched=True,
            batch_size=100,  # pictures stored in the data are in memory for one batch
            remove_columns=dataset.column_names,
            features=Features({"prompt": messages, "completion": messages, **others, **pictures}),
            desc="One row per response",
        )
        .with_format(None)
    )


def _read(name: str, config: str | None, text_column: str) -> dict[str, Dataset]:
    path = Path(name).expanduser()
    if not path.exists():
        if name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name or path.suffix in BUILDERS:
            raise DataError(f"{name}: there is no such file or folder")
        return {split: _with_pictures(dataset, Path()) for split, dataset in load_dataset(name, config).items()}
    if config is not None:
        raise DataError(f'{name}: is a local path, expected no config, got "{config}"')
    if (path / "dataset_dict.json").exists():
        return {split: _with_pictures(dataset, path) for split, dataset in load_from_disk(str(path)).items()}
    if (path / "state.json").exists():
        return {"train": _with_pictures(load_from_disk(str(path)), path)}

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
    return {split: _read_files(files, text_column) for split, files in splits.items()}


def _data_files(folder: Path) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in BUILDERS and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    # In a folder of pictures, this file is the data
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


def _read_files(files: list[Path], text_column: str) -> Dataset:
    builder = BUILDERS[files[0].suffix]
    # A CSV has no types: without this, the answer 007 is read as 7, and NA as missing
    columns = ("prompt", "completion", "text", text_column)
    options = {"converters": dict.fromkeys(columns, str), "keep_default_na": False} if builder == "csv" else {}
    datasets = []
    # Folder by folder, since paths of pictures are relative to the file they are written in
    for folder in sorted({file.parent for file in files}):
        here = [str(file) for file in files if file.parent == folder]
        try:
            dataset = load_dataset(builder, data_files=here, split="train", **options)
        except (DatasetGenerationError, StopIteration, ValueError) as error:  # the last two for files without rows
            reason = str(error.__cause__ or error) or "it has no rows"
            raise DataError(f"{', '.join(here)}: cannot be read: {reason}") from error
        datasets.append(_with_pictures(dataset, folder))
    return concatenate_datasets(datasets) if len(datasets) > 1 else datasets[0]


def _with_pictures(dataset: Dataset, folder: Path) -> Dataset:
    """`image` holds one picture a row and `images` a list, whatever they were called; paths become pictures."""
    for old, new in (("file_name", "image"), ("file_names", "images")):
        if old in dataset.column_names and new not in dataset.column_names:
            dataset = dataset.rename_column(old, new)
    if "images" in dataset.column_names and "image" in dataset.column_names:
        dataset = dataset.remove_columns("image")
    column = next((c for c in ("images", "image") if c in dataset.column_names), None)
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
        # The storage is the same: `cast` would copy every picture into the cache
        return Dataset(dataset.data, info=DatasetInfo(features=features), split=dataset.split)
    if isinstance(inner, Value) and inner.dtype in ("string", "large_string", "null"):
        return dataset.map(
            _resolve,
            batched=True,
            fn_kwargs={"column": column, "folder": str(folder.absolute())},
            features=features,
            desc="Finding pictures",
        )
    if inner == Value("binary") or (isinstance(inner, dict) and set(inner) <= {"bytes", "path"}):
        return dataset.cast(features)
    raise DataError(f'the column "{column}" should hold pictures or paths of pictures, found {feature}')


def _resolve(batch: dict[str, list], column: str, folder: str) -> dict[str, list]:
    def resolve(path: str | None) -> str | None:
        if not path:
            return None
        return path if "://" in path else str(Path(folder, path))

    if column == "image":
        return {column: [resolve(path) for path in batch[column]]}
    return {column: [[resolve(path) for path in paths or []] for paths in batch[column]]}


def _text_columns(columns: list[str], text_column: str) -> list[str]:
    if "messages" in columns:
        return ["messages"]
    if "prompt" in columns and "completion" in columns:
        return ["prompt", "completion"]
    return [text_column] if text_column in columns else []


def _picture_counts(dataset: Dataset, column: str) -> list[int]:
    counts = []
    for table in dataset.select_columns([column]).with_format("arrow").iter(1000):
        values = table[column]
        counts += (pc.is_valid(values) if column == "image" else pc.list_value_length(values)).to_pylist()
    return [int(count or 0) for count in counts]


def _problem(example: dict[str, Any], columns: list[str], vision: bool, count: int) -> str | None:
    values = [example[column] for column in columns]
    # Conversational or not is for TRL what the first column is
    if columns == ["messages"] or (len(columns) == 2 and isinstance(values[0], list)):
        for column, messages in zip(columns, values, strict=True):
            problem = _problem_in_messages(column, messages)
            if problem:
                return problem
        problem = _problem_in_turns(*values)
        return problem or (_problem_in_placeholders(values, count) if vision else None)
    for column, text in zip(columns, values, strict=True):
        if not isinstance(text, str) or not text.strip():
            return f"{column} is {_short(text)}, expected {'text' if column == columns[0] else 'text, as in prompt'}"
    # Other models than LLaVA have other tokens, which only their processors know
    found = values[0].count("<image>")
    if vision and found != count and (found or not OTHER_IMAGE_TOKEN.search(values[0])):
        return f'prompt has {found} "<image>" and the row has {count} images, expected as many'
    return None


def _problem_in_messages(column: str, messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f'{column} is {_short(messages)}, expected a list of {{"role": ..., "content": ...}}'
    for i, message in enumerate(messages):
        here = f"{column}[{i}]"
        if not isinstance(message, dict) or "role" not in message:
            return f'{here} is {_short(message)}, expected {{"role": ..., "content": ...}}'
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            return f"{here} has the role {_short(role)}, expected one of {', '.join(ROLES)}"
        if role == "assistant" and message.get("tool_calls") and not content:
            continue
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image" and role in ("assistant", "tool"):
                return f"{here} has an image, but its role is {role}: expected images in system or user messages"
            if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
                return (
                    f"{here} has the part {_short(part)}, "
                    'expected {"type": "text", "text": ...} or {"type": "image"}'
                )
        if not isinstance(content, (str, list)):
            return f"{here} has the content {_short(content)}, expected text or a list of parts"
        if role in ("user", "assistant") and not _text(content).strip() and not _placeholders([message]):
            return f"{here} has the content {_short(content)}, expected some text"
    return None


def _problem_in_turns(prompt: list[dict], completion: list[dict] | None = None) -> str | None:
    if completion is not None:
        if completion[-1]["role"] != "assistant":
            return f"completion ends with the role {completion[-1]['role']}, expected an assistant message"
        if prompt[-1]["role"] == "system":
            return "prompt ends with the role system, expected a user or tool message"
        return None
    roles = [message["role"] for message in prompt]
    if "assistant" not in roles:
        return f"messages has no assistant message, expected at least one; its roles are {', '.join(roles)}"
    turn = roles.index("assistant")
    if turn == 0 or roles[turn - 1] == "system":
        return f"messages[{turn}] is an assistant message without a prompt, expected a user message before it"
    return None


def _problem_in_placeholders(columns: list[list[dict]], count: int) -> str | None:
    messages = [message for column in columns for message in column]
    if any("<image>" in _text(message.get("content")) for message in messages):
        return 'the text of a message has "<image>", expected a part {"type": "image"} instead, or none at all'
    if len(columns) == 2 and _placeholders(columns[1]):
        return "completion has image placeholders, expected them in prompt only"
    found = _placeholders(messages)
    # Without any, TRL puts all images into the first user message, if that is a string
    implicit = not found and all(isinstance(m.get("content"), str) for m in messages if m["role"] == "user")
    if found != count and not implicit:
        return f'the messages have {found} {{"type": "image"}} parts and the row has {count} images, expected as many'
    return None


def _open_pictures(dataset: Dataset, column: str, name: str) -> None:
    pictures = dataset.select_columns([column]).with_format("arrow")
    looked_at = min(len(dataset), MAX_OPENED)
    for k in tqdm(range(looked_at), desc=f"Opening pictures of {name}", delay=2, leave=False):
        row = k * len(dataset) // looked_at
        (value,) = pictures[row][column].to_pylist()
        for i, picture in enumerate(value or [] if column == "images" else [value] if value else []):
            picture = picture if isinstance(picture, dict) else {"path": picture, "bytes": None}
            try:
                RGB.decode_example(picture)
            except Exception as error:  # PIL and its plugins raise all kinds
                where = picture["path"] or "stored in the data"
                raise DataError(
                    f"{name}: row {row} (the first is 0): image {i} ({where}) cannot be opened, expected a picture: "
                    f"{type(error).__name__}: {error}"
                ) from error


def _shape(dataset: Dataset, text_column: str) -> Dataset:
    columns = _text_columns(dataset.column_names, text_column)
    conversational = columns == ["messages"] or (
        len(columns) == 2 and isinstance(dataset.select_columns(columns)[0][columns[0]], list)
    )
    others = ["tools", "chat_template_kwargs"] if conversational else []
    kept = [c for c in (*columns, *others, "images", "image") if c in dataset.column_names]
    dataset = _pictures_in_lists(dataset.select_columns(kept))
    if columns == [text_column]:
        return dataset.rename_column(text_column, "text") if text_column != "text" else dataset

    if not conversational:
        return dataset
    plain = List({"role": Value("string"), "content": Value("string")})
    unclean = [c for c in columns + others if c in kept and dataset.features[c] != plain]
    if not unclean:
        return dataset
    clean = dataset.select_columns(unclean).map(
        _clean, features=Features({column: Json() for column in unclean}), desc="Cleaning messages"
    )
    rest = [c for c in dataset.column_names if c not in unclean]
    # Side by side, since `map` would copy the pictures
    return concatenate_datasets([clean, dataset.select_columns(rest)], axis=1) if rest else clean


def _clean(example: dict[str, Any]) -> dict[str, Any]:
    example = {column: _without_null(value) for column, value in example.items()}
    conversations = [example[c] for c in ("messages", "prompt", "completion") if c in example]
    explicit = any(_placeholders(messages) for messages in conversations)
    for messages in conversations:
        for message in messages:
            if isinstance(message.get("content"), list):
                # An image in the part itself would not be counted as a placeholder by TRL
                message["content"] = [
                    {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}
                    for part in message["content"]
                ]
            elif explicit and message["role"] == "user":
                # TRL would put all images once more into the first user message that is a string
                message["content"] = [{"type": "text", "text": message["content"]}]
    if "chat_template_kwargs" in example:
        example["chat_template_kwargs"] = example["chat_template_kwargs"] or {}
    return example


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _pictures_in_lists(dataset: Dataset) -> Dataset:
    column = next((c for c in ("images", "image") if c in dataset.column_names), None)
    if column is None or (column == "images" and not dataset.data.column("images").null_count):
        return dataset

    def wrap(table: pa.Table) -> dict[str, list]:
        values = table[column].to_pylist()
        return {"images": [value or [] if column == "images" else [value] if value else [] for value in values]}

    pictures = dataset.select_columns([column]).with_format("arrow")
    pictures = pictures.map(
        wrap,
        batched=True,
        batch_size=100,
        remove_columns=[column],
        features=Features({"images": List(RGB)}),
        desc="Listing pictures",
    )
    return concatenate_datasets([dataset.remove_columns(column), pictures.with_format(None)], axis=1)


def _placeholders(messages: list[dict]) -> int:
    contents = [message.get("content") for message in messages]
    return sum(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)


def _text(content: str | list[dict] | None) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
