"""The formats of rows, and how each becomes one of TRL's.

`FORMATS` is the table of what other tools write: the columns by which a format is recognized, and the function that
makes messages of a row. `to_trl_format` applies it as a file is read, so that all rows are checked alike
(`checks.py`). After the check, `clean` keeps the columns that TRL reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Json, LargeList, List, Value, concatenate_datasets

from .errors import DataError
from .images import IMAGE_STORAGE, OTHER_NAMES, image_folders, images_in_lists, take_inline_images, to_image
from .marks import marks_of, take_marks

ROLES = ("system", "developer", "user", "assistant", "tool")
# OpenAI's name of the system role; chat templates know the older one.
SYSTEM_ROLES = ("system", "developer")
# What the roles are called in the files of other tools
USERS = ("human", "question", "instruction", "input")
ASSISTANTS = ("gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai", "claude", "answer")
TOOLS = ("observation", "tool_response", "tool_result", "function", "function_response", "ipython")
ROLE_NAMES = dict.fromkeys(USERS, "user") | dict.fromkeys(ASSISTANTS, "assistant") | dict.fromkeys(TOOLS, "tool")
CALLS = ("function_call", "tool_call")  # roles of an assistant's call, as JSON in the text

PROMPTS = ("prompt", "question", "query", "problem", "input", "user")
REPLIES = (
    *("completion", "response", "answer", "output", "solution", "reply", "assistant"),
    *("generation", "generated_solution"),  # axolotl's metharme; OpenMathReasoning
)
CAPTIONS = ("caption", "text")
# Columns beside those that a format is recognized by, with their other names
BESIDE = {"input": ("input", "context", "article"), "system": ("system", "system_prompt"), "history": ("history",)}
# Where a text is: in which of a format's columns, and under which keys of a turn
TEXTS = ("prompt", "reply", "input", "system")
TEXT_KEYS = ("content", "value", "human", "user", "question", "assistant", "gpt", "bot", "answer")
# What `--columns` may name, and what it leaves beside the named columns
MAPPED = ("messages", "prompt", "completion", "text", "image", "images", "input", "system", "history", "tools")
KEPT_IMAGES = ("image", "images", *OTHER_NAMES)  # where `--columns` names no images
KEPT = (*KEPT_IMAGES, "tools", "chat_template_kwargs", "system", "history")


def text_columns(columns: list[str], text_column: str) -> list[str]:
    """The columns of TRL's format that the rows are in: `messages`, or `prompt` and `completion`, or `text_column`
    (where several are there, the first of these). Empty if it is none of them."""
    if "messages" in columns:
        return ["messages"]
    if "prompt" in columns and "completion" in columns:
        return ["prompt", "completion"]
    return [text_column] if text_column in columns else []


def parse_columns(given: Sequence[str] | None) -> dict[str, str]:
    """`--columns`: the names of columns in the file, by what they stand for.

    Raises:
        [`DataError`]: a word is not of the form `prompt=question`, or its left side is no column that is read.
    """
    mapped: dict[str, str] = {}
    for word in given or ():
        ours, equals, theirs = word.partition("=")
        if not (ours and equals and theirs):
            raise DataError(f"--columns {word}: expected NAME=COLUMN OF THE FILE, as in prompt=question")
        if ours not in MAPPED:
            raise DataError(f"--columns {word}: {ours} is not read; expected one of {', '.join(MAPPED)}")
        if ours in mapped:
            raise DataError(f"--columns {word}: {ours} is given twice")
        mapped[ours] = theirs
    return mapped


def rename_columns(dataset: Dataset, columns: dict[str, str], name: str) -> Dataset:
    """
    The columns that `--columns` names, under the names they stand for, and `KEPT`; all others are dropped.

    A prompt and a completion that are text become a question and its answer (`from_pair`), for the chat template.

    Raises:
        [`DataError`]: a column is not in the file.
    """
    if not columns:
        return dataset
    missing = [theirs for theirs in columns.values() if theirs not in dataset.column_names]
    if missing:
        raise DataError(
            f"{name}: --columns names {', '.join(missing)}; the columns are: {', '.join(dataset.column_names)}"
        )
    given = KEPT_IMAGES if {"image", "images"} & {*columns} else ()
    kept = [c for c in KEPT if c in dataset.column_names and c not in columns and c not in given]
    renamed = dataset.select_columns(list(dict.fromkeys([*columns.values(), *kept])))
    # In two steps: a swap such as input=output output=input would meet a name that is taken
    of_file = {theirs: f"\0{theirs}" for theirs in columns.values()}
    renamed = renamed.rename_columns(of_file)
    chat = all(
        ours in columns and not isinstance(dataset.features[columns[ours]], (List, LargeList, Json))
        for ours in ("prompt", "completion")
    )
    names = {"prompt": "instruction", "completion": "output"} if chat else {}
    return renamed.rename_columns({f"\0{theirs}": names.get(ours, ours) for ours, theirs in columns.items()})


# One function per format: what is in the columns of a row, and the messages that they make


def from_sharegpt(row: dict[str, Any]) -> Any:
    """ShareGPT, LLaVA, LLaMA-Factory: `conversations`, a list of `from` and `value`, or of `role` and `content`."""
    return row["conversations"]


def from_turn_pairs(row: dict[str, Any]) -> Any:
    """ms-swift's `conversation` (of `human` and `assistant`), the `texts` of the Cauldron (of `user` and `assistant`):
    a prompt and its reply in one turn."""
    if not isinstance(row["pairs"], list):
        return row["pairs"]
    messages: list[Any] = []
    for pair in row["pairs"]:
        prompt = next((pair[key] for key in ("human", "user", "question") if key in pair), None)
        reply = next((pair[key] for key in ("assistant", "gpt", "bot", "answer") if key in pair), None)
        messages += [pair] if prompt is reply is None else [_turn("user", prompt), _turn("assistant", reply)]
    return messages


def from_pair(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Alpaca (`instruction`, `input`, `output`), and a question with its answer under any of their names; earlier
    questions with their answers in `history`."""
    messages = []
    for pair in row.get("history") or []:
        is_pair = isinstance(pair, list) and len(pair) == 2
        messages += [_turn("user", pair[0]), _turn("assistant", pair[1])] if is_pair else [pair]
    given = [_text(row["prompt"]), _text(row.get("input"))]
    prompt = "\n".join(part for part in given if part) if all(isinstance(g, str | None) for g in given) else given[0]
    return [*messages, _turn("user", prompt), _turn("assistant", _text(row["reply"]))]


