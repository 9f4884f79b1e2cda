"""The formats of rows, and how each becomes the one that a run is trained on.

A format of another tool is first brought into one of TRL's (`to_trl_format`, one function per format), so that it is
checked like them. After the check, `clean` keeps the columns that TRL reads. `to_prompt_completion` then makes one row
per reply, of which only the reply is learned.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Json, List, Value, concatenate_datasets

from .images import RGB, image_column, images_in_lists

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
ROLES = ("system", "developer", "user", "assistant", "tool")
# OpenAI's name of the system role; chat templates know the older one.
SYSTEM_ROLES = ("system", "developer")


def text_columns(columns: list[str], text_column: str) -> list[str]:
    """The columns of TRL's format that the rows are in: `messages`, or `prompt` and `completion`, or `text_column`
    (where several are there, the first of these). Empty if it is none of them."""
    if "messages" in columns:
        return ["messages"]
    if "prompt" in columns and "completion" in columns:
        return ["prompt", "completion"]
    return [text_column] if text_column in columns else []


def to_trl_format(dataset: Dataset) -> Dataset:
    """A format of another tool as one of TRL's, row by row. Rows of TRL's formats stay as they are."""
    if "conversations" in dataset.column_names and "messages" not in dataset.column_names:
        return dataset.map(from_sharegpt, remove_columns="conversations", desc="Renaming roles")
    return dataset


def from_sharegpt(example: dict[str, Any]) -> dict[str, Any]:
    """`from` and `value` as `role` and `content`, under the names that chat templates know."""
    turns = [
        (turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value"))
        for turn in example["conversations"]
    ]
    return {"messages": [{"role": SHAREGPT_ROLES.get(role, role), "content": content} for role, content in turns]}


def clean(dataset: Dataset, text_column: str, keep: Collection[str] = ()) -> Dataset:
    """
    Keeps the columns that TRL reads, with messages as chat templates expect them.

    Null entries that Arrow adds to messages are taken out again: chat templates ask whether a key is there. A
    `developer` becomes a `system`. Where a row has `{"type": "image"}` parts, all its user messages become lists of
    parts, as TRL needs.

    Args:
        dataset ([`~datasets.Dataset`]): checked rows in one of TRL's formats.
        text_column (`str`): column that holds plain text. It is called `text` in the result.
        keep (`Collection[str]`, *optional*): columns to keep beside those that TRL reads.
    """
    columns = text_columns(dataset.column_names, text_column)
    conversational = columns == ["messages"] or (
        len(columns) == 2 and isinstance(dataset.select_columns(columns)[0][columns[0]], list)
    )
    others = ["tools", "chat_template_kwargs"] if conversational else []
    kept = [c for c in (*columns, *others, "images", "image", *keep) if c in dataset.column_names]
    dataset = images_in_lists(dataset.select_columns(kept))
    if columns == [text_column]:
        return dataset.rename_column(text_column, "text") if text_column != "text" else dataset

    if not conversational:
        return dataset
    plain = List({"role": Value("string"), "content": Value("string")})
    unclean = [
        column
        for column in columns + others
        if column in kept and (dataset.features[column] != plain or _has_developer(dataset, column))
    ]
    if not unclean:
        return dataset
    cleaned = dataset.select_columns(unclean).map(
        _clean, features=Features({column: Json() for column in unclean}), desc="Cleaning messages"
    )
    rest = [c for c in dataset.column_names if c not in unclean]
    # Side by side, since `map` would copy the images
    return concatenate_datasets([cleaned, dataset.select_columns(rest)], axis=1) if rest else cleaned


def _has_developer(dataset: Dataset, column: str) -> bool:
    tables = dataset.select_columns([column]).with_format("arrow").iter(1000)
    return any(pc.any(pc.equal(_roles(table[column]), "developer")).as_py() for table in tables)


def _roles(messages: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.struct_field(pc.list_flatten(messages), "role")


def _clean(example: dict[str, Any]) -> dict[str, Any]:
    example = {column: _without_null(value) for column, value in example.items()}
    conversations = [example[c] for c in ("messages", "prompt", "completion") if c in example]
    explicit = any(count_placeholders(messages) for messages in conversations)
    for messages in conversations:
        for message in messages:
            if message["role"] in SYSTEM_ROLES:
                message["role"] = "system"
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


def to_prompt_completion(dataset: Dataset, keep: Collection[str] = ()) -> Dataset:
    """
    Turns conversations into rows of which only the reply is learned, under any chat template.

    A row of `messages` becomes one row of `prompt` and `completion` per assistant message: everything before it (the
    system message too), and this message alone. So every reply is learned once, each as the model will have to write
    it. A row of an earlier turn keeps the images whose placeholders are in its prompt. Without explicit placeholders,
    TRL puts all images into the first user message, and every row keeps all. Messages after the last assistant message
    are not learned.

    `prompt` and `completion` stay as they are (TRL learns the completion only), and so does `text` (all of it is
    learned). `image` becomes `images`, a list of one. Images are not decoded; those stored in the data itself, not as
    files, are copied into the cache of `datasets` once per turn.

    Args:
        dataset ([`~datasets.Dataset`]): one split as [`load`] returns it.
        keep (`Collection[str]`, *optional*): columns to keep beside those that TRL reads.

    Returns:
        [`~datasets.Dataset`]: with `prompt` and `completion`, `images` if there were images, `tools` and
            `chat_template_kwargs` if they were there, and `keep`.
    """
    dataset = images_in_lists(dataset)
    if "messages" not in dataset.column_names:
        return dataset
    messages = dataset.features["messages"]
    others = {c: dataset.features[c] for c in ("tools", "chat_template_kwargs", *keep) if c in dataset.column_names}
    images = {"images": List(RGB)} if image_column(dataset.column_names) else {}
    stored = Features({"messages": messages, **others})

    def expand(table: pa.Table) -> dict[str, list]:
        # The table is raw storage, in which images are paths or compressed bytes: only the text is decoded
        columns = stored.decode_batch({c: table[c].to_pylist() for c in stored})
        if images:
            columns["images"] = table["images"].to_pylist()
        rows: dict[str, list] = {c: [] for c in ("prompt", "completion", *others, *images)}
        for i, conversation in enumerate(columns["messages"]):
            explicit = count_placeholders(conversation) > 0
            for turn, message in enumerate(conversation):
                if message["role"] != "assistant":
                    continue
                prompt = conversation[:turn]
                rows["prompt"].append(prompt)
                rows["completion"].append([message])
                for column in others:
                    rows[column].append(columns[column][i])
                if images:
                    of_row = columns["images"][i] or []
                    rows["images"].append(of_row[: count_placeholders(prompt)] if explicit else of_row)
        return rows

    return (
        dataset.with_format("arrow")
        .map(
            expand,
            batched=True,
            batch_size=100,  # images stored in the data are in memory for one batch
            remove_columns=dataset.column_names,
            features=Features({"prompt": messages, "completion": messages, **others, **images}),
            desc="One row per reply",
        )
        .with_format(None)
    )


def count_placeholders(messages: list[dict]) -> int:
    """`{"type": "image"}` parts in the messages."""
    contents = [message.get("content") for message in messages]
    return sum(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)


def text_of_content(content: str | list[dict] | None) -> str:
    """The text of a message: of its text parts where it is a list."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content or ""