def from_caption(row: dict[str, Any]) -> list[dict[str, Any]]:
    """An image and its text, as in folders of images and in data for OCR: the image alone is the prompt."""
    return [_turn("user", [{"type": "image"}]), _turn("assistant", row["reply"])]


# Name: the columns that it is recognized by, with their other names, and its function. The first that fits is taken.
FORMATS: dict[str, tuple[dict[str, tuple[str, ...]], Callable[[dict[str, Any]], Any]]] = {
    "sharegpt": ({"conversations": ("conversations",)}, from_sharegpt),
    "turn pairs": ({"pairs": ("conversation", "texts")}, from_turn_pairs),
    "alpaca": ({"prompt": ("instruction",), "reply": REPLIES}, from_pair),
    "question and answer": ({"prompt": PROMPTS, "reply": REPLIES}, from_pair),
    "caption": ({"image": ("image", "images"), "reply": CAPTIONS}, from_caption),
}


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) else value  # an answer of numbers only


def recognize(dataset: Dataset, vision: bool, text_column: str = "text") -> tuple[str, dict[str, str]] | None:
    """
    The format of another tool that the rows are in, by their columns.

    Returns:
        `tuple[str, dict[str, str]]`: its name in `FORMATS`, and the columns by what they stand for; `None` for TRL's
            own formats (but not for texts that have a system message or earlier turns beside them), and for columns
            that are no format.

    Raises:
        [`DataError`]: several columns could be the same thing.
    """
    columns = dataset.column_names
    own = text_columns(columns, text_column)
    # `text` beside the columns of another format is what they were made into for another model
    if own and (own != [text_column] or text_column != "text"):
        # Texts have no place for a system message or earlier turns: with these, they are a question and its answer.
        # The columns decide, and not what is in them, so that all files and splits become the same
        turns = {what: named[0] for what in ("system", "history") if (named := _named(columns, BESIDE[what]))}
        are_texts = own == ["prompt", "completion"] and not any(_is_conversation(dataset.features[c]) for c in own)
        reads = {"prompt": "prompt", "reply": "completion"} | turns
        return ("question and answer", reads) if are_texts and turns else None
    for name, (needed, _) in FORMATS.items():
        if name == "caption" and (not vision or (own and _has_marks(dataset, text_column))):
            continue
        found = {what: _named(columns, names) for what, names in needed.items()}
        if not all(found.values()):
            continue
        if name == "caption":
            found = {what: names[:1] for what, names in found.items()}
        several = [names for names in found.values() if len(names) > 1]
        if several:
            raise DataError(
                f"the columns {' and '.join(several[0])} could each be the same thing: say which, for example "
                f"--columns prompt={found['prompt'][0]} completion={found['reply'][0]}"
                if "prompt" in found
                else f"the columns {' and '.join(several[0])} could each be the conversation: --columns messages=..."
            )
        reads = {what: names[0] for what, names in found.items() if what != "image"}
        for what, names in BESIDE.items() if "prompt" in reads else [("system", BESIDE["system"])]:
            beside = [column for column in _named(columns, names) if column not in reads.values()]
            reads |= {what: beside[0]} if beside and what not in reads else {}
        return name, reads
    return None


def _named(columns: list[str], names: tuple[str, ...]) -> list[str]:
    """The columns of these names, in the order of the names: `Question` and `QUESTION` are `question` too."""
    return [column for name in names for column in columns if column.lower() == name]


def _has_marks(dataset: Dataset, column: str) -> bool:
    return "<image>" in str(dataset.select_columns([column])[0][column])


def to_trl_format(
    dataset: Dataset, folder: Path, vision: bool, text_column: str = "text", always: bool = False
) -> Dataset:
    """
    A format of another tool as one of TRL's, with the roles that chat templates know, and images in their own column.

    Args:
        dataset ([`~datasets.Dataset`]): rows as they were read, see [`images.read_images`].
        folder (`Path`): relative paths of images inside of messages start here, or else in the current folder.
        vision (`bool`): whether `<image>` in a text stands for an image, and images inside of messages are taken out.
        text_column (`str`, *optional*, defaults to `"text"`): column that holds plain text.
        always (`bool`, *optional*, defaults to `False`): rebuild messages that need it not, so that datasets of
            several folders have the same types.

    Returns:
        [`~datasets.Dataset`]: rows of TRL's formats; what is in no format at all as it was.

    Raises:
        [`DataError`]: several columns could be the same thing.
    """
    found = recognize(dataset, vision, text_column)
    if found is not None:
        name, reads = found
        rows, made = {column: what for what, column in reads.items()}, ["messages"]
    else:
        made = [
            c for c in ("messages", "prompt", "completion") if c in text_columns(dataset.column_names, text_column)
        ]
        made = [column for column in made if _is_conversation(dataset.features[column])]
        system = next((c for c in BESIDE["system"] if c in dataset.column_names), None) if made else None
        name, rows = "", dict.fromkeys(made, "") | ({system: "system"} if system else {})
        beside = system or "tools" in dataset.column_names
        if not made or not (always or vision or beside or any(_is_unusual(dataset, column) for column in made)):
            return dataset
    read, stored = _undecoded_texts(_with_class_names(dataset.select_columns(list(rows))), rows)
    converted = read.map(
        _to_messages,
        fn_kwargs={
            "format": name,
            "reads": rows,
            "vision": vision,
            "folders": image_folders(folder),
            "stored": stored,
            "features": read.features,
        },
        remove_columns=list(rows),
        features=Features({column: Json() for column in made} | {"inline_images": List(IMAGE_STORAGE)}),
        desc="Reading messages",
    )
    rest = dataset.remove_columns(list(rows))
    # Side by side, since `map` would copy the images
    whole = concatenate_datasets([rest, converted], axis=1) if rest.column_names else converted
    whole = _with_tools(whole, name == "sharegpt") if "tools" in whole.column_names else whole
    return take_inline_images(whole, "inline_images")


def _with_class_names(dataset: Dataset) -> Dataset:
    """Columns of classes, which are stored as numbers, as the names of these classes. Below 0 is no class."""
    classes = {c: feature for c, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
    if not classes:
        return dataset

    def named(batch: dict[str, list]) -> dict[str, list]:
        return {c: [of.names[i] if i is not None and i >= 0 else None for i in batch[c]] for c, of in classes.items()}

    features = Features({**dataset.features, **dict.fromkeys(classes, Value("string"))})
    return dataset.map(named, batched=True, features=features, desc="Reading names of classes")


def _undecoded_texts(dataset: Dataset, reads: dict[str, str]) -> tuple[Dataset, dict[str, list[str]]]:
    """
    The texts of columns, or of keys, that have values of several types in a JSON file, as `datasets` stores them.

    It stores such values as JSON, but a text that is valid JSON by itself as it is. Decoded, the reply "1.50" beside
    contents that are lists of parts would be the number 1.5, and a reply in JSON an object. (Texts that cannot be told
    from JSON: `null`, `[]`, and one in double quotes.)

    Returns:
        `tuple[Dataset, dict[str, list[str]]]`: the rows, and the keys that are not decoded, by column; the key `""`
            stands for the column itself.
    """
    features, stored = dict(dataset.features), {}
    for column, feature in dataset.features.items():
        if isinstance(feature, Json) and reads[column] in TEXTS:
            features[column], stored[column] = Json(decode=False), [""]
        elif isinstance(feature, List) and isinstance(feature.feature, dict):
            keys = [key for key, of in feature.feature.items() if key in TEXT_KEYS and isinstance(of, Json)]
            if keys:
                features[column] = List({**feature.feature, **dict.fromkeys(keys, Json(decode=False))})
                stored[column] = keys
    return dataset.cast(Features(features)) if stored else dataset, stored


def _decoded(stored: Any, is_reply: bool) -> Any:
    """A value of [`_undecoded_texts`]: a list of parts, nothing, or a text. Only a reply is a list in a text."""
    try:
        value = json.loads(stored) if isinstance(stored, str) else stored
    except json.JSONDecodeError:
        return stored
    are_parts = isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value)
    is_list = are_parts or (isinstance(value, list) and not is_reply)
    return value if isinstance(value, str) or value is None or is_list else stored


def _is_conversation(feature: Any) -> bool:
    return isinstance(feature, (List, LargeList, Json))


def _is_unusual(dataset: Dataset, column: str) -> bool:
    """Whether messages are anything but a role that chat templates know and a text."""
    if dataset.features[column] != List({"role": Value("string"), "content": Value("string")}):
        return True
    tables = dataset.select_columns([column]).with_format("arrow").iter(1000)
    return any(not {*_roles(table[column]).unique().to_pylist()} <= {*ROLES} for table in tables)


def _to_messages(
    example: dict[str, Any],
    format: str,
    reads: dict[str, str],
    vision: bool,
    folders: Sequence[str],
    stored: dict[str, list[str]],
    features: Features,
) -> dict[str, Any]:
    example = {column: _without_added_null(value, features[column]) for column, value in example.items()}
    for column, keys in stored.items():
        if keys == [""]:
            example[column] = _decoded(example[column], is_reply=reads[column] == "reply")
            continue
        for turn in example[column] or []:
            is_reply = ROLE_NAMES.get(str(_role(turn)).lower(), _role(turn)) in ("assistant", None)
            turn |= {key: _decoded(turn[key], is_reply) for key in keys if key in turn}
    row = {what or column: example[column] for column, what in reads.items()}
    system = row.pop("system", None)
    converted = {"messages": FORMATS[format][1](row)} if format else row
    images: list[Any] = []
    for column, turns in converted.items():
        if isinstance(turns, list):
            read = [to_message(turn, images, vision, folders) for turn in turns]
            converted[column] = _parallel_calls(turns, read)
    first = next(iter(converted.values()))
    if system and isinstance(first, list) and not any(_role(message) in SYSTEM_ROLES for message in first):
        first.insert(0, _turn("system", system))
    return {**converted, "inline_images": images}


def _parallel_calls(turns: list[Any], messages: list[Any]) -> list[Any]:
    """ms-swift has several calls at once as turns that follow each other; chat templates expect one message."""
    merged: list[Any] = []
    for before, turn, message in zip([None, *turns], turns, messages, strict=False):
        both = str(_role(before)).lower() in CALLS and str(_role(turn)).lower() in CALLS
        if both and "tool_calls" in message and "tool_calls" in merged[-1]:
            merged[-1]["tool_calls"] += message["tool_calls"]
        else:
            merged.append(message)
    return merged


def _role(message: Any) -> Any:
    return message.get("role") or message.get("from") if isinstance(message, dict) else None


def to_message(turn: Any, images: list[Any], vision: bool = False, folders: Sequence[str] = ("",)) -> Any:
    """
    A turn as TRL has it: `role` and `content`, with the roles that chat templates know.

    Args:
        turn: as it was read; what is no turn at all stays as it is, for the check to name it.
        images (`list`): gets the images that are in the turn itself.
        vision (`bool`, *optional*, defaults to `False`): `<image>` in a text that is no reply stands for an image.
        folders (`Sequence[str]`, *optional*): relative paths start in the first of these that has the file.
    """
    if not isinstance(turn, dict):
        return turn
    role = turn.get("role") or turn.get("from")
    name = str(role).lower()
    content = turn.get("value") if turn.get("content") is None else turn.get("content")
    others = {
        key: value
        for key, value in turn.items()
        if key not in ("role", "from", "content", "value") and value is not None
    }
    if name in CALLS:
        calls = _calls(content)
        return {**_turn("assistant", None if calls else content), **others, **({"tool_calls": calls} if calls else {})}
    if isinstance(others.get("tool_calls"), list):
        others["tool_calls"] = [_with_arguments(call) for call in others["tool_calls"]]
    message = {"role": ROLE_NAMES.get(name, name if name in ROLES else role), "content": content, **others}
    if isinstance(content, list):
        message |= _reasoning_and_calls(content) if message["role"] == "assistant" else {}
        message["content"] = [to_part(part, images, folders) for part in message["content"]]
    if vision and message["role"] not in ("assistant", "tool"):
        parts = message["content"] if isinstance(message["content"], list) else [{"type": "text", "text": content}]
        if any("<image>" in str(_text_of_part(part)) for part in parts):
            message["content"] = [piece for part in parts for piece in _without_marks(part)]
    return message


def _reasoning_and_calls(parts: list[Any]) -> dict[str, Any]:
    """LLaMA-Factory's v1 files have them as parts of a reply; chat templates read them beside its content."""
    reasoning, calls, rest = "", [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        called = _calls(part.get("value")) if kind == "tool_call" else []
        if kind == "reasoning" and isinstance(part.get("value"), str):
            reasoning += part["value"]
        elif called:
            calls += called
        else:
            rest.append(part)
    found = {"reasoning_content": reasoning, "tool_calls": calls}
    return {"content": rest, **{key: value for key, value in found.items() if value}}


def to_part(part: Any, images: list[Any], folders: Sequence[str] = ("",)) -> Any:
    """A part of a message as TRL has it, and its image, if it has one, at the end of `images`.

    OpenAI's `image_url` (a text, or a `url` in it), Qwen's and Unsloth's `image`, axolotl's `url`, `path` and
    `base64`, LLaMA-Factory's `value`, and `source` of Anthropic. Whatever cannot be read gets a `problem`, for the
    check to name the row.
    """
    if not isinstance(part, dict):
        return part
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type") or next(
        (key for key in ("text", "image", "image_url", "video", "audio") if key in part), None
    )
    if kind in ("text", "input_text", "output_text"):
        # `value` is LLaMA-Factory's (v1), `content` is axolotl's
        text = next((part[key] for key in ("text", "value", "content") if key in part), None)
        return {"type": "text", "text": text, **marks_of(part)}
    if kind not in ("image", "image_url", "input_image"):
        return part
    keys = ("image", "image_url", "source", "url", "path", "base64", "bytes", "data", "value")
    value = next((part[key] for key in keys if key in part), None)
    if value is None:
        return {"type": "image"}
    image, problem = to_image(value, folders)
    if problem:
        return {"type": "image", "problem": problem}
    images.append(image)
    return {"type": "image"}


def _text_of_part(part: Any) -> Any:
    return part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None


def _without_marks(part: Any) -> list[Any]:
    """LLaVA's, LLaMA-Factory's and ms-swift's `<image>` in a text becomes a part of its own."""
    text = _text_of_part(part)
    if not isinstance(text, str):
        return [part]
    pieces: list[Any] = []
    for i, piece in enumerate(text.split("<image>")):
        pieces += [{"type": "image"}] if i else []
        piece = piece.strip("\n") if "<image>" in text else piece
        pieces += [{"type": "text", "text": piece}] if piece.strip() else []
    return pieces


def _calls(content: Any) -> list[dict[str, Any]]:
    """LLaMA-Factory's and ms-swift's calls of tools, JSON in a text, as Transformers has them; empty if it is none."""
    called = _from_json(content, (dict, list))
    calls = called if isinstance(called, list) else [called]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return []
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": _from_json(call.get("arguments", {}), dict)},
        }
        for call in calls
    ]


def _with_arguments(call: Any) -> Any:
    """OpenAI's and axolotl's arguments of a call are JSON in a text, which chat templates would write as a text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    return {**call, "function": {**function, "arguments": _from_json(function.get("arguments", {}), dict)}}


def _from_json(value: Any, kind: type | tuple[type, ...]) -> Any:
    """The object or list that a text is the JSON of; whatever else it is stays as it is."""
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value
    return read if isinstance(read, kind) else value


def _with_tools(dataset: Dataset, bare: bool) -> Dataset:
    """LLaMA-Factory's and ms-swift's tools are JSON in a text, LLaMA-Factory's without the envelope that chat
    templates expect; axolotl's parameters are JSON in a text."""

    stored = dataset.features["tools"]

    def parse(example: dict[str, Any]) -> dict[str, Any]:
        tools = _from_json(_without_added_null(example["tools"], stored), list)
        if isinstance(tools, str) and not tools.strip():
            return {"tools": None}
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            return {"tools": tools}  # the check names the row
        is_bare = bare or isinstance(example["tools"], str)  # TRL's own lists stay as they are
        return {"tools": [_tool(tool, is_bare) for tool in tools] or None}

    tools = dataset.select_columns(["tools"]).map(parse, features=Features({"tools": Json()}), desc="Reading tools")
    return concatenate_datasets([dataset.remove_columns("tools"), tools], axis=1)


def _tool(tool: dict[str, Any], is_bare: bool) -> dict[str, Any]:
    if not isinstance(tool.get("function"), dict):
        return {"type": "function", "function": tool} if is_bare else tool
    parameters = _from_json(tool["function"].get("parameters"), dict)
    return {**tool, "function": {**tool["function"], "parameters": parameters}} if parameters is not None else tool


def clean(dataset: Dataset, text_column: str, keep: Collection[str] = ()) -> Dataset:
    """
    Keeps the columns that TRL reads, with messages as chat templates expect them.

    Null entries that Arrow adds to messages are taken out again: chat templates ask whether a key is there. Those in
    arguments and parameters of tools that were JSON are kept. A `developer` becomes a `system`. A reply that is marked
    not to be learned gets [`marks.LEFT_OUT`]. Where a row has `{"type": "image"}` parts, all its user messages become
    lists of parts, as TRL needs. Without images, a list of parts becomes their text.

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
        _clean,
        fn_kwargs={"has_images": "images" in dataset.column_names, "features": dataset.features},
        features=Features({column: Json() for column in unclean}),
        desc="Cleaning messages",
    )
    rest = [c for c in dataset.column_names if c not in unclean]
    # Side by side, since `map` would copy the images
    return concatenate_datasets([cleaned, dataset.select_columns(rest)], axis=1) if rest else cleaned


def _has_developer(dataset: Dataset, column: str) -> bool:
    tables = dataset.select_columns([column]).with_format("arrow").iter(1000)
    return any(pc.any(pc.equal(_roles(table[column]), "developer")).as_py() for table in tables)


def _roles(messages: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.struct_field(pc.list_flatten(messages), "role")


def _clean(example: dict[str, Any], has_images: bool, features: Features) -> dict[str, Any]:
    example = {c: _without_null(_without_added_null(value, features[c])) for c, value in example.items()}
    conversations = [example[c] for c in ("messages", "prompt", "completion") if c in example]
    explicit = any(count_placeholders(messages) for messages in conversations)
    for messages in conversations:
        messages[:] = map(take_marks, messages)
        for message in messages:
            if message["role"] in SYSTEM_ROLES:
                message["role"] = "system"
            if isinstance(message.get("reasoning_content"), list):
                message["reasoning_content"] = text_of_content(message["reasoning_content"])
            if isinstance(message.get("content"), list) and not has_images:
                # The chat templates of most language models would write the list as Python does
                message["content"] = text_of_content(message["content"])
            elif isinstance(message.get("content"), list):
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


def _without_added_null(value: Any, feature: Any) -> Any:
    """A value without what Arrow adds, which gives all objects of a column the same keys. JSON has its null itself."""
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _without_added_null(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(feature, (List, LargeList)) and isinstance(value, list):
        return [_without_added_null(item, feature.feature) for item in value]
    return value


def _without_null(value: Any) -> Any:
    """Null keys of messages and tools are none. In arguments of a call, and in the schema of them, null is a value."""
    if isinstance(value, dict):
        return {
            key: item if key in ("arguments", "parameters") else _without_null(item)
            for key, item in value.items()
            if item is not None
        }
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def count_placeholders(messages: list[dict]) -> int:
    """`{"type": "image"}` parts in the messages."""
    contents = [message.get("content") for message in messages]
    return sum(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)


def text_of_content(content: str | list[dict] | None) -> str:
    """The text of a message: of its text parts where it is a list."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content or ""
